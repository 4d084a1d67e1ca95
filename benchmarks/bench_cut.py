"""What a trained adapter loses when directions are cut off, without any training afterwards.

LoRA is trained on every linear layer of MiniLM. Then each way to cut leaves a half, a quarter, an
eighth or a sixteenth of it, and the cut model is compared with the uncut one: the KL divergence of
its predictions on dev, and the dev metric. Cells are written as they finish; a run again does the
rest.

    python benchmarks/bench_cut.py --data DIR    DIR/sst2, DIR/mrpc ... hold train and dev files
"""

import argparse
import dataclasses
import json
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.data import DataLoader

import loradrop
import loradrop.injection
from lib import RESULTS
from loradrop.allocation import allocate
from loradrop.base_models import build
from loradrop.config import LoRAConfig, TrainConfig
from loradrop.env import versions
from loradrop.files import read_json, write_json
from loradrop.run_config import RunConfig
from loradrop.spectra import spectrum
from loradrop.text.examples import TextTask
from loradrop.text.task import DataConfig, load_task
from loradrop.text.tokens import collator, tokenize

RESULT = RESULTS / "cpu" / "bench_cut.json"
RANK, BATCH, LEARNING_RATE, MEASURED = 8, 16, 2e-3, 64  # MEASURED: batches
BUDGETS = (0.5, 0.25, 0.125, 0.0625)
# Arm -> metric, and how `allocate` spends the budget.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "loss": ("loss", {}),
    "output": ("output", {}),
    "weight": ("weight", {}),
    "weight, one rank for all": ("weight", {"scope": "per_target"}),  # as PEFT's conversion
    "whole layers by output": ("output", {"multiple": RANK}),  # LoRA-drop without sharing
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How one task is trained."""

    steps: int
    max_length: int
    max_train: int = 2400


SETTINGS = {
    "sst2": Setting(steps=160, max_length=40),
    "stdlib": Setting(steps=240, max_length=40),
    "mrpc": Setting(steps=240, max_length=64),
    "rte": Setting(steps=240, max_length=96),
    "cola": Setting(steps=240, max_length=32),
}


def run_cell(task: TextTask, name: str, seed: int, rows: int) -> Iterator[dict[str, Any]]:
    """The uncut model, then every arm at every budget."""
    setting = SETTINGS[name]
    train = TrainConfig(
        steps=setting.steps, batch_size=BATCH, learning_rate=LEARNING_RATE, seed=seed,
        save_every=10**6,
    )  # fmt: skip
    model, tokenizer, missing = build(RunConfig(train=train), task)
    tokens, dev = tokenize(task, tokenizer, setting.max_length)
    collate = collator(task, tokenizer)
    lora = LoRAConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", modules_to_save=tuple(missing)
    )
    loradrop.fit(model, tokens, None, lora, args=train, collate=collate)
    batches = list(DataLoader(dev.rows[:rows], batch_size=64, collate_fn=collate))
    labels = torch.cat([batch["labels"] for batch in batches])
    loader = DataLoader(
        tokens, batch_size=BATCH, shuffle=True, collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    measured = [batch for _, batch in zip(range(MEASURED), loader, strict=False)]
    scores, uncut = loradrop.probe(model, measured, gram=True), predictions(model, batches)
    facts = {"task": name, "seed": seed, "full": model.lora_bank.trainable}
    yield facts | {"arm": "uncut", "budget": 1.0, **quality(uncut, uncut, labels)}
    with tempfile.TemporaryDirectory() as folder:
        loradrop.save(model, folder)
        for arm, (metric, options) in ARMS.items():
            found = spectrum(scores, metric)
            for budget in BUDGETS:
                if options.get("scope") == "per_target" and budget * RANK < 1:
                    continue  # below rank 1 there is none
                ranks = allocate(found, budget=budget, **options)
                loradrop.load(model, folder)
                loradrop.injection.injection_of(model).scores = scores
                loradrop.truncate(model, ranks, metric=metric)
                cut = quality(predictions(model, batches), uncut, labels)
                predicted = found.loss(ranks) if metric == "loss" else None
                size = model.lora_bank.trainable
                yield facts | {
                    "arm": arm, "budget": budget, "parameters": size, "predicted": predicted, **cut,
                }  # fmt: skip


@torch.no_grad()
def predictions(model: Any, batches: list[Any]) -> Tensor:
    """Log-probabilities (rows, classes)."""
    model.eval()
    return torch.cat([model(**batch).logits for batch in batches]).double().log_softmax(-1)


def quality(found: Tensor, uncut: Tensor, labels: Tensor) -> dict[str, float]:
    """KL(uncut ‖ found), the loss and the accuracy."""
    return {
        "kl": float(kl_div(found, uncut, log_target=True, reduction="batchmean")),
        "loss": float(cross_entropy(found, labels)),
        "accuracy": float((found.argmax(-1) == labels).double().mean()),
    }


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--data", type=Path, help="has sst2/, mrpc/ ...; default: stdlib alone")
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=["sst2", "stdlib", "mrpc"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=500, help="of dev")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no run starts")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = read_json(args.out) if args.out.exists() else {"cells": []}
    report["environment"] = {
        "machine": platform.processor() or platform.machine(), "threads": 1, "versions": versions(),
    }  # fmt: skip
    report["settings"] = {name: dataclasses.asdict(setting) for name, setting in SETTINGS.items()}
    report["settings"] |= {
        "rank": RANK, "batch_size": BATCH, "learning_rate": LEARNING_RATE,
        "measured_batches": MEASURED, "dev_rows": args.rows,
    }  # fmt: skip
    done = {(cell["task"], cell["seed"]) for cell in report["cells"]}
    deadline = time.monotonic() + 60 * args.minutes
    for seed in args.seeds:
        for name in args.tasks:
            if (name, seed) in done or time.monotonic() > deadline:
                continue
            if name != "stdlib" and args.data is None:
                continue
            source = "stdlib" if name == "stdlib" else str(args.data / name)
            task = load_task(DataConfig(source=source, max_train=SETTINGS[name].max_train))
            report["cells"] += list(run_cell(task, name, seed, args.rows))
            write_json(args.out, report)
            print(json.dumps(report["cells"][-1]), flush=True)


if __name__ == "__main__":
    main()
