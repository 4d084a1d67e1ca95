"""What the labels of a table mean: numbers or classes, one for a row or a list of them."""

import re
from collections.abc import Sequence
from typing import Any

LISTS = ("multi_label_classification", "token_classification")  # the labels of a row are a list
IGNORED = -100  # the label that losses and metrics leave out
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"[+-]?(0|[1-9]\d*)(\.0*)?", re.ASCII)  # not 01 and not 1E5, which are codes


def read_labels(
    kind: str, cells: Sequence[Any], places: Sequence[str], n_train: int, declared: tuple[str, ...]
) -> tuple[str, tuple[str, ...], Sequence[Any]]:
    """(kind, names of the classes, labels) of cells, of which the first `n_train` are of train.

    A label is a class index (classification), a float (regression), or a tuple of class indices
    (the kinds of `LISTS`: lists of classes, also as a vector of 0 and 1 for each class; the number
    -100 as the label of a word is no class, and stays). Where every cell is a number and one has a
    fraction, "auto" is a regression. Else the cells are classes: 1, "1" and "1.0" are one, and "01"
    or "1E5" are text. `declared` names the classes of indices. Raises ValueError naming the row of
    a label that does not fit.
    """
    if kind in LISTS:
        return kind, *_lists(kind, cells, places, n_train, declared)
    kind, labels = _values(kind, cells, places)
    if kind == "regression":
        return kind, (), labels
    return kind, *_classes(labels, n_train, places, declared)


def _parsed(cell: Any) -> tuple[Any, float | None]:
    """(the cell as a class, as a number); a class of None is neither."""
    value = cell.strip() if isinstance(cell, str) else cell
    if isinstance(value, str):
        number = float(value) if _NUMBER.fullmatch(value) else None
        if value in ("", "nan", "NaN") or number in (float("inf"), float("-inf")):
            return None, None
        return int(value.partition(".")[0]) if _WHOLE.fullmatch(value) else value, number
    if isinstance(value, (int, float)) and abs(value) < float("inf"):  # False for NaN
        return int(value) if value == int(value) else str(value), float(value)
    return None, None


def _values(kind: str, cells: Sequence[Any], places: Sequence[str]) -> tuple[str, list[Any]]:
    """The kind that the labels ask for, and the labels as that kind needs them."""
    classes, numbers = zip(*map(_parsed, cells), strict=True) if cells else ((), ())

    def refuse(wrong: Sequence[bool], why: str) -> None:
        if True in wrong:
            at = wrong.index(True)
            raise ValueError(f"{places[at]}: the label {cells[at]!r} is not {why}")

    refuse([c is None for c in classes], "a number or a word: fill it or remove the row")
    words = [number is None for number in numbers]
    fractions = [number is not None and number % 1 != 0 for number in numbers]
    if kind == "regression" or (kind == "auto" and any(fractions) and not any(words)):
        why = "a number, which regression needs: repair it or set data.task=classification"
        refuse(words, why)
        return "regression", list(numbers)
    if not any(words):
        why = "a class: classes are whole numbers or words; set data.task=regression for numbers"
        refuse(fractions, why)
    if any(isinstance(c, str) for c in classes):
        classes = tuple(map(str, classes))
    return "classification", list(classes)


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


def _lists(
    kind: str, cells: Sequence[Any], places: Sequence[str], n_train: int, declared: tuple[str, ...]
) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """The names of the classes, and the indices in each row's list, with `IGNORED` among words'."""
    for cell, place in zip(cells, places, strict=True):
        if not isinstance(cell, (list, tuple)):
            raise ValueError(f"{place}: the label {cell!r} is not a list, which {kind} needs")
    tags = kind == "token_classification"
    width = len(cells[0])
    vectors = all(len(cell) == width and all(v in (0, 1) for v in cell) for cell in cells)
    if not tags and vectors and any(cell.count(v) > 1 for cell in cells for v in (0, 1)):
        names = declared or tuple(map(str, range(width)))
        return names, [tuple(i for i, value in enumerate(cell) if value) for cell in cells]
    counted = [[v for v in cell if not (tags and v == IGNORED)] for cell in cells]
    items = [item for cell in counted for item in cell]
    where = [place for cell, place in zip(counted, places, strict=True) for _ in cell]
    _, values = _values("classification", items, where)
    names, flat = _classes(values, sum(map(len, counted[:n_train])), where, declared)
    each = iter(flat)
    rows = [tuple(IGNORED if tags and v == IGNORED else next(each) for v in cell) for cell in cells]
    return names, rows if tags else [tuple(sorted(set(row))) for row in rows]
