"""The data of a run: texts with labels, split into train and dev, and their tokens.

``load_task`` turns a ``DataConfig`` into a ``TextTask``: the embedded default, a file, a folder, or
a data set of the hub, for single sentences, sentence pairs, regression and causal language models.
"""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loradrop.text.columns import KINDS, Example, find_roles, read_rows
from loradrop.text.stdlib_docs import AREAS, read_docs
from loradrop.text.tables import read_source
from loradrop.text.tokens import TokenizedDataset, collator, metric_fn, tokenize

__all__ = [
    "DataConfig",
    "Example",
    "TextTask",
    "TokenizedDataset",
    "collator",
    "load_task",
    "metric_fn",
    "stratified_indices",
    "tokenize",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the rows come from and which of them are used.

    source       "stdlib" (docstrings of Python's standard library, by area, with a split of its
                 own), a CSV, TSV or JSONL file, a folder with train and dev files, "glue/<task>",
                 or a hub id
    task         "classification", "regression", "causal_lm", or "auto": from the columns and labels
    text         column; None is found by well-known names, and then so is ``text_pair``
    text_pair    column of the second sentence or, for causal_lm, of the completion
    label        column; None is found by well-known names
    dev          file (or split of a hub data set); None is the dev or validation file beside a
                 train file, and a part held out of train where there is none
    dev_ratio    that part, by class
    max_length   in tokens, special ones included
    max_train, max_dev   so many rows at most, drawn by class
    seed         of the held-out part and the draws; the training's seed does not touch them

    Raises ValueError naming the field, its value and the remedy.
    """

    source: str = "stdlib"
    task: str = "auto"
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    dev: str | None = None
    dev_ratio: float = 0.1
    max_length: int = 64
    max_train: int | None = None
    max_dev: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source.strip():
            raise ValueError(
                f'data.source={self.source!r}: name "stdlib", a file or folder, or a hub id'
            )
        if self.task not in ("auto", *KINDS):
            raise ValueError(f"data.task={self.task!r}: choose auto, {', '.join(KINDS)}")
        if not isinstance(self.dev_ratio, float) or not 0 < self.dev_ratio < 1:
            raise ValueError(f"data.dev_ratio={self.dev_ratio!r}: choose a number between 0 and 1")
        least = {"max_length": 8, "max_train": 2, "max_dev": 1, "seed": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is None and name in ("max_train", "max_dev"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"data.{name}={value!r}: choose a whole number from {minimum} up")


@dataclass(frozen=True)
class TextTask:
    """Rows ready for any tokenizer; ``fingerprint`` holds the sha256 of train and dev in order."""

    name: str
    kind: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    metric: str
    fingerprint: Mapping[str, str]


def stratified_indices(
    labels: Sequence[int] | None, n: int, ratio_or_count: float | int, seed: int
) -> list[int]:
    """A random draw from range(n), sorted, with each class's share by largest remainder.

    A float is a ratio (the count is rounded half up, at least 1), an int a count. Remainders tie by
    class order; without ``labels`` the draw is plain. Raises ValueError for a size outside 1..n.
    """
    if isinstance(ratio_or_count, float):
        count = max(1, math.floor(ratio_or_count * n + 0.5))
        fits = 0 < ratio_or_count <= 1 and n > 0
    else:
        count = ratio_or_count
        fits = 1 <= count <= n
    if not fits:
        raise ValueError(
            f"cannot draw {ratio_or_count} of {n} rows: give a ratio in (0, 1] or a count in 1..{n}"
        )
    if labels is not None and len(labels) != n:
        raise ValueError(f"{len(labels)} labels for {n} rows: give one label per row")
    sizes = sorted(Counter(labels if labels is not None else [0] * n).items())
    quota = {label: count * size // n for label, size in sizes}
    by_remainder = sorted(sizes, key=lambda item: -(count * item[1] % n))
    for label, _ in by_remainder[: count - sum(quota.values())]:
        quota[label] += 1
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(n)]
    chosen = []
    for index in sorted(range(n), key=keys.__getitem__):
        label = labels[index] if labels is not None else 0
        if quota[label]:
            quota[label] -= 1
            chosen.append(index)
    return sorted(chosen)


def _draw(rows: Sequence[Example], kind: str, size: float | int, seed: int) -> list[int]:
    labels = [int(row.label or 0) for row in rows] if kind == "classification" else None
    return stratified_indices(labels, len(rows), size, seed)


def _at_most(rows: Sequence[Example], kind: str, count: int | None, seed: int) -> list[Example]:
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[i] for i in _draw(rows, kind, count, seed)]


def _sha256(rows: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def _stdlib(config: DataConfig) -> tuple[tuple[str, ...], list[Example], list[Example]]:
    given = [name for name in ("text", "text_pair", "label", "dev") if getattr(config, name)]
    if given or config.task not in ("auto", "classification"):
        raise ValueError(
            "data.source='stdlib' is a classification with columns and a dev set of its own: leave "
            f"data.{', data.'.join(given or ['task'])} out, or set data.source to a file"
        )
    areas = tuple(AREAS)
    sides: dict[str, list[Example]] = {"train": [], "dev": []}
    for doc in read_docs():
        sides[doc.split].append(Example(doc.text, None, areas.index(doc.area)))
    return areas, sides["train"], sides["dev"]


def _hold_out(
    rows: Sequence[Example], kind: str, ratio: float, seed: int
) -> tuple[list[Example], list[Example]]:
    chosen = set(_draw(rows, kind, ratio, seed))
    train = [row for i, row in enumerate(rows) if i not in chosen]
    dev = [row for i, row in enumerate(rows) if i in chosen]
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
    return {"regression": "pearson", "causal_lm": "loss"}[kind]


def load_task(config: DataConfig) -> TextTask:
    """The rows that ``config`` asks for, the same for the same configuration and files.

    Raises FileNotFoundError for a missing file, and ValueError for what is unreadable or does not
    fit the task, naming the row or column and the remedy.
    """
    name, kind = config.source, "classification"
    dev: list[Example] | None
    if config.source == "stdlib":
        labels, train, dev = _stdlib(config)
    else:
        name, train_table, dev_table = read_source(config.source, config.dev)
        roles = find_roles(train_table, config.task, config.text, config.text_pair, config.label)
        kind, labels, train, dev = read_rows(train_table, dev_table, roles)
    if dev is None:
        train, dev = _hold_out(train, kind, config.dev_ratio, config.seed)
    train = _at_most(train, kind, config.max_train, config.seed)
    dev = _at_most(dev, kind, config.max_dev, config.seed)
    return TextTask(
        name=name,
        kind=kind,
        labels=labels,
        train=tuple(train),
        dev=tuple(dev),
        metric=_metric(name, kind),
        fingerprint={"train": _sha256(train), "dev": _sha256(dev)},
    )
