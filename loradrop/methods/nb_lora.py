"""NB-LoRA (Wang, Dvijotham & Manchester, arXiv:2501.19050): a bound on every singular value of ΔW,
whatever the parameters are.

    ΔW = 2·B·diag(s)·A       with [A, Bᵀ] (r, K + N) of orthonormal rows

The two come from free parameters Ã (r, K) and B̃ (N, r) by a Cayley map. With X the first r columns
of Ã, transposed, and Y the other columns, transposed, above B̃,

    Z = X − Xᵀ + YᵀY,   [A, Bᵀ]ᵀ = [ (I − Z)(I + Z)⁻¹ ; −2·Y(I + Z)⁻¹ ]

and then σ_j(ΔW) ≤ s_j, for s from the largest to the smallest. An adapter costs r·(K + N) elements,
as LoRA's does. The inverse is taken in float32 at least, and always exists: the symmetric part of
I + Z is at least I.

From the paper: that s bounds ΔW, in any norm that its singular values decide, and that every matrix
within the bound can be reached. Our reading: the equation and its Cayley map, and the bound of each
singular value, which our tests hold. Ours, because we could not read them there: s = 1, and the
start, which draws Ã as LoRA draws A and has B̃ zero. As r is at most K, B̃ lies wholly in Y, so B
and ΔW are zero then.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from loradrop.bank import AdapterBank, Pair
from loradrop.methods.base import Method
from loradrop.pairs import fresh
from loradrop.scores import Target


@dataclass(frozen=True, kw_only=True)
class NBLoRA(Method):
    """The options of NB-LoRA.

    s   the bound of all singular values of ΔW, or r bounds, the largest first. The largest bounds
        ΔW's spectral norm, the root of their sum of squares its Frobenius norm, their sum its
        nuclear norm

    `lora_alpha` has no effect. Raises ValueError naming the field, its value and the remedy.
    """

    name: ClassVar[str] = "nb_lora"
    composed_by: ClassVar[tuple[str, ...]] = ("s",)

    s: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = self.s if isinstance(self.s, tuple) else (self.s,)
        if not bounds or not all(0.0 < bound < math.inf for bound in bounds):
            raise ValueError(f"s={self.s!r}: choose a positive bound, or one for each rank")
        if list(bounds) != sorted(bounds, reverse=True):
            raise ValueError(f"s={self.s!r}: choose the largest bound first")

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """An `NBLoRABank`, whose scale is the 2 of the equation."""
        if isinstance(self.s, tuple):
            for target in targets:
                if len(self.s) != target.r:
                    raise ValueError(
                        f"s={self.s!r} has {len(self.s)} bounds, and {target.name} the rank "
                        f"{target.r}: choose as many, or one for all"
                    )
        return NBLoRABank(targets, likes, self.s)


class NBLoRABank(AdapterBank):
    """Target i has the free parameters A[i] (r, K) and B[i] (N, r); the buffer s (r,) is common."""

    s: Tensor

    def __init__(
        self, targets: Sequence[Target], likes: Sequence[Tensor], s: float | tuple[float, ...]
    ) -> None:
        super().__init__(targets, [2.0] * len(targets))
        most, device = max(target.r for target in targets), likes[0].device
        bounds = torch.tensor(s, dtype=torch.float32).expand(most)
        self.register_buffer("s", bounds.to(device, copy=True))
        pairs = [fresh(target, like) for target, like in zip(targets, likes, strict=True)]
        self.A, self.B = (nn.ParameterList(side) for side in zip(*pairs, strict=True))

    def factors(self, i: int) -> Pair:
        """diag(s)·A (r, K) and B (N, r) of the Cayley map of A[i] and B[i]."""
        A, B = self.A[i], self.B[i]
        with torch.autocast(A.device.type, enabled=False):  # bf16 would not keep the bound
            wide = torch.promote_types(A.dtype, torch.float32)
            columns, rows = orthonormal(A.to(wide), B.to(wide))
            s = self.s[: len(A)].to(columns)
            return (s.unsqueeze(1) * columns).to(A.dtype), rows.to(B.dtype)


def orthonormal(A: Tensor, B: Tensor) -> Pair:
    """A (r, K) and B (N, r) with A·Aᵀ + Bᵀ·B = I, from any A (r, K) and B (N, r), r at most K."""
    r = len(A)
    square, rest = A[:, :r], A[:, r:]  # Xᵀ (r, r) and the part of Yᵀ (r, K − r)
    eye = torch.eye(r, dtype=A.dtype, device=A.device)
    Z = square.T - square + rest @ rest.T + B.T @ B  # (r, r)
    W = -2.0 * torch.linalg.inv_ex(eye + Z).inverse  # (r, r); it asks no device whether it exists
    # (I − Z)(I + Z)⁻¹ = −W − I
    return torch.cat((-W.T - eye, W.T @ rest), 1), B @ W  # (r, K), (N, r)
