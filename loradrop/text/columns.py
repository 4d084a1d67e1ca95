"""What the columns of a table are, and what its labels mean: from cells to examples."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from loradrop.text.examples import Example
from loradrop.text.tables import Table

# The columns where the configuration names none: `label`, and the first (text, pair) that the table
# has, of TEXTS (the names of the GLUE tasks) or, for causal_lm, of PROMPTS.
LABEL = "label"
TEXTS = (
    *(("text", None), ("sentence1", "sentence2"), ("premise", "hypothesis")),
    *(("question1", "question2"), ("question", "sentence"), ("sentence", None)),
)
PROMPTS = (("prompt", "completion"), ("text", None), ("sentence", None))
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def read_examples(
    train: Table,
    dev: Table | None,
    kind: str = "auto",
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
) -> tuple[str, tuple[str, ...], list[Example], list[Example] | None]:
    """(kind, names of the classes, train, dev) of the rows of both tables.

    `text`, `pair` and `label` name columns; None is found by `LABEL`, `TEXTS` and `PROMPTS`, a pair
    only where `text` is not named. Labels become class indices (classification) or floats
    (regression): "0" and "1" read from text are whole numbers, and whole numbers are classes;
    labels with fractions make "auto" a regression.

    Raises ValueError with the columns of the table for a column that is missing, and naming the row
    for text or labels that are missing, not finite, of another kind, or not among train's classes.
    """
    kind, text, pair, label = _roles(train, kind, text, pair, label)
    tables = [train] if dev is None else [train, dev]
    for table in tables:
        for option, column in {"text": text, "text_pair": pair, "label": label}.items():
            if column is not None and column not in table.columns:
                raise ValueError(f"data.{option}={column!r} is not a column: {_listed(table)}")
    rows = [row for table in tables for row in table.rows]
    places = [place for table in tables for place in table.places]
    texts, pairs = _texts(rows, places, text), _texts(rows, places, pair)
    names: tuple[str, ...] = ()
    labels: Sequence[Any] = [None] * len(rows)
    n_train = len(train.rows)
    if label is not None:
        kind, labels = _labels(kind, [row.get(label) for row in rows], places)
        if len(set(labels[:n_train])) < 2:
            raise ValueError(
                f"every row of train has the label {labels[0]!r} ({_listed(train)}): there is "
                "nothing to learn; check data.label"
            )
        if kind == "classification":
            names, labels = _classes(labels, n_train, places, train.classes.get(label, ()))
    examples = list(map(Example, texts, pairs, labels))
    return kind, names, examples[:n_train], None if dev is None else examples[n_train:]


def _listed(table: Table) -> str:
    return f"{table.places[0]} has the columns {', '.join(table.columns)}"


def _roles(
    table: Table, kind: str, text: str | None, pair: str | None, label: str | None
) -> tuple[str, str, str | None, str | None]:
    """(kind, text, pair, label) with the default columns where none are named."""
    if kind == "causal_lm" and label is not None:
        raise ValueError(f"data.label={label!r}: causal_lm has no label; use data.text_pair")
    if kind != "causal_lm" and label is None and LABEL in table.columns:
        label = LABEL
    free = {*table.columns} - {pair, label}
    if kind == "auto" and label is text is pair is None and free.issuperset(PROMPTS[0]):
        kind = "causal_lm"
    if label is None and kind != "causal_lm":
        raise ValueError(
            f"there is no label column: {_listed(table)}; name it with data.label, or set "
            "data.task=causal_lm for text without labels"
        )
    known = PROMPTS if kind == "causal_lm" else TEXTS
    if text is pair is None:
        text, pair = next((names for names in known if free | {None} >= {*names}), (None, None))
    text = text or next((name for name, _ in known if name in free), None)
    if text is None:
        raise ValueError(f"there is no text column: {_listed(table)}; name it with data.text")
    used = [column for column in (text, pair, label) if column is not None]
    if len(set(used)) < len(used):
        raise ValueError(f"a column is used twice ({', '.join(used)}): text, pair and label differ")
    return kind, text, pair, label


def _texts(rows: Sequence[Any], places: Sequence[str], column: str | None) -> Sequence[Any]:
    cells = [None if column is None else row.get(column) for row in rows]
    for cell, place in zip(cells, places, strict=True):
        if column is not None and not isinstance(cell, str):
            raise ValueError(f"{place}: {column!r} is {cell!r}, not text: fill it or drop the row")
    return cells


def _parsed(cell: Any) -> int | float | str | None:
    """A number where the label reads as one, a word otherwise, None where it is neither."""
    value = cell.strip() if isinstance(cell, str) else cell
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            return None if value in ("", "nan", "NaN") else value
        value = int(value) if value.lstrip("+-").isdigit() else float(value)
    if isinstance(value, (int, float)) and abs(value) < float("inf"):  # False for NaN
        return int(value) if isinstance(value, bool) else value
    return None


def _labels(kind: str, cells: Sequence[Any], places: Sequence[str]) -> tuple[str, Sequence[Any]]:
    """The kind that the labels ask for, and the labels as that kind needs them."""
    values: list[Any] = list(map(_parsed, cells))

    def refuse(wrong: Callable[[Any], bool], why: str) -> None:
        for value, cell, place in zip(values, cells, places, strict=True):
            if wrong(value):
                raise ValueError(f"{place}: the label {cell!r} is not {why}")

    refuse(lambda value: value is None, "a number or a word: fill it or remove the row")
    words = any(isinstance(value, str) for value in values)
    if kind == "regression":
        why = "a number, which regression needs: repair it or set data.task=classification"
        refuse(lambda value: isinstance(value, str), why)
    elif words:
        return "classification", [str(cell).strip() for cell in cells]
    elif kind == "classification":
        why = "a class: classes are whole numbers or words; set data.task=regression for numbers"
        refuse(lambda value: value != int(value), why)
    elif kind == "auto":
        fractions = any(isinstance(value, float) for value in values)
        kind = "regression" if fractions else "classification"
    return kind, list(map(float if kind == "regression" else int, values))


def _classes(
    labels: Sequence[Any], n_train: int, places: Sequence[str], declared: tuple[str, ...]
) -> tuple[tuple[str, ...], list[int]]:
    """Class names in order (numbers by size, words by alphabet) and each row's class index."""
    known = list(range(len(declared))) if declared else sorted(set(labels[:n_train]))
    index = {label: i for i, label in enumerate(known)}
    for label, place in zip(labels, places, strict=True):
        if label not in index:
            shown = ", ".join(str(k) for k in known[:20])
            raise ValueError(
                f"{place}: the label {label!r} is not among the {len(known)} classes of train "
                f"({shown}): repair it, or choose another dev set if it has no labels"
            )
    return declared or tuple(map(str, known)), [index[label] for label in labels]
