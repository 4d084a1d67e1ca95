"""Tied-LoRA (Renduchintala et al., NAACL 2024, arXiv:2311.09578): A and B tied over the targets of
a module type, and two vectors of its own for each target.

    ΔW_i = s · diag(v_i) · B · diag(u_i) · A

A (r, K) and B (N, r) are stored once for each type; u_i (r,) and v_i (N,) tell its targets apart.
So n targets cost r·(K + N) + n·(r + N) elements. From the paper: the tying and the two vectors, and
that it compares which of the four parts train. Our reading: where in the equation the vectors
stand. Ours: the start, the default that all four train, s as LoRA's, and that targets are tied
where their shapes and ranks are equal too.

With A and B frozen this is VeRA on one random pair for each type.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from loradrop.bank import AdapterBank, Pair
from loradrop.methods.base import Method
from loradrop.options import check_start
from loradrop.scores import Target, group_numbers

PARTS = "ABuv"


@dataclass(frozen=True, kw_only=True)
class TiedLoRA(Method):
    """The options of Tied-LoRA; the rank, alpha and dropout are fields of `LoRAConfig`.

    trained     which parts train, some letters of "ABuv"; the others are frozen
    u_initial   every element of u at the start

    The model is unchanged at the start, since the first trained part of B, v, u, A begins at zero.
    The others begin with A and B Kaiming-uniform, u at `u_initial` and v at one. Raises ValueError
    naming the field, its value and the remedy.
    """

    name: ClassVar[str] = "tied_lora"

    trained: str = PARTS
    u_initial: float = 1.0

    def __post_init__(self) -> None:
        parts = self.trained
        known = isinstance(parts, str) and set(parts) <= set(PARTS)
        if not known or not parts or len(set(parts)) < len(parts):
            raise ValueError(
                f"trained={parts!r}: choose letters of {PARTS!r}, each once, such as 'ABuv' or 'uv'"
            )
        super().__post_init__()
        check_start("u_initial", self.u_initial)

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """A `TiedLoRABank`."""
        return TiedLoRABank(targets, scaling, likes, self.trained, self.u_initial)


class TiedLoRABank(AdapterBank):
    """A_g (r, K) and B_g (N, r) of group g, u_i (r,) and v_i (N,) of target i.

    Each is a parameter where it trains, else a buffer. `groups` has the g of each target.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        scaling: Sequence[float],
        likes: Sequence[Tensor],
        trained: str,
        u_initial: float,
    ) -> None:
        super().__init__(targets, scaling)
        self.groups = group_numbers(targets)
        zero = next(part for part in "BvuA" if part in trained)
        pairs = 0
        for i, (target, like) in enumerate(zip(targets, likes, strict=True)):
            _, _, k, n, r = target
            if self.groups[i] == pairs:
                pairs += 1
                A, B = like.new_empty(r, k), like.new_empty(n, r)
                for matrix in (A, B):
                    nn.init.kaiming_uniform_(matrix, a=5**0.5)
                self._own("A", self.groups[i], A, trained, zero)
                self._own("B", self.groups[i], B, trained, zero)
            self._own("u", i, like.new_full((r,), u_initial), trained, zero)
            self._own("v", i, like.new_ones(n), trained, zero)

    def _own(self, part: str, number: int, start: Tensor, trained: str, zero: str) -> None:
        start = torch.zeros_like(start) if part == zero else start
        if part in trained:
            self.register_parameter(f"{part}_{number}", nn.Parameter(start))
        else:
            self.register_buffer(f"{part}_{number}", start)

    def factors(self, i: int) -> Pair:
        """(A (r, K), diag(v_i)·B·diag(u_i) (N, r)): A is no copy where it is there."""
        g = self.groups[i]
        A, B, u, v = (getattr(self, name) for name in (f"A_{g}", f"B_{g}", f"u_{i}", f"v_{i}"))
        return A.to(v.device), v.unsqueeze(1) * B.to(v.device) * u
