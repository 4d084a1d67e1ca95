"""PRoLoRA (Wang et al., ACL 2024, arXiv:2402.16902): the columns of A are copies of one narrow
chunk, the rows of B copies of one short chunk, and every copy has its ranks rotated.

    A = [ P⁰·A_c, P^s_A·A_c, …, P^((m−1)·s_A)·A_c ] ; A_u       s_A = max(⌊(r − u)/m⌋, 1)
    B = [ B_c; B_c·P^−s_B; …; B_c·P^−((n−1)·s_B) ], B_u         s_B = max(⌊(r − u)/n⌋, 1)

P rotates ranks: row ρ of copy c is row (ρ + c·s_A) mod (r − u) of the chunk A_c (r − u, ⌈K/m⌉), and
the columns of B_c (⌈N/n⌉, r − u) turn alike. What is too much is cut off. The other u ranks,
A_u (u, K) and B_u (N, u), are not shared. So a target costs u·(K + N) + (r − u)·(⌈K/m⌉ + ⌈N/n⌉)
elements.

From the paper and its authors' code: all of that, and the rectified start, which draws A_c and A_u
as LoRA draws the whole of A, by the fan-in K, while B_c and B_u are zero. Ours, because we found no
defaults there: m = n = 4 where there is room, and a quarter of the ranks for u.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from loradrop.bank import AdapterBank, Pair
from loradrop.methods.base import Method
from loradrop.options import check_whole
from loradrop.scores import Target


@dataclass(frozen=True, kw_only=True)
class PRoLoRA(Method):
    """The options of PRoLoRA. With m = n = 1 it is LoRA.

    m   copies of the chunk of A, side by side along its columns
    n   copies of the chunk of B, one below the other along its rows; None of either is four, or as
        many as a target has features
    u   ranks that are not shared; None is a quarter of a target's rank, rounded down

    Raises ValueError naming the field, its value and the remedy.
    """

    name: ClassVar[str] = "prolora"
    composed_by: ClassVar[tuple[str, ...]] = ("m", "n", "u")

    m: int | None = None
    n: int | None = None
    u: int | None = None

    def __post_init__(self) -> None:
        for name, count, least in (("m", self.m, 1), ("n", self.n, 1), ("u", self.u, 0)):
            check_whole(name, count, least, or_none=True)
        super().__post_init__()

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """A `PRoLoRABank`. Raises ValueError for a target that is too narrow for the copies."""
        for target in targets:
            what = f"for {target.name} ({target.in_features} -> {target.out_features})"
            sides = (("m", self.m, target.in_features), ("n", self.n, target.out_features))
            for name, count, width in sides:
                if count is not None and count > width:
                    raise ValueError(
                        f"{name}={count} {what}: there are only {width} features to copy a chunk "
                        f"along. Choose {name} <= {width}, or leave it out with exclude_modules"
                    )
            if self.unshared(target) >= target.r:
                raise ValueError(
                    f"u={self.u} {what} of rank {target.r}: no rank is left to share. Choose "
                    f"u < {target.r} or a larger rank; LoRA() shares none"
                )
        return PRoLoRABank(targets, scaling, likes, self)

    def copies(self, target: Target) -> tuple[int, int]:
        """The m and n of this target."""
        K, N = target.in_features, target.out_features
        return self.m or min(4, K), self.n or min(4, N)

    def unshared(self, target: Target) -> int:
        """The u of this target."""
        return target.r // 4 if self.u is None else self.u


class PRoLoRABank(AdapterBank):
    """Target i has the chunks A[i] (r − u, ⌈K/m⌉) and B[i] (⌈N/n⌉, r − u); where u is not 0, it is
    number `own[i]` of those that also have own_A (u, K) and own_B (N, u).
    """

    def __init__(
        self,
        targets: Sequence[Target],
        scaling: Sequence[float],
        likes: Sequence[Tensor],
        method: PRoLoRA,
    ) -> None:
        super().__init__(targets, scaling)
        self.copies = [method.copies(target) for target in targets]
        self.own: dict[int, int] = {}
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.own_A, self.own_B = nn.ParameterList(), nn.ParameterList()
        for i, (target, like) in enumerate(zip(targets, likes, strict=True)):
            K, N, u = target.in_features, target.out_features, method.unshared(target)
            shared, (m, n) = target.r - u, self.copies[i]
            self.A.append(_drawn(like, shared, -(-K // m), K))
            self.B.append(like.new_zeros(-(-N // n), shared))
            if u:
                self.own[i] = len(self.own)
                self.own_A.append(_drawn(like, u, K, K))
                self.own_B.append(like.new_zeros(N, u))

    def factors(self, i: int) -> Pair:
        """A (r, K) and B (N, r) from rotated copies of the chunks, and the unshared ranks."""
        target, (m, n) = self.targets[i], self.copies[i]
        A = _copies(self.A[i], m, 1)[:, : target.in_features]  # (r − u, K)
        B = _copies(self.B[i], n, 0)[: target.out_features]  # (N, r − u)
        if (own := self.own.get(i)) is not None:
            A = torch.cat((A, self.own_A[own]), 0)  # (r, K)
            B = torch.cat((B, self.own_B[own]), 1)  # (N, r)
        return A, B


def _drawn(like: Tensor, rows: int, columns: int, fan_in: int) -> Tensor:
    """LoRA's Kaiming-uniform start with the fan-in of the whole A: within ± 1/√fan_in."""
    return nn.init.uniform_(like.new_empty(rows, columns), -(fan_in**-0.5), fan_in**-0.5)


def _copies(chunk: Tensor, count: int, along: int) -> Tensor:
    """Copies in a row along one dimension, each rotated one stride further along the ranks."""
    ranks = 1 - along
    stride = max(chunk.shape[ranks] // count, 1)
    return torch.cat([chunk.roll(-c * stride, ranks) for c in range(count)], along)
