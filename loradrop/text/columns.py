"""What the columns of a table are, and what its labels mean: from cells to examples."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from loradrop.text.tables import Table

KINDS = ("classification", "regression", "causal_lm")
TEXTS = (
    "sentence",
    "text",
    "sentence1",
    "premise",
    "question",
    "question1",
    "input",
    "prompt",
    "content",
    "document",
    "review",
)
LABELS = ("label", "labels", "class", "category")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
COMPLETIONS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "target"),
    ("input", "output"),
    ("source", "target"),
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class Example(NamedTuple):
    """One row; ``label`` is a class index, a float, or None for causal_lm."""

    text: str
    pair: str | None
    label: int | float | None


class Roles(NamedTuple):
    """The column of each part; ``kind`` is "auto" where the labels decide."""

    kind: str
    text: str
    pair: str | None
    label: str | None


class Labelled(NamedTuple):
    """``labels`` are class names, () unless ``kind`` is classification."""

    kind: str
    labels: tuple[str, ...]
    train: list[Example]
    dev: list[Example] | None


def _listed(table: Table) -> str:
    return f"{table.places[0]} has the columns {', '.join(table.columns)}"


def find_roles(
    table: Table, task: str, text: str | None, text_pair: str | None, label: str | None
) -> Roles:
    """Columns named in the configuration, the others by well-known names.

    A pair is looked for only where ``text`` is not named. Raises ValueError with the columns there
    are for one that is missing.
    """
    named = {"data.text": text, "data.text_pair": text_pair, "data.label": label}
    for option, column in named.items():
        if column is not None and column not in table.columns:
            raise ValueError(f"{option}={column!r} is no column: {_listed(table)}")
    if task == "causal_lm" and label is not None:
        raise ValueError(f"data.label={label!r}: causal_lm has no label; use data.text_pair")
    if task != "causal_lm" and label is None:
        label = next((name for name in LABELS if name in table.columns), None)
    known = COMPLETIONS if label is None else PAIRS
    pair = next((pair for pair in known if {*pair} <= {*table.columns} - {label}), None)
    if label is None and task == "auto" and text is None and text_pair is None and pair:
        task = "causal_lm"
    if label is None and task != "causal_lm":
        raise ValueError(
            f"there is no label column: {_listed(table)}; name it with data.label, or set "
            "data.task=causal_lm for text without labels"
        )
    if text is None and text_pair is None and pair:
        text, text_pair = pair
    if text is None:
        taken = (label, text_pair)
        text = next((name for name in TEXTS if name in table.columns and name not in taken), None)
    if text is None:
        raise ValueError(f"there is no text column: {_listed(table)}; name it with data.text")
    used = [column for column in (text, text_pair, label) if column is not None]
    if len(set(used)) < len(used):
        raise ValueError(f"a column is used twice ({', '.join(used)}): text, pair and label differ")
    return Roles(task, text, text_pair, label)


def _text(table: Table, index: int, column: str) -> str:
    cell = table.rows[index].get(column)
    if not isinstance(cell, str):
        raise ValueError(
            f"{table.places[index]}: {column!r} is {cell!r}, not text: fill it or remove the row"
        )
    return cell


def _texts(table: Table, roles: Roles) -> list[tuple[str, str | None]]:
    text, pair = roles.text, roles.pair
    return [
        (_text(table, i, text), None if pair is None else _text(table, i, pair))
        for i in range(len(table.rows))
    ]


def _label(cell: Any, place: str) -> int | float | str:
    if isinstance(cell, str):
        cell = cell.strip()
        if _NUMBER.fullmatch(cell):
            cell = int(cell) if cell.lstrip("+-").isdigit() else float(cell)
    if isinstance(cell, bool):
        return int(cell)
    if cell is None or cell in ("", "nan", "NaN") or cell != cell or cell in (math.inf, -math.inf):
        raise ValueError(f"{place}: the label is {cell!r}: fill it or remove the row")
    if not isinstance(cell, (int, float, str)):
        raise ValueError(f"{place}: the label {cell!r} is neither a number nor text")
    return cell


def _fit_kind(
    kind: str, values: list[Any], raw: Sequence[Any], places: Sequence[str]
) -> tuple[str, list[Any]]:
    """The kind that the labels ask for, and the labels as that kind needs them."""
    word = next((i for i, value in enumerate(values) if isinstance(value, str)), None)
    if word is not None:
        if kind == "regression":
            raise ValueError(
                f"{places[word]}: the label {raw[word]!r} is no number, which regression needs: "
                "repair it or set data.task=classification"
            )
        return "classification", [str(cell).strip() for cell in raw]
    broken = next((i for i, value in enumerate(values) if value != int(value)), None)
    if kind == "classification" and broken is not None:
        raise ValueError(
            f"{places[broken]}: the label {raw[broken]!r} is no class: classes are whole numbers "
            "or words; set data.task=regression for numbers"
        )
    if kind == "auto":
        fractions = any(isinstance(value, float) for value in values)
        kind = "regression" if fractions else "classification"
    return kind, [float(value) if kind == "regression" else int(value) for value in values]


def _class_names(
    values: Sequence[Any], n_train: int, places: Sequence[str], declared: tuple[str, ...]
) -> tuple[tuple[str, ...], list[int]]:
    """Class names in order (numbers by size, words by alphabet) and each row's class index."""
    known = list(range(len(declared))) if declared else sorted(set(values[:n_train]))
    index = {value: i for i, value in enumerate(known)}
    for value, place in zip(values, places, strict=True):
        if value not in index:
            shown = ", ".join(str(k) for k in known[:20])
            raise ValueError(
                f"{place}: the label {value!r} is none of the {len(known)} classes of train "
                f"({shown}): repair it, or choose another dev set if it has no labels"
            )
    return declared or tuple(str(value) for value in known), [index[value] for value in values]


def read_rows(train: Table, dev: Table | None, roles: Roles) -> Labelled:
    """Rows of both tables with labels as class indices (classification) or floats (regression).

    "0" and "1" read from text are whole numbers, and whole numbers are classes; labels with
    fractions make ``kind="auto"`` a regression. Raises ValueError naming the row for text or labels
    that are missing, not finite, of another kind, or not among train's classes.
    """
    tables = [train] if dev is None else [train, dev]
    for table in tables:
        for column in (roles.text, roles.pair, roles.label):
            if column is not None and column not in table.columns:
                raise ValueError(f"train has a column {column!r}, but {_listed(table)}")
    texts = [text for table in tables for text in _texts(table, roles)]
    labels: Sequence[Any] = [None] * len(texts)
    kind, n_train = roles.kind, len(train.rows)
    names: tuple[str, ...] = ()
    if roles.label is not None:
        raw = [row.get(roles.label) for table in tables for row in table.rows]
        places = [place for table in tables for place in table.places]
        values = [_label(cell, place) for cell, place in zip(raw, places, strict=True)]
        kind, labels = _fit_kind(kind, values, raw, places)
        if len(set(labels[:n_train])) < 2:
            raise ValueError(
                f"every row of train has the label {labels[0]!r} ({_listed(train)}): there is "
                "nothing to learn; check data.label"
            )
        if kind == "classification":
            declared = train.classes.get(roles.label, ())
            names, labels = _class_names(labels, n_train, places, declared)
    rows = [Example(*text, label) for text, label in zip(texts, labels, strict=True)]
    return Labelled(kind, names, rows[:n_train], None if dev is None else rows[n_train:])
