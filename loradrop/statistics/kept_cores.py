"""The gradients by the cores of all adapters, batch by batch: what a cut is made up for with."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from loradrop.bank import AdapterBank
from loradrop.machine import is_distributed
from loradrop.ranks import reduced
from loradrop.scores import members_of

_ROWS, _ELEMENTS = 1024, 2**27  # at most, the latter of all rows: 512 MiB
_LEAST = 64  # rows, whatever they take: fewer say too little


class KeptCores:
    """The core of every adapter in every step (n, r, r), float32 on the CPU.

    Where there are more steps than `_ROWS`, or than the memory is for, but never less than
    `_LEAST`, each row becomes the sum of two, four, ... neighbours.
    """

    def __init__(self, bank: AdapterBank) -> None:
        self._firsts = [members[0] for members in members_of(bank.slots).values()]
        self._shapes = [(bank.targets[i].r,) * 2 for i in self._firsts]
        self._count = len(bank.targets)
        size = sum(r * r for r, _ in self._shapes)
        self._most = max(_LEAST, min(_ROWS, _ELEMENTS // max(size, 1)) // 2 * 2)
        self._rows: list[Tensor] = []  # (elements of all adapters,)
        self._each = 1  # steps in a row
        self._open = 0  # steps in the last one

    def add(self, cores: Sequence[Tensor | None]) -> None:
        """The step's cores, one for each adapter; None counts as zero."""
        flat = [
            torch.zeros(r * r) if core is None else core.flatten().to("cpu", torch.float32)
            for core, (r, _) in zip(cores, self._shapes, strict=True)
        ]
        row = torch.cat(flat) if flat else torch.zeros(0)
        if self._rows and self._open < self._each:
            self._rows[-1] = self._rows[-1] + row
            self._open += 1
            return
        if len(self._rows) == self._most:
            pairs = zip(self._rows[::2], self._rows[1::2], strict=True)
            self._rows = [one + other for one, other in pairs]
            self._each *= 2
        self._rows.append(row)
        self._open = 1

    def by_target(self) -> tuple[Tensor | None, ...]:
        """(n, r, r) at the first target of each adapter; the rows of all ranks together."""
        rows = torch.stack(self._rows) if self._rows else torch.zeros(0, 0)
        if is_distributed():
            rows = _stacked(rows)
        found: list[Tensor | None] = [None] * self._count
        sizes = [r * r for r, _ in self._shapes]
        parts = torch.split(rows, sizes, 1) if len(rows) else []
        for i, shape, part in zip(self._firsts, self._shapes, parts, strict=True):
            found[i] = part.reshape(-1, *shape)
        return tuple(found)


def _stacked(rows: Tensor) -> Tensor:
    """The rows (n, E) of all ranks one below another; a rank that has fewer adds rows of zeros."""
    most = reduced(torch.tensor(rows.shape), distributed.ReduceOp.MAX).tolist()
    whole = torch.zeros(distributed.get_world_size(), *most)
    whole[distributed.get_rank(), : len(rows), : rows.shape[1]] = rows
    return reduced(whole, distributed.ReduceOp.SUM).flatten(0, 1)
