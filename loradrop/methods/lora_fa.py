"""LoRA with a frozen A: one trained factor for each target (Zhu et al., ICML 2024,
arXiv:2402.16842, "Asymmetry in Low-Rank Adapters of Foundation Models").

    ΔW_i = s · B_i · A_i      A_i fixed, with orthonormal rows; B_i trained, from zero

A target costs N·r elements where LoRA costs r·(K + N), and the backward pass keeps its input x no
longer: the gradient of B needs h = A x alone. From the paper: the random orthonormal A that stays
as it is, and B from zero. Ours: that A comes from a QR decomposition of a Gaussian matrix, and s as
LoRA's. With init="kaiming" A is LoRA's random start, frozen: our reading of LoRA-FA (Zhang et al.,
arXiv:2308.03303).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from loradrop.bank import AdapterBank, Pair
from loradrop.methods.base import Method
from loradrop.options import check_choice
from loradrop.pairs import fresh
from loradrop.scores import Target

INITS = ("orthonormal", "kaiming")


@dataclass(frozen=True, kw_only=True)
class LoRAFA(Method):
    """LoRA with a frozen A. The rank, alpha and dropout are fields of `LoRAConfig`.

    init   of A: "orthonormal" rows of length 1, or "kaiming", the start of LoRA's A

    Raises ValueError naming the field, its value and the remedy.
    """

    name: ClassVar[str] = "lora_fa"

    init: str = "orthonormal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init", self.init, INITS)

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """A `FrozenABank`."""
        return FrozenABank(targets, scaling, likes, self.init)


class FrozenABank(AdapterBank):
    """Target i has the buffer A (r, K) and the parameter B[i] (N, r)."""

    def __init__(
        self,
        targets: Sequence[Target],
        scaling: Sequence[float],
        likes: Sequence[Tensor],
        init: str,
    ) -> None:
        super().__init__(targets, scaling)
        self.B = nn.ParameterList()
        for i, (target, like) in enumerate(zip(targets, likes, strict=True)):
            A, B = fresh(target, like)
            drawn = orthonormal(target, like) if init == "orthonormal" else A.detach()
            self.register_buffer(f"A_{i}", drawn)
            self.B.append(B)

    def factors(self, i: int) -> Pair:
        """(A_i (r, K), B_i (N, r)); A_i has no gradient."""
        return self.get_buffer(f"A_{i}"), self.B[i]


def orthonormal(target: Target, like: Tensor) -> Tensor:
    """A random A (r, K) with A Aᵀ = I, made in float32."""
    A = torch.empty(target.r, target.in_features, device=like.device, dtype=torch.float32)
    return nn.init.orthogonal_(A).to(like.dtype)
