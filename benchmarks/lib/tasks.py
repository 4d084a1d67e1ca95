"""The tasks and models of the quality benchmarks: how each is trained, and how it is judged."""

import dataclasses
import platform
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from loradrop.command.base_models import build
from loradrop.command.run_config import MINILM, ModelConfig, RunConfig
from loradrop.config import TrainConfig
from loradrop.files import write_json
from loradrop.machine import versions
from loradrop.text.examples import TextTask
from loradrop.text.labels import IGNORED
from loradrop.text.task import DataConfig, load_task
from loradrop.text.tokens import TokenizedDataset, collator, tokenize

HELD_OUT = 400  # rows of train that no run trains on: learning rates are chosen by them


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How one task is trained on one model.

    data      "stdlib", or a folder with train and dev files;  model   a folder, None for MiniLM
    columns   of the data, where they are not guessed
    dev_rows  on which a cut is judged
    dev_of_train  rows of train that nothing else uses, which stand in for dev: rows of the same
              sources. 0: dev itself
    measured, measured_batch   training rows that are probed, and in batches of how many
    judged    of the rows held out of train, how many choose the rate
    head_rate  learning rate of a new head; None is that of the adapters
    answered  rows of dev whose answers are written, and judged by the number at their end
    """

    data: str
    steps: int
    max_length: int
    learning_rate: float = 2e-3
    model: str | None = None
    target_modules: str | tuple[str, ...] = "all-linear"
    batch_size: int = 16
    max_train: int = 2400
    max_dev: int | None = None
    dev_rows: int = 400
    dev_of_train: int = 0
    measured: int = 1024
    measured_batch: int = 2
    judged: int = HELD_OUT
    head_rate: float | None = None
    answered: int = 0
    columns: dict[str, str] = dataclasses.field(default_factory=dict)


_E2E = {"task": "causal_lm", "text": "input", "text_pair": "target"}
SETTINGS = {
    "sst2": Setting(data="sst2", steps=120, max_length=40, head_rate=0.128),
    "stdlib": Setting(data="stdlib", steps=160, max_length=40),
    "stdlib, same modules": Setting(
        data="stdlib", steps=160, max_length=40, dev_of_train=800, head_rate=0.064
    ),
    "stdlib, same modules, query and value": Setting(
        data="stdlib", steps=160, max_length=40, dev_of_train=800, head_rate=0.064,
        target_modules=("query", "value"),
    ),
    "sst2, query and value": Setting(
        data="sst2", steps=120, max_length=40, head_rate=0.032, target_modules=("query", "value")
    ),
    "mrpc": Setting(data="mrpc", steps=240, max_length=64),
    "mrpc, 120 steps": Setting(data="mrpc", steps=120, max_length=64, head_rate=0.032),
    "rte": Setting(data="rte", steps=240, max_length=96, max_train=2000),
    "cola": Setting(data="cola", steps=240, max_length=32),
    "sst2, mpnet": Setting(
        data="sst2", model="mpnet", steps=120, max_length=40, learning_rate=1e-3, dev_rows=160,
        measured=512,
    ),
    "cola, mpnet": Setting(
        data="cola", model="mpnet", steps=300, max_length=32, learning_rate=1e-3, max_train=4800,
        measured=512,
    ),
    "sst2, mpnet, query and value": Setting(
        data="sst2", model="mpnet", steps=120, max_length=40, head_rate=0.032, measured=512,
        target_modules=("q", "v"),
    ),
    "e2e, SmolLM2": Setting(
        data="e2e", model="smollm2", steps=60, max_length=128, learning_rate=1e-3, batch_size=8,
        dev_rows=60, measured=256, measured_batch=1, columns=_E2E,
    ),
    "e2e, SmolLM2, query and value": Setting(
        data="e2e", model="smollm2", steps=60, max_length=128, batch_size=4, max_dev=128,
        judged=96, measured=64, measured_batch=1, target_modules=("q_proj", "v_proj"),
        columns=_E2E,
    ),
    "gsm8k, SmolLM2": Setting(
        data="gsm8k", model="smollm2", steps=40, max_length=256, learning_rate=1e-3, batch_size=4,
        dev_rows=32, measured=96, measured_batch=1, answered=100,
        columns={"task": "causal_lm", "text": "question", "text_pair": "answer"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A base model with its data; `choice` is a part of the task's train that is not trained on."""

    model: Any
    missing: tuple[str, ...]  # modules that the checkpoint lacks: trained whole
    task: TextTask
    train: TokenizedDataset
    choice: TokenizedDataset
    dev: TokenizedDataset
    tokenizer: Any
    collate: Any

    def batches(self, rows: TokenizedDataset, size: int = 64) -> list[Any]:
        """All rows in their order."""
        return list(DataLoader(rows, batch_size=size, collate_fn=self.collate))


