"""LoRTA (Hounie et al., arXiv:2410.04060): the updates of all targets are one tensor, of a low rank
in the sense of the canonical polyadic decomposition, so all of them are made of five factors.

    ΔW_lm = [ A·diag(C_h[1] ∘ C_m[m] ∘ C_l[l])·B, …, A·diag(C_h[H] ∘ C_m[m] ∘ C_l[l])·B ]

for the projection m of layer l, with its H heads side by side. A (N, r), B (r, K/H), C_h (H, r),
C_m (M, r) and C_l (L, r) are common to all M projections of all L layers: only the rows C_m[m] and
C_l[l] tell targets apart. Together they cost r·(N + K/H + H + M + L) elements.

From the paper and its authors' code: the equation for square q, k, v and o of equal heads, where
M = 4; the heads along the input of every projection; A Kaiming-uniform with a = √5, B zero, the C
Kaiming-uniform with a = 0, each with the fan-in r; s = alpha/r. Ours: a tensor of its own for each
(K, N, r), so that any model has its groups, which is the paper's one tensor where all targets are
square and alike; M projections of any name instead of four; heads = 1 unless you say how many there
are, as a target does not know it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from loradrop.bank import AdapterBank, Pair
from loradrop.methods.base import Method
from loradrop.options import check_whole
from loradrop.scores import Target, layers_of


@dataclass(frozen=True, kw_only=True)
class LoRTA(Method):
    """The options of LoRTA.

    heads   attention heads of every target, which then has to be square; 1 adapts any shape

    Targets without a layer number count as one layer more. Raises ValueError naming the field, its
    value and the remedy.
    """

    name: ClassVar[str] = "lorta"
    rank_limited: ClassVar[bool] = False  # r is that of the tensor, not of a target's matrix

    heads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("heads", self.heads, 1)

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """A `LoRTABank`. Raises ValueError for a target that the heads do not fit."""
        for target in targets if self.heads > 1 else ():
            K, N = target.in_features, target.out_features
            what = f"heads={self.heads} for {target.name} ({K} -> {N})"
            if K != N:
                raise ValueError(
                    f"{what}: heads are of square projections. Leave it out with exclude_modules, "
                    "or choose heads=1"
                )
            if K % self.heads:
                raise ValueError(
                    f"{what}: {K} is not divisible by it. Choose the number of attention heads of "
                    "the model, or heads=1"
                )
        return LoRTABank(targets, scaling, likes, self.heads)


class LoRTABank(AdapterBank):
    """For group g of targets with equal (K, N, r) the five factors A[g] (N, r), B[g] (r, K/H),
    C_h[g] (H, r), C_m[g] (M, r), C_l[g] (L, r), by the paper's names.

    places   the group of each target, its row of C_m and its row of C_l
    """

    def __init__(
        self,
        targets: Sequence[Target],
        scaling: Sequence[float],
        likes: Sequence[Tensor],
        heads: int,
    ) -> None:
        super().__init__(targets, scaling)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.C_h, self.C_m, self.C_l = (nn.ParameterList() for _ in range(3))
        groups: dict[tuple[int, int, int], list[int]] = {}
        for i, target in enumerate(targets):
            groups.setdefault(target[2:], []).append(i)
        self.places = [(0, 0, 0)] * len(targets)
        of_target = layers_of([target.name for target in targets])
        for g, ((K, N, r), members) in enumerate(groups.items()):
            like = likes[members[0]]
            layers: dict[str, int] = {}
            modules: dict[str, int] = {}
            for i in members:
                layer = of_target[i]
                m = modules.setdefault(targets[i].name[len(layer) :], len(modules))
                self.places[i] = (g, m, layers.setdefault(layer, len(layers)))
            self.A.append(nn.init.kaiming_uniform_(like.new_empty(N, r), a=math.sqrt(5)))
            self.B.append(like.new_zeros(r, K // heads))
            for factor, rows in (
                (self.C_h, heads), (self.C_m, len(modules)), (self.C_l, len(layers)),
            ):  # fmt: skip
                factor.append(nn.init.kaiming_uniform_(like.new_empty(rows, r)))

    def factors(self, i: int) -> Pair:
        """A (r, K), copies of the paper's B that are weighed by the C, and B (N, r), its A."""
        g, m, layer = self.places[i]
        weights = self.C_h[g] * (self.C_m[g][m] * self.C_l[g][layer])  # (H, r)
        A = weights.T.unsqueeze(2) * self.B[g].unsqueeze(1)  # (r, H, K/H)
        return A.flatten(1), self.A[g]
