"""Random draws that keep the proportions of the classes."""

import math
import random
from collections import Counter
from collections.abc import Sequence


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
