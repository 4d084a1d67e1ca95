"""What a task is made of: its kinds, one example, and all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

KINDS = ("classification", "regression", "causal_lm")


class Example(NamedTuple):
    """One row; `label` is a class index, a float, or None for causal_lm."""

    text: str
    pair: str | None
    label: int | float | None


@dataclass(frozen=True)
class TextTask:
    """Rows for any tokenizer; `fingerprint` holds the sha256 of train and of dev, in their order.

    `labels` are the names of the classes, () unless `kind` is classification.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    metric: str
    fingerprint: Mapping[str, str]