class Tasks:
    """Tasks by name; files are read once.

    data, models   folders with the folders that `Setting` names, or None
    """

    def __init__(self, data: Path | None, models: Path | None) -> None:
        self.data, self.models = data, models
        self._read: dict[str, TextTask] = {}

    def has(self, name: str) -> bool:
        """Whether the files of the task and of its model are at hand."""
        setting = SETTINGS[name]
        return (setting.data == "stdlib" or self._at(self.data, setting.data)) and (
            setting.model is None or self._at(self.models, setting.model)
        )

    def at_hand(self, names: Iterable[str]) -> list[str]:
        """Those of the tasks whose files there are; the others are told, with where they were
        looked for. Raises SystemExit where none is left.
        """
        found = []
        for name in names:
            setting = SETTINGS[name]
            if self.has(name):
                found.append(name)
                continue
            data = f"{self.data}/{setting.data}" if self.data else "no --data given"
            model = "" if setting.model is None else f", {self.models}/{setting.model}"
            print(f"skipped: {name}, whose files are not there ({data}{model})", flush=True)
        if not found:
            raise SystemExit("no task is left")
        return found

    @staticmethod
    def _at(folder: Path | None, name: str) -> bool:
        return folder is not None and (folder / name).is_dir()

    def task(self, name: str) -> TextTask:
        """The rows, `HELD_OUT` of train more than are trained on."""
        if name not in self._read:
            setting = SETTINGS[name]
            source = "stdlib" if setting.data == "stdlib" else str(self.data / setting.data)
            config = DataConfig(
                source=source, max_train=setting.max_train + HELD_OUT, max_dev=setting.max_dev,
                **setting.columns,
            )  # fmt: skip
            task = load_task(config)
            if setting.dev_of_train:
                used = set(task.train)
                whole = load_task(dataclasses.replace(config, max_train=None)).train
                others = [row for row in whole if row not in used]
                dev = random.Random(1).sample(others, setting.dev_of_train)
                task = dataclasses.replace(task, dev=tuple(dev))
            self._read[name] = task
        return self._read[name]

    def prepare(self, name: str, train: TrainConfig) -> Prepared:
        """The model as `train.seed` makes its head, and the rows as tokens."""
        setting, task = SETTINGS[name], self.task(name)
        where = MINILM if setting.model is None else str(self.models / setting.model)
        config = RunConfig(model=ModelConfig(id=where), train=train)
        model, tokenizer, missing = build(config, task)
        rows, dev = tokenize(task, tokenizer, setting.max_length)
        order = random.Random(0).sample(range(len(rows)), len(rows))
        shuffled = [rows.rows[i] for i in order]
        choice, kept = shuffled[: setting.judged], shuffled[HELD_OUT:]
        return Prepared(
            model, tuple(missing), task, TokenizedDataset(kept), TokenizedDataset(choice), dev,
            tokenizer, collator(task, tokenizer),
        )  # fmt: skip


@torch.no_grad()
def predictions(model: Any, batches: Sequence[Any]) -> Tensor:
    """Log-probabilities (samples, classes) of what has a label: rows, or tokens of an answer."""
    model.eval()
    found = []
    for batch in batches:
        logits = model(**batch).logits
        if logits.ndim == 3:  # each position predicts the next token
            logits = logits[:, :-1][batch["labels"][:, 1:] != IGNORED]
        found.append(logits.float().log_softmax(-1))
    return torch.cat(found)


def labels_of(batches: Sequence[Any]) -> Tensor:
    """The labels of `predictions`, (samples,)."""
    found = [batch["labels"] for batch in batches]
    if found[0].ndim == 2:
        found = [labels[:, 1:][labels[:, 1:] != IGNORED] for labels in found]
    return torch.cat(found)


def quality(found: Tensor, labels: Tensor) -> dict[str, float]:
    """The mean loss (NLL) and the accuracy of log-probabilities (samples, classes)."""
    right = found.gather(1, labels[:, None]).squeeze(1).double()
    return {
        "loss": float(-right.mean()),
        "accuracy": float((found.argmax(-1) == labels).double().mean()),
    }


def divergence(found: Tensor, uncut: Tensor) -> float:
    """The mean KL(uncut ‖ found) of log-probabilities (samples, classes)."""
    each = [
        float((u.double().exp() * (u.double() - f.double())).sum())
        for u, f in zip(uncut.split(256), found.split(256), strict=True)
    ]
    return sum(each) / len(uncut)


def write_cells(path: Path, cells: Sequence[Any], settings: dict[str, Any]) -> None:
    """The result file: the cells, the settings of their tasks, and where they were measured."""
    machine = platform.processor() or platform.machine()
    named = dict.fromkeys(cell["task"] for cell in cells)
    tasks = {name: dataclasses.asdict(SETTINGS[name]) for name in named}
    environment = {"machine": machine, "threads": 1, "versions": versions()}
    settings = settings | {"held_out": HELD_OUT, "tasks": tasks}
    write_json(path, {"cells": cells, "environment": environment, "settings": settings})
