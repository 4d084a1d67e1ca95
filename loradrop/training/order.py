"""The order in which training takes its rows."""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator
from torch.utils.data import Sampler

_POOL = 50  # batches that are made together, at most


class Onward(Sampler[int]):
    """All rows at random, pass after pass, each pass in an order of its own, from row `start` of
    that sequence: so that a run can go on in it where another one ended.

    One iteration gives as many rows as there are; `set_epoch` says which. With the `lengths` of the
    rows, each `batch` rows of a pass are of like length, and next to nothing is padded.
    """

    def __init__(
        self, rows: int, seed: int, start: int, lengths: Sequence[int] = (), batch: int = 1
    ) -> None:
        self.rows, self.seed, self.start, self.epoch = rows, seed, start, 0
        self.lengths, self.batch = lengths, batch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        first = self.start + self.epoch * self.rows
        done, skip = divmod(first, self.rows)
        yield from self._order(done)[skip:]
        yield from self._order(done + 1)[:skip]
        self.epoch += 1

    def _order(self, number: int) -> list[int]:
        """The rows of one pass."""
        random = torch.Generator().manual_seed(self.seed + number)
        order: list[int] = torch.randperm(self.rows, generator=random).tolist()
        return alike(order, self.lengths, self.batch, random) if self.lengths else order

    def set_epoch(self, epoch: int) -> None:
        """What the next iteration gives."""
        self.epoch = epoch


def alike(order: list[int], lengths: Sequence[int], batch: int, random: Generator) -> list[int]:
    """The rows of `order` in batches of like length: sorted within pools of some batches, which
    then come in a random order. A last one that is not full stays the last.
    """
    pools = max(4, len(order) / (_POOL * batch))  # at least four: every pass has other batches
    pool = batch * max(1, int(len(order) / (pools * batch)))
    batches = []
    for first in range(0, len(order), pool):
        rows = sorted(order[first : first + pool], key=lengths.__getitem__)
        batches += [rows[i : i + batch] for i in range(0, len(rows), batch)]
    full = len(order) // batch
    chosen = [*torch.randperm(full, generator=random).tolist(), *range(full, len(batches))]
    return [row for i in chosen for row in batches[i]]
