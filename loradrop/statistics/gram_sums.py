"""What a run says of directions, summed over its steps: what a collector keeps for `spectrum`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed

from loradrop.bank import AdapterBank
from loradrop.machine import is_distributed
from loradrop.ranks import full_tensor, reduced
from loradrop.scores import Grams, members_of
from loradrop.statistics.kept_cores import KeptCores

_KINDS = ("inputs", "left", "right")


class GramSums:
    """The matrices of `Grams` that passes give, for every target of `bank`.

    keep   also the core of each step; when there are too many, two neighbours become one
    """

    def __init__(self, bank: AdapterBank, keep: bool = False) -> None:
        self.bank = bank
        self.kept = KeptCores(bank) if keep else None
        self._sums: dict[str, list[Tensor | None]] = {n: [None] * len(bank.targets) for n in _KINDS}
        self._samples = torch.zeros((), dtype=torch.float64)

    def add(
        self, closed: Mapping[str, Sequence[Tensor | None]], samples: Tensor, times: float
    ) -> None:
        """What one step collected: "gram_in", and "core" for `times` the mean loss of the samples.
        In training a step whose gradients overflowed is left out, as the loss scaler leaves it out.
        """
        for i, gram in enumerate(closed.get("gram_in", ())):
            self._count("inputs", i, gram)
        cores = self._by_adapter(closed.get("core", [None] * len(self.bank.targets)))
        counts = torch.ones((), dtype=torch.bool, device=samples.device)
        if self.kept is None:
            for core in cores.values():
                counts = counts & core.isfinite().all().to(counts.device)
        zero = torch.zeros_like(samples)
        self._samples = self._samples.to(samples.device) + torch.where(counts, samples, zero)
        of_sums: dict[int, Tensor] = {}
        for first, core in cores.items():
            scaled = core * (samples.to(core.device) / times)
            of_sums[first] = of_sum = torch.where(counts.to(core.device), scaled, 0.0)
            self._count("left", first, of_sum @ of_sum.T)
            self._count("right", first, of_sum.T @ of_sum)
        if self.kept is not None:
            every = members_of(self.bank.slots).values()
            self.kept.add([of_sums.get(members[0]) for members in every])

    def _by_adapter(self, cores: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """The first member of an adapter -> Σ s·core over all of them that have one."""
        found: dict[int, Tensor] = {}
        for first, *others in members_of(self.bank.slots).values():
            for i in (first, *others):
                if (core := cores[i]) is not None:
                    before, one = found.get(first), self.bank.scaling[i] * core
                    found[first] = one if before is None else before + one.to(before.device)
        return found

    def _count(self, kind: str, i: int, value: Tensor | None) -> None:
        if value is not None:
            before = self._sums[kind][i]
            self._sums[kind][i] = value.clone() if before is None else before + value

    def state_dict(self) -> dict[str, Tensor]:
        """Everything so far, summed over ranks."""
        sums, samples = self._total()
        state = {
            f"{kind}.{i}": value
            for kind, values in sums.items()
            for i, value in enumerate(values)
            if value is not None
        }
        return state | {"samples": samples}

    def load_state_dict(self, state: Mapping[str, Tensor], first: bool) -> None:
        """Go on from what `state_dict` gave; the sums count on the first rank alone."""
        unit = float(first)
        for kind, sums in self._sums.items():
            for i in range(len(sums)):
                value = state.get(f"{kind}.{i}")
                sums[i] = None if value is None else value.to(self.bank.device) * unit
        self._samples = state["samples"] * unit

    def grams(self) -> Grams:
        """What `spectrum` needs, with the factors as they are now."""
        sums, samples = self._total()
        found = grams_of(self.bank, sums, float(samples))
        return found if self.kept is None else replace(found, cores=self.kept.by_target())

    def _total(self) -> tuple[dict[str, list[Tensor | None]], Tensor]:
        """The sums and samples of all ranks, on the CPU."""
        sums = {
            kind: [None if value is None else value.cpu().clone() for value in values]
            for kind, values in self._sums.items()
        }
        samples = self._samples.cpu().clone()
        if not is_distributed():
            return sums, samples
        total = distributed.ReduceOp.SUM
        for values in sums.values():
            for i, target in enumerate(self.bank.targets):
                here = values[i]
                zero = torch.zeros(target.r, target.r, dtype=torch.float64)
                there = reduced(zero if here is None else here, total)
                values[i] = there if here is not None or bool(there.any()) else None
        return sums, reduced(samples, total)


def grams_of(
    bank: AdapterBank,
    sums: Mapping[str, Sequence[Tensor | None]] | None = None,
    samples: float = 0.0,
) -> Grams:
    """`Grams` of the factors as they are now; the weights alone where no `sums` are given.

    Every rank calls it where FSDP2 shards the adapters.
    """
    of_A: list[Tensor | None] = []
    of_B: list[Tensor | None] = []
    for i in range(len(bank.targets)):
        pair = bank.factors(i)
        wide = [full_tensor(factor.detach()).cpu().double() for factor in pair or ()]
        A, B = wide or (None, None)
        of_A.append(None if A is None else A @ A.T)
        of_B.append(None if B is None else B.T @ B)
    none: list[Any] = [None] * len(bank.targets)
    inputs, left, right = (tuple((sums or {}).get(kind, none)) for kind in _KINDS)
    return Grams(
        scaling=bank.scaling, slots=bank.slots, A=tuple(of_A), B=tuple(of_B),
        inputs=inputs, left=left, right=right, samples=samples,
    )  # fmt: skip
