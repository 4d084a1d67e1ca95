"""The specification: what every backend of the op must compute, in plain PyTorch.

    x (M, K)   W (N, K)   b (N,) or None   A (r, K)   B (N, r)   s a float
    mask (M, K) from `philox`   c = 1/(1−p)

    forward    h = c·(mask∘x)Aᵀ              y = xWᵀ + b + s·hBᵀ
    backward   dh = s·dy B                   dB = s·dyᵀh
               dA = c·dhᵀ(mask∘x)            dx = dy W + c·mask∘(dh A)
    sqnorm     Σ_t w_t ‖s·B·h_t‖²            (Zhou et al., COLING 2025: the importance of a layer)
    gram       Σ_t w_t h_t h_tᵀ
    core       Σ_t u_t h_tᵀ                  of u = dy B: 1/s times the gradient of a matrix between
                                             B and A
    moment     Σ_t w_t x_tk²                 for each column k of x, before dropout

A and B are rounded to x's dtype, products accumulate in float32 (float64 for float64), h is rounded
to x's dtype, y and dx come in x's dtype, dA and dB in the parameters' dtype. W and b are frozen.
Where `weight` is None, `y0` (M, N) stands for xWᵀ + b. Rows of weight 0 are left out of a statistic
whatever they hold.
"""

import torch
from torch import Tensor

from loradrop.op.call import Backend, Call, Grads, Needs, Output, Saved
from loradrop.op.philox import gain, keep


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(call: Call) -> Output:
    """y and h, both in x's dtype, and sqnorm; it keeps no mask."""
    x, s, wide = call.x, call.scaling, _wide(call.x.dtype)
    b, h = call.B.to(x.dtype).to(wide), _down(x, call)
    if call.y0 is not None:
        base = call.y0.to(wide)
    else:
        assert call.weight is not None
        base = x.to(wide) @ call.weight.to(wide).T
        base = base if call.bias is None else base + call.bias.to(wide)
    y = (base + s * (h.to(wide) @ b.T)).to(x.dtype).contiguous()
    w = call.token_weights
    norm = sqnorm(h, call.B, s, w) if call.sqnorm else None
    return Output(y, h, None, norm, gram(h, w) if call.gram else None)


def _down(x: Tensor, of: Call | Saved) -> Tensor:
    """h (M, r), rounded."""
    wide = _wide(x.dtype)
    kept = keep(x, of.seed, of.dropout).to(wide)
    return (gain(of.dropout) * (kept @ of.A.to(x.dtype).to(wide).T)).to(x.dtype)


def up(saved: Saved, dh: Tensor) -> Tensor:
    """c·mask∘(dh A) (M, K) for a dh (M, r), the gradient of h: what x gets through it."""
    dtype, wide = saved.h.dtype, _wide(saved.h.dtype)
    delta = dh.to(wide) @ saved.A.to(dtype).to(wide)
    return gain(saved.dropout) * keep(delta, saved.seed, saved.dropout)


def backward(saved: Saved, dy: Tensor, needs: Needs) -> Grads:
    """What `needs` asks for."""
    x, weight, s, p, seed = saved.x, saved.weight, saved.scaling, saved.dropout, saved.seed
    dtype, wide = saved.h.dtype, _wide(saved.h.dtype)
    b, dy = saved.B.to(dtype).to(wide), dy.to(wide)
    dh = s * (dy @ b)
    dx = dA = dB = None
    if needs.x:
        delta = up(saved, dh)
        dx = (delta if weight is None else dy @ weight.to(wide) + delta).to(dtype)
    if needs.A:
        assert x is not None
        dA = (gain(p) * (dh.T @ keep(x, seed, p).to(wide))).to(saved.A.dtype)
    if needs.B:
        dB = (s * (dy.T @ saved.h.to(wide))).to(saved.B.dtype)
    squares = None
    if needs.moment:
        assert x is not None
        squares = moment(x, saved.token_weights)
    return Grads(dx, dA, dB, squares)


def backward_with_graph(saved: Saved, dy: Tensor, needs: Needs) -> Grads:
    """As `backward`, and differentiable itself: h is made again, with its graph.

    Where x is not kept, h has its graph already.
    """
    if saved.x is not None:
        saved = saved._replace(h=_down(saved.x, saved))
    return backward(saved, dy, needs)


def sqnorm(h: Tensor, B: Tensor, scaling: float, token_weights: Tensor | None) -> Tensor:
    """Σ_t w_t ‖s·B·h_t‖² by its definition, for the rounded h (M, r) and B (N, r): float64."""
    delta = scaling * (h.double() @ B.to(h.dtype).double().T)
    return _sum_over_tokens(delta.square().sum(1), token_weights)


def core(saved: Saved, dy: Tensor | None, dB: Tensor | None) -> Tensor:
    """Σ_t u_t h_tᵀ of u = dy B: (r, r) float64, from dB = s·dyᵀh where that tells it."""
    b = saved.B.to(saved.h.dtype)
    if dy is None:
        return saved.h.new_zeros((b.shape[1], b.shape[1]), dtype=torch.float64)
    if dB is not None and saved.scaling:
        return b.double().T @ dB.double() / saved.scaling
    return (dy @ b).double().T @ saved.h.double()


def gram(h: Tensor, token_weights: Tensor | None) -> Tensor:
    """Σ_t w_t h_t h_tᵀ of h (M, r): (r, r) float64."""
    rows = h.double()
    if token_weights is not None:
        roots = token_weights.double().sqrt().unsqueeze(1)
        rows = torch.where(roots > 0, rows * roots, 0.0)
    return rows.T @ rows


def moment(x: Tensor, token_weights: Tensor | None) -> Tensor:
    """Σ_t w_t x_tk² of x (M, K): (K,) float64."""
    return _sum_over_tokens(x.to(_wide(x.dtype)).square(), token_weights)


def _sum_over_tokens(values: Tensor, token_weights: Tensor | None) -> Tensor:
    """Σ_t w_t·values_t in float64 over the first axis."""
    if token_weights is not None:
        w = token_weights.view(-1, *(1,) * (values.ndim - 1)).to(values.dtype)
        values = torch.where(w > 0, values * w, 0.0)
    return values.sum(0, dtype=torch.float64)


REFERENCE = Backend("reference", forward, backward)
