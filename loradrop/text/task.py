"""The data of a run: texts with labels, split into train and dev.

`load_task` turns a `DataConfig` into a `TextTask`: the embedded default, a file, a folder, or
a data set of the hub, of every kind in `examples.KINDS`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loradrop.options import check_whole
from loradrop.sampling import stratified_indices
from loradrop.text.columns import read_examples
from loradrop.text.examples import KINDS, Example, TextTask
from loradrop.text.stdlib_docs import areas, read_docs
from loradrop.text.tables import read_source


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the rows come from and which of them are used.

    source       "stdlib" (docstrings of Python's standard library, by area, with a split of its
                 own), a CSV, TSV, JSONL or JSON file, a folder with train and dev files,
                 "glue/<task>", or a hub id
    task         "classification", "regression", "causal_lm", "multi_label_classification",
                 "token_classification", or "auto": from the columns and labels
    text         column; None is text, review, tweet, comment, content or the columns of a GLUE
                 task: sentence, sentence1 and sentence2, premise and hypothesis, question1 and
                 question2, question and sentence; tokens or words (lists of words) where the labels
                 are lists. For causal_lm it is messages or conversations (lists of messages with
                 role and content), or prompt and completion, or instruction and output (with input
                 below the instruction), or text
    text_pair    column of the second sentence or, for causal_lm, of the completion
    label        column; None is label, labels, ner_tags, sentiment, category, class, target or
                 tags. Lists of classes make a multi-label task; with lists of words, each word has
                 a label, or -100 where it does not count. Lists of tags need lists of words,
                 unless `task` says otherwise
    dev          file (or split of a hub data set); None is the dev or validation file beside a
                 train file, and a part held out of train where there is none
    dev_ratio    that part, by class
    max_length   in tokens, special ones included; longer rows are cut. None is the longest row's,
                 but no more than the model takes
    max_train, max_dev   at most that many rows, drawn by class
    seed         of the held-out part and the draws; the training's seed does not touch them

    In a cell of CSV, lists and conversations are written as JSON or as Python writes them. Of a
    prompt with its completion only the completion is learned, of a conversation the turns of the
    assistant. A row is one example: rows are not packed.

    Raises ValueError naming the field, its value and the remedy.
    """

    source: str = "stdlib"
    task: str = "auto"
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    dev: str | None = None
    dev_ratio: float = 0.1
    max_length: int | None = None
    max_train: int | None = None
    max_dev: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source.strip():
            raise ValueError(f'data.source={self.source!r}: name "stdlib", a path or a hub id')
        if self.task not in ("auto", *KINDS):
            raise ValueError(f"data.task={self.task!r}: choose auto, {', '.join(KINDS)}")
        if not isinstance(self.dev_ratio, float) or not 0 < self.dev_ratio < 1:
            raise ValueError(f"data.dev_ratio={self.dev_ratio!r}: choose a number between 0 and 1")
        for name, minimum in {"max_length": 8, "max_train": 2, "max_dev": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None or name == "seed":
                check_whole(f"data.{name}", value, minimum)


def _split(
    rows: Sequence[Example], kind: str, size: float | int | None, seed: int
) -> tuple[list[Example], list[Example]]:
    """(a draw by class, the rest); a `size` of None, or of all rows and more, draws everything."""
    if size is None or (isinstance(size, int) and size >= len(rows)):
        return list(rows), []
    labels: Any = [row.label for row in rows] if kind == "classification" else None
    chosen = set(stratified_indices(labels, len(rows), size, seed))
    drawn = [row for i, row in enumerate(rows) if i in chosen]
    return drawn, [row for i, row in enumerate(rows) if i not in chosen]


def _sha256(rows: Sequence[Example]) -> str:
    return hashlib.sha256(b"".join(json.dumps(row).encode() + b"\n" for row in rows)).hexdigest()


def _stdlib(config: DataConfig) -> tuple[tuple[str, ...], list[Example], list[Example]]:
    given = [name for name in ("text", "text_pair", "label", "dev") if getattr(config, name)]
    if given or config.task not in ("auto", "classification"):
        raise ValueError(
            "data.source='stdlib' is a classification with columns and a dev set of its own: leave "
            f"data.{', data.'.join(given or ['task'])} out, or set data.source to a file"
        )
    names = tuple(areas())
    sides: dict[str, list[Example]] = {"train": [], "dev": []}
    for doc in read_docs():
        sides[doc.split].append(Example(doc.text, None, names.index(doc.area)))
    return names, sides["train"], sides["dev"]


def _hold_out(
    rows: Sequence[Example], kind: str, ratio: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(train, dev)"""
    dev, train = _split(rows, kind, ratio, seed)
    lost = {row.label for row in dev} - {row.label for row in train}
    if not train or (kind == "classification" and lost):
        raise ValueError(
            f"{len(rows)} rows are too few to hold out data.dev_ratio={ratio} of them, with every "
            "class left in train: set data.dev or a smaller data.dev_ratio"
        )
    return train, dev


def _metric(name: str, kind: str) -> str:
    if kind == "classification":
        return "matthews" if name.rpartition("/")[2].lower() == "cola" else "accuracy"
    metrics = {"regression": "pearson", "causal_lm": "loss"}
    return metrics.get(kind, "accuracy" if kind == "token_classification" else "micro_f1")


def load_task(config: DataConfig) -> TextTask:
    """The rows that `config` asks for, the same for the same configuration and files.

    Raises FileNotFoundError for a missing file, and ValueError for what is unreadable or does not
    fit the task, naming the row or column and the remedy.
    """
    name, kind = config.source, "classification"
    dev: list[Example] | None
    if config.source == "stdlib":
        labels, train, dev = _stdlib(config)
    else:
        name, train_table, dev_table = read_source(config.source, config.dev)
        columns = config.text, config.text_pair, config.label
        kind, labels, train, dev = read_examples(train_table, dev_table, config.task, *columns)
    if dev is None:
        train, dev = _hold_out(train, kind, config.dev_ratio, config.seed)
    train, _ = _split(train, kind, config.max_train, config.seed)
    dev, _ = _split(dev, kind, config.max_dev, config.seed)
    fingerprint = {"train": _sha256(train), "dev": _sha256(dev)}
    metric = _metric(name, kind)
    return TextTask(name, kind, labels, tuple(train), tuple(dev), metric, fingerprint)
