"""Random draws that keep the proportions of the classes."""

import math
import operator
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.data import Subset


def stratified_indices(
    labels: Sequence[int] | None, n: int, ratio_or_count: float | int, seed: int
) -> list[int]:
    """A random draw from range(n), sorted, with each class's share by largest remainder.

    A float is a ratio (the count is rounded half up, at least 1), an int a count. Remainders tie by
    class order; without `labels` the draw is plain. Raises ValueError for a size outside 1..n.
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
    if labels is None:
        labels = [0] * n
    if len(labels) != n:
        raise ValueError(f"{len(labels)} labels for {n} rows: give one label per row")
    sizes = sorted(Counter(labels).items())
    quota = {label: count * size // n for label, size in sizes}
    by_remainder = sorted(sizes, key=lambda item: -(count * item[1] % n))
    for label, _ in by_remainder[: count - sum(quota.values())]:
        quota[label] += 1
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(n)]
    chosen = []
    for index in sorted(range(n), key=keys.__getitem__):
        if quota[labels[index]]:
            quota[labels[index]] -= 1
            chosen.append(index)
    return sorted(chosen)


_LABELS = frozenset({"label", "labels", "label_ids"})


def some_of(
    rows: Any, count: int, seed: int, columns: Collection[str] | None = None
) -> "Subset[Any]":
    """At most so many rows, whatever their class, of which equal ones are taken once: they would
    tell one thing several times, and leaving one out would leave nothing out.

    columns   those that a model takes of a row; None: all. Labels make no row another one

    Only the rows that are drawn are read. Where they cannot be compared all are taken.
    """
    from torch.utils.data import Subset

    n = len(rows)
    drawn = stratified_indices(None, n, min(count, n), seed)
    first: dict[bytes, int] = {}
    try:
        for index in drawn:
            first.setdefault(_digest(rows[index], columns), index)
    except TypeError:
        return Subset(rows, drawn)
    return Subset(rows, [*first.values()])


def _digest(row: Any, columns: Collection[str] | None) -> bytes:
    """The same for equal inputs. Raises TypeError for what has no values to compare."""
    if isinstance(row, Mapping):
        taken = set(row) if columns is None else set(row) & set(columns)
        row = {name: row[name] for name in taken - _LABELS}
    return blake2b(repr(_plain(row)).encode()).digest()


def _plain(value: Any) -> Any:
    """Of equal values the same text."""
    if isinstance(value, Mapping):
        return [(key, _plain(value[key])) for key in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()  # no bfloat16
    if hasattr(value, "tobytes") and hasattr(value, "dtype") and not value.dtype.hasobject:
        return value.shape, str(value.dtype), blake2b(value.tobytes()).hexdigest()
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be compared")


def sample_of(train: Any, ratio: float, seed: int) -> "Subset[Any]":
    """A part of the data set, drawn by class where its rows have whole numbers as labels."""
    from torch.utils.data import DataLoader, Subset

    if isinstance(train, DataLoader):
        raise ValueError(
            f"sample_ratio={ratio} needs a dataset to draw from, not a DataLoader: pass its "
            "dataset, or sample_ratio=1"
        )
    first, labels = train[0], None
    key = next((k for k in ("labels", "label") if k in first and _is_class(first[k])), None)
    if key is not None:
        at_once = key in getattr(train, "column_names", ())  # a Dataset of `datasets`
        column = train[key] if at_once else (train[i][key] for i in range(len(train)))
        labels = [int(label) for label in column]
    return Subset(train, stratified_indices(labels, len(train), ratio, seed))


def _is_class(label: Any) -> bool:
    try:
        operator.index(label)
    except TypeError:
        return False
    return True
