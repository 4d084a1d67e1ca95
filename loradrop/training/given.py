"""What `fit` was given: each of its arguments is looked at before anything begins."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from loradrop.wrapped import inner


def require_model(model: Any) -> None:
    """Raises TypeError for what is no model, ValueError for one inside of another, as DDP."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model={model!r} is a {type(model).__name__}: give the model itself, as "
            "AutoModelForSequenceClassification.from_pretrained returns it"
        )
    if inner(model) is not model:
        raise ValueError(
            f"model is a {type(model).__name__}: give fit the model inside. It compiles "
            'with train.extra={"torch_compile": True}, and runs DDP under torchrun'
        )


def require_train(train: Any) -> None:
    """Raises TypeError for a path, ValueError for what has no rows, no length, or no numbers."""
    if isinstance(train, (str, Path)):
        raise TypeError(
            f"train={str(train)!r} is a path: give the rows, as of datasets.load_dataset, "
            "or leave all of that to the command (loradrop train data=...)"
        )
    if isinstance(train, Mapping):
        raise ValueError(
            f"train is a {type(train).__name__} of {', '.join(map(str, train))}: "
            "give one of them, as train['train']"
        )
    try:
        count = len(train)
    except TypeError as error:
        kind = type(getattr(train, "dataset", train)).__name__
        what = f"train is a {kind} without a length: give a sized Dataset or a list"
        raise ValueError(what) from error
    if count == 0:
        raise ValueError("train is empty: give at least one example")
    _require_numbers(train)


def _require_numbers(rows: Any) -> None:
    """Raises ValueError for rows that have no numbers, and for labels that are text, by the first
    row.
    """
    try:
        row = {} if isinstance(rows, DataLoader) else rows[0]
    except (KeyError, NotImplementedError, TypeError) as error:
        what = f"train is a {type(rows).__name__}, whose first row is not train[0]"
        raise ValueError(
            f"{what} ({type(error).__name__}: {error}): give a Dataset with __getitem__, a list of "
            "its rows, or a DataLoader of it"
        ) from error
    for name in ("label", "labels"):
        if isinstance(row, Mapping) and isinstance(row.get(name), str):
            raise ValueError(
                f"the column {name!r} holds text ({row[name]!r}): give class indices, as "
                "datasets' class_encode_column makes them"
            )


def require_dev(dev: Any) -> None:
    """Raises ValueError where it, or one of several, is empty."""
    parts = dev if isinstance(dev, Mapping) else {"dev": dev}
    for name, rows in parts.items():
        if hasattr(rows, "__len__") and len(rows) == 0:
            raise ValueError(f"{name} is empty: give rows to measure on, or dev=None")


def require_others(callbacks: Sequence[Any], own: tuple[type, ...]) -> None:
    """Raises ValueError for a callback of those that `fit` has itself."""
    for callback in callbacks:
        of = callback if isinstance(callback, type) else type(callback)
        if issubclass(of, own):
            raise ValueError(f"callbacks has a {of.__name__}, which fit has itself: drop it")
