"""Random draws that keep the proportions of the classes."""

import math
import operator
import random
from collections import Counter
from collections.abc import Sequence
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


def some_of(rows: Any, count: int, seed: int) -> "Subset[Any]":
    """At most so many rows, whatever their class: no row is read for it."""
    from torch.utils.data import Subset

    n = len(rows)
    return Subset(rows, stratified_indices(None, n, min(count, n), seed))


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
