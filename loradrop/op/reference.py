"""The specification: what every backend of the op must compute, in plain PyTorch.

    x (M, K)   W (N, K)   b (N,) or None   A (r, K)   B (N, r)   s a float
    mask (M, K) from `philox`

    forward    h = (mask∘x)Aᵀ / (1−p)        y = xWᵀ + b + s·hBᵀ
    backward   dh = s·dy B                   dB = s·dyᵀh
               dA = dhᵀ(mask∘x) / (1−p)      dx = dy W + mask∘(dh A) / (1−p)
    sqnorm     Σ_t w_t ‖s·B·h_t‖²            (Zhou et al., COLING 2025: the importance of a layer)

A and B are rounded to x's dtype, products accumulate in float32 (float64 for float64), h is rounded
to x's dtype, y and dx come in x's dtype, dA and dB in the parameters' dtype. W and b are frozen.
Where `weight` is None, `y0` (M, N) stands for xWᵀ + b.
"""

import torch
from torch import Tensor

from loradrop.op.philox import keep_mask


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _masked(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    if dropout == 0.0 or seed is None:
        return x
    return torch.where(keep_mask(seed, x.shape[0], x.shape[1], dropout), x, 0.0)


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
    """(y (M, N), h (M, r)), both in x's dtype."""
    wide = _wide(x.dtype)
    a, b = A.to(x.dtype).to(wide), B.to(x.dtype).to(wide)
    h = (_masked(x, dropout, seed).to(wide) @ a.T / (1.0 - dropout)).to(x.dtype)
    if weight is not None:
        base = x.to(wide) @ weight.to(wide).T
        base = base if bias is None else base + bias.to(wide)
    else:
        assert y0 is not None
        base = y0.to(wide)
    return (base + scaling * (h.to(wide) @ b.T)).to(x.dtype).contiguous(), h


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
    """(dx (M, K), dA (r, K), dB (N, r)); None where `needs` says that nobody asks."""
    wide = _wide(x.dtype)
    a, b, dy = A.to(x.dtype).to(wide), B.to(x.dtype).to(wide), dy.to(wide)
    dh = scaling * (dy @ b)
    dx = dA = dB = None
    if needs[0]:
        delta = _masked(dh @ a, dropout, seed) / (1.0 - dropout)
        dx = (delta if weight is None else dy @ weight.to(wide) + delta).to(x.dtype)
    if needs[1]:
        dA = (dh.T @ _masked(x, dropout, seed).to(wide) / (1.0 - dropout)).to(A.dtype)
    if needs[2]:
        dB = (scaling * (dy.T @ h.to(wide))).to(B.dtype)
    return dx, dA, dB


def sqnorm(h: Tensor, B: Tensor, scaling: float, token_weights: Tensor | None) -> Tensor:
    """Σ_t w_t ‖s·B·h_t‖² by its definition; tokens of weight 0 are left out, whatever they hold.

    h (M, r)   B (N, r)   token_weights (M,) or None  ->  float32, 0-dim
    """
    delta = scaling * (h.double() @ B.to(h.dtype).double().T)
    per_token = delta.square().sum(1)
    if token_weights is not None:
        per_token = torch.where(token_weights > 0, per_token * token_weights, 0.0)
    return per_token.sum().float()
