"""The order in which training takes its rows."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class Onward(Sampler[int]):
    """All rows at random, pass after pass, each pass in an order of its own, from row `start` of
    that sequence: so that a run can go on in it where another one ended.

    One iteration gives as many rows as there are; `set_epoch` says which.
    """

    def __init__(self, rows: int, seed: int, start: int) -> None:
        self.rows, self.seed, self.start, self.epoch = rows, seed, start, 0

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
        return torch.randperm(self.rows, generator=random).tolist()

    def set_epoch(self, epoch: int) -> None:
        """What the next iteration gives."""
        self.epoch = epoch
