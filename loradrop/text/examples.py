"""What a task is made of: its kinds, one example, and all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from loradrop.text.labels import LISTS

ASKED = "asked"  # in a message of the assistant: that it is of a prompt, and nothing to learn
KINDS = ("classification", "regression", "causal_lm", *LISTS)


class Example(NamedTuple):
    """One row.

    text    a string; the words of a row of token_classification, and the messages (role, content,
            `ASKED`) of a conversation, as a tuple
    label   a class index; a float; class indices (multi-label: those that apply; tokens: one for
            each word, or `IGNORED`); None for causal_lm
    """

    text: str | tuple[Any, ...]
    pair: str | None
    label: int | float | tuple[int, ...] | None


@dataclass(frozen=True)
class TextTask:
    """Rows for any tokenizer; `fingerprint` holds the sha256 of train and of dev, in their order.

    `labels` are the names of the classes, () where there are none.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    metric: str
    fingerprint: Mapping[str, str]


def renumbered(task: TextTask, labels: tuple[str, ...]) -> TextTask:
    """The same rows, with the classes in the order of `labels`, which are the same names."""
    place = [labels.index(name) for name in task.labels]

    def moved(row: Example) -> Example:
        if isinstance(row.label, tuple):
            return row._replace(label=tuple(place[i] if i >= 0 else i for i in row.label))
        return row._replace(label=place[cast(int, row.label)])

    train, dev = (tuple(map(moved, rows)) for rows in (task.train, task.dev))
    return replace(task, labels=labels, train=train, dev=dev)
