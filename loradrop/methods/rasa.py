"""RaSA (He et al., ICLR 2025, arXiv:2503.12576): each target gives a few of its ranks to a pool
that all targets of its module type use.

    ΔW_i = [B_i  B_S] · diag(d_i) · [A_i ; A_S]

A_i (r − k, K) and B_i (N, r − k) are the target's own, A_S (L·k, K) and B_S (N, L·k) those of the
pool of its L targets. So the rank is r − k + L·k, at the cost of LoRA of rank r and the vectors d.
At the start d is α/2(r − k) for the own ranks and α/(2·L·k) for the pool's, there is no other
scale, every A is Kaiming-uniform, every B zero. All of this, and k = max(r/8, 1), is the paper's or
its code's. Ours: the pool is of the targets of one type, shape and rank; α is r times LoRA's s,
which is how rank-stabilised scaling comes in; a type whose rank is 1 shares nothing by default; and
where k is 0 the target is plain LoRA, with its s and without d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from loradrop.bank import AdapterBank, Pair
from loradrop.methods.base import Method
from loradrop.options import check_whole
from loradrop.pairs import fresh
from loradrop.scores import Target, group_numbers, members_of


@dataclass(frozen=True, kw_only=True)
class RaSA(Method):
    """The option of RaSA; the rank, alpha and dropout are fields of `LoRAConfig`.

    k   ranks that each target gives to the pool, fewer than its own; None is an eighth of its rank,
        and at least 1

    Raises ValueError naming the field, its value and the remedy.
    """

    name: ClassVar[str] = "rasa"
    composed_by: ClassVar[tuple[str, ...]] = ("k",)

    k: int | None = None

    def __post_init__(self) -> None:
        check_whole("k", self.k, 0, or_none=True)
        super().__post_init__()

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """A `RaSABank`. Raises ValueError where a pool would be wider than a target."""
        ks = [self._given(target) for target in targets]
        for members in members_of(group_numbers(targets)).values():
            first, k = targets[members[0]], ks[members[0]]
            rank, most = first.r + (len(members) - 1) * k, min(first[2:4])
            if k and rank > most:
                raise ValueError(
                    f"k={k} of r={first.r} for {first.name}: with the pool of its {len(members)} "
                    f"targets its rank is {rank}, and beyond {most} ranks add nothing. Choose a "
                    "smaller k (lora.method.k) or r; k=0 is plain LoRA"
                )
        return RaSABank(targets, scaling, likes, ks)

    def _given(self, target: Target) -> int:
        """The ranks that the target gives to its pool."""
        if self.k is None:
            return min(max(target.r // 8, 1), target.r - 1)
        if self.k >= target.r:
            raise ValueError(
                f"k={self.k} for {target.name} of rank {target.r}: choose k below the rank, or None"
            )
        return self.k


class RaSABank(AdapterBank):
    """A[i] (r − k, K), B[i] (N, r − k) and d_i (r',) of target i, A_pool_g (L·k, K) and B_pool_g
    (N, L·k) of group g, with r' = r − k + L·k.

    pools   the g of each target, None where k is 0: it has neither d nor a pool
    """

    def __init__(
        self,
        targets: Sequence[Target],
        scaling: Sequence[float],
        likes: Sequence[Tensor],
        ks: Sequence[int],
    ) -> None:
        groups = group_numbers(targets)
        pooled = [groups.count(g) * k for g, k in zip(groups, ks, strict=True)]
        own = [t._replace(r=t.r - k) for t, k in zip(targets, ks, strict=True)]
        super().__init__(
            [t._replace(r=t.r + pool) for t, pool in zip(own, pooled, strict=True)],
            [1.0 if k else s for s, k in zip(scaling, ks, strict=True)],
        )
        self.pools = [g if k else None for g, k in zip(groups, ks, strict=True)]
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for i, (g, like) in enumerate(zip(self.pools, likes, strict=True)):
            A, B = fresh(own[i], like)
            self.A.append(A)
            self.B.append(B)
            if g is None:
                continue
            if groups.index(g) == i:
                A, B = fresh(own[i]._replace(r=pooled[i]), like)
                self.register_parameter(f"A_pool_{g}", A)
                self.register_parameter(f"B_pool_{g}", B)
            alpha, r = scaling[i] * targets[i].r, own[i].r
            parts = [like.new_full((n,), 0.5 * alpha / n) for n in (r, pooled[i])]
            d = torch.cat(parts)
            self.register_parameter(f"d_{i}", nn.Parameter(d))

    def factors(self, i: int) -> Pair:
        """(diag(d_i)·[A_i ; A_S] (r', K), [B_i  B_S] (N, r'))."""
        A, B, g = self.A[i], self.B[i], self.pools[i]
        if g is None:
            return A, B
        names = f"A_pool_{g}", f"B_pool_{g}", f"d_{i}"
        A_pool, B_pool, d = (getattr(self, name).to(A.device) for name in names)
        A = d.unsqueeze(1) * torch.cat((A, A_pool))  # (r', 1) · (r', K)
        return A, torch.cat((B, B_pool), 1)
