"""RM-LoRA, regularized and masked LoRA (Mao et al., arXiv:2407.12074): LoRA whose factors are
pushed towards full rank, and of whose gradients a random part counts at each step.

    ΔW_i = s · B_i · A_i
    loss + λ(t) · Σ_i (‖A_i·A_iᵀ − I‖² + ‖B_iᵀ·B_i − I‖²)    its gradient is added before each step
    ∂A_i <- M ∘ ∂A_i,   ∂B_i <- M' ∘ ∂B_i                    M, M' of zeros and ones, new every step

From the paper: the aim, a higher intrinsic rank of B·A at a fixed budget, by a regulariser that
promotes orthogonality and by masked gradients. Ours, because we could not read them there: the form
of the regulariser, which is AdaLoRA's; that single entries are masked, after the regulariser has
added its part; and every constant, λ, its rise and the masked part among them. An optimiser with
momentum moves a masked entry all the same, by the gradients of earlier steps.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from loradrop.bank import AdapterBank
from loradrop.methods.base import Method
from loradrop.methods.orthogonality import add_gradient
from loradrop.op.philox import keep_mask, quantize
from loradrop.pairs import LoRABank


@dataclass(frozen=True, kw_only=True)
class RMLoRA(Method):
    """The options of RM-LoRA; their defaults are ours.

    penalty      λ of the regulariser, 0 for none
    rise         the part of all steps over which λ grows from 0, as B is zero at first
    mask_ratio   the part of the entries of A and B whose gradient a step sets to zero, rounded to a
                 multiple of 2⁻¹²
    seed         of the masks, which are a function of it, the step and the entry: the same on every
                 rank, on every device, and after a resume

    Raises ValueError naming the field, its value and the remedy.
    """

    name: ClassVar[str] = "rm_lora"

    penalty: float = 1e-3
    rise: float = 0.1
    mask_ratio: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.penalty < math.inf:
            raise ValueError(f"penalty={self.penalty!r}: choose a number from 0 up")
        if not 0.0 <= self.rise <= 1.0:
            raise ValueError(f"rise={self.rise!r}: choose a part of all steps in [0, 1]")
        try:
            quantize(self.mask_ratio)
        except ValueError as error:
            raise ValueError(
                f"mask_ratio={self.mask_ratio!r}: choose 0, or a number between 2**-13 and "
                "1 - 2**-13"
            ) from error
        if not 0 <= self.seed < 1 << 15:
            raise ValueError(f"seed={self.seed!r}: choose a whole number from 0 to {(1 << 15) - 1}")

    def weight(self, step: int, total: int) -> float:
        """λ at this step."""
        return self.penalty * min(1.0, step / max(1.0, self.rise * total))

    @torch.no_grad()
    def before_step(self, bank: AdapterBank, step: int, total: int) -> None:
        """Adds the gradient of the regulariser, and masks the sum."""
        assert isinstance(bank, LoRABank)
        weight = self.weight(step, total)
        for k, (A, B) in enumerate(zip(bank.A, bank.B, strict=True)):
            add_gradient(A, weight)
            add_gradient(B, weight, columns=True)
            self._mask(A, step, 2 * k)
            self._mask(B, step, 2 * k + 1)

    def _mask(self, factor: nn.Parameter, step: int, number: int) -> None:
        """Sets the gradient to zero where this step's mask of the tensor of that number is zero."""
        if factor.grad is None or not self.mask_ratio:
            return
        key = self.seed << 48 | step << 16 | number  # no two tensors or steps have the same
        seed = torch.full((), key, dtype=torch.int64, device=factor.device)
        grad = factor.grad if len(factor) <= factor.shape[1] else factor.grad.T  # rows are words
        rows, columns = grad.shape
        grad.mul_(keep_mask(seed, rows, columns, quantize(self.mask_ratio)))
