"""The Gram matrices of a run, summed over its steps: what a collector keeps for the spectrum."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from loradrop.bank import AdapterBank
from loradrop.ranks import is_distributed, reduced, whole
from loradrop.scores import Grams


class GramSums:
    """Σ over the steps of the Gram matrices of every target of `bank`, in units of one sample.

    A step's u is of the mean loss of its n samples, times the scale of a loss scaler: its Gram
    matrix counts n² / scale² times, as that of the sum of their losses.
    """

    def __init__(self, bank: AdapterBank) -> None:
        self.bank, count = bank, len(bank.targets)
        self._sums: dict[str, list[Tensor | None]] = {
            "gram_in": [None] * count, "gram_out": [None] * count,
        }  # fmt: skip
        self._rows: list[Tensor] = [torch.zeros((), dtype=torch.float64)] * count
        self._samples = torch.zeros((), dtype=torch.float64)

    def count(self, i: int, x: Tensor, weights: Tensor | None) -> None:
        """The rows of x (..., K), the input of target i, with these weights."""
        rows = x.shape[:-1].numel() if weights is None else weights.sum(dtype=torch.float64)
        self._rows[i] = self._rows[i].to(x.device) + rows

    def add(
        self, closed: Mapping[str, Sequence[Tensor | None]], samples: Tensor, loss_scale: float
    ) -> None:
        """What one step collected. Steps whose gradients overflowed count for `inputs` alone."""
        self._samples = self._samples.to(samples.device) + samples
        for name, sums in self._sums.items():
            for i, value in enumerate(closed.get(name, ())):
                if value is None:
                    continue
                if name == "gram_out":
                    unit = (samples.to(value.device) / loss_scale).square()
                    value = torch.where(value.isfinite().all(), value * unit, 0.0)
                before = sums[i]
                sums[i] = value.clone() if before is None else before + value

    def state_dict(self) -> dict[str, Tensor]:
        """Everything so far, summed over ranks."""
        sums, rows, samples = self._total()
        state = {
            f"{name}.{i}": value
            for name, values in sums.items()
            for i, value in enumerate(values)
            if value is not None
        }
        return state | {"target_rows": rows, "samples": samples}

    def load_state_dict(self, state: Mapping[str, Tensor], first: bool) -> None:
        """Go on from what `state_dict` gave; the sums count on the first rank alone."""
        unit = float(first)
        for name, sums in self._sums.items():
            for i in range(len(sums)):
                value = state.get(f"{name}.{i}")
                sums[i] = None if value is None else value.to(self.bank.device) * unit
        self._rows = list(state["target_rows"] * unit)
        self._samples = state["samples"] * unit

    def grams(self) -> Grams:
        """What `spectrum` needs, with the factors as they are now."""
        sums, rows, samples = self._total()
        return grams_of(
            self.bank, sums["gram_in"], sums["gram_out"], rows.tolist(), float(samples)
        )

    def _total(self) -> tuple[dict[str, list[Tensor | None]], Tensor, Tensor]:
        """The sums, rows and samples of all ranks, on the CPU."""
        sums = {
            name: [None if value is None else value.cpu().clone() for value in values]
            for name, values in self._sums.items()
        }
        rows = torch.stack([row.cpu() for row in self._rows])
        samples = self._samples.cpu().clone()
        if not is_distributed():
            return sums, rows, samples
        total = distributed.ReduceOp.SUM
        for values in sums.values():
            for i, target in enumerate(self.bank.targets):
                here = values[i]
                zero = torch.zeros(target.r, target.r, dtype=torch.float64)
                there = reduced(zero if here is None else here, total)
                values[i] = there if here is not None or bool(there.any()) else None
        return sums, reduced(rows, total), reduced(samples, total)


def grams_of(
    bank: AdapterBank,
    inputs: Sequence[Tensor | None] | None = None,
    outputs: Sequence[Tensor | None] | None = None,
    rows: Sequence[float] | None = None,
    samples: float = 0.0,
) -> Grams:
    """`Grams` with those of the factors as they are now; the weights alone where nothing is given.

    Every rank calls it where FSDP2 shards the adapters.
    """
    count = len(bank.targets)
    none: Sequence[Any] = [None] * count
    of_A: list[Tensor | None] = []
    of_B: list[Tensor | None] = []
    for i in range(count):
        pair = bank.factors(i)
        A, B = (None, None) if pair is None else (whole(f.detach()).cpu().double() for f in pair)
        of_A.append(None if A is None else A @ A.T)
        of_B.append(None if B is None else B.T @ B)
    return Grams(
        scaling=bank.scaling, slots=bank.slots, A=tuple(of_A), B=tuple(of_B),
        inputs=tuple(inputs or none), outputs=tuple(outputs or none),
        rows=tuple(rows or [0.0] * count), samples=samples,
    )  # fmt: skip


def samples_of(given: Mapping[str, Any]) -> Tensor | int:
    """How many losses a model with these inputs takes the mean of: its labels that count, else the
    length of the batch.
    """
    labels = given.get("labels")
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim:
        return (labels != -100).sum()
    first = next((v for v in given.values() if isinstance(v, Tensor) and v.ndim), None)
    return 1 if first is None else len(first)
