"""The backend of plain PyTorch calls: `linear`, `addmm_` in place on its own output, and the Gram
norm.

It runs on every device. The delta h·Bᵀ never exists as an array of its own, and the norm costs two
r x r products: Σ_t w_t ‖s·B·h_t‖² = s²·⟨HᵀDH, BᵀB⟩ with D = diag(w). Both are taken in float64,
whose sixteen digits leave room for any cancellation that float32 factors can cause, so no second
form of the norm is needed.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from loradrop.op.philox import keep_mask

_MANY_ROWS = 512  # where a pass over y outweighs two small copies
_ROWS_PER_BLOCK = 512  # rows of a half-precision operand widened at a time


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y0: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    a, b = A.to(x.dtype), B.to(x.dtype)
    if dropout == 0.0 or seed is None:
        h = linear(x, a)
    else:
        h = linear(x * keep_mask(seed, x.shape[0], x.shape[1], dropout), a).div_(1.0 - dropout)
    if weight is None:
        assert y0 is not None
        return torch.addmm(y0, h, b.T, alpha=scaling), h
    if bias is not None and _bias_costs_a_pass(x) and math.frexp(scaling)[0] in (0.5, -0.5):
        h1 = pad(h, (0, 1), value=1.0 / scaling)  # (M, r + 1); exact for a power of two
        b1 = torch.cat((b, bias.unsqueeze(1)), 1)  # (N, r + 1)
        return linear(x, weight).addmm_(h1, b1.T, alpha=scaling), h
    return linear(x, weight, bias).addmm_(h, b.T, alpha=scaling), h


def _bias_costs_a_pass(x: Tensor) -> bool:
    """Whether `linear` copies the bias into y and reads it back, at up to a tenth of its time.

    So it does for bfloat16 on a CPU. As one more column of the thin product the bias is free.
    """
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[0] >= _MANY_ROWS


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    h: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.backward`."""
    keep = None
    if dropout > 0.0 and seed is not None and (needs[0] or needs[1]):
        keep = keep_mask(seed, x.shape[0], x.shape[1], dropout)
    dx = dA = dB = None
    if needs[0] or needs[1]:
        dh = dy @ (B.to(dy.dtype) * (scaling / (1.0 - dropout)))
    if needs[0]:
        a = A.to(x.dtype)
        if keep is not None:
            dx = (dh @ a).mul_(keep)
            dx = dx if weight is None else (dy @ weight).add_(dx)
        else:
            dx = dh @ a if weight is None else (dy @ weight).addmm_(dh, a)
    if needs[1]:
        dA = _outer(dh, x if keep is None else x * keep, A.dtype)
    if needs[2]:
        dB = _outer(dy, h, B.dtype).mul_(scaling)
    return dx, dA, dB


def _outer(p: Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    """pᵀq (P, Q) from p (M, P) and q (M, Q), accumulated at least in float32, in `dtype`."""
    if p.dtype == dtype or p.dtype == torch.float64:
        return (p.T @ q).to(dtype)
    total = p.new_zeros((p.shape[1], q.shape[1]), dtype=torch.float32)
    for rows in range(0, p.shape[0], _ROWS_PER_BLOCK):
        block = slice(rows, rows + _ROWS_PER_BLOCK)
        total.addmm_(p[block].float().T, q[block].float())
    return total.to(dtype)


def sqnorm(h: Tensor, B: Tensor, scaling: float, token_weights: Tensor | None) -> Tensor:
    """As `reference.sqnorm`, by the Gram identity."""
    tokens, b = h.double(), B.to(h.dtype).double()
    if token_weights is not None:
        weights = token_weights.double().sqrt().unsqueeze(1)
        tokens = torch.where(weights > 0, tokens * weights, 0.0)
    gram = torch.dot((tokens.T @ tokens).flatten(), (b.T @ b).flatten())
    return gram.mul(scaling * scaling).clamp_min(0.0).float()
