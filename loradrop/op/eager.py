"""The backend of plain PyTorch calls: `linear`, `addmm_` in place on its own output, and the Gram
norm.

It runs on every device. The delta h·Bᵀ never exists as an array of its own, and the norm costs two
r x r products: Σ_t w_t ‖s·B·h_t‖² = s²·⟨HᵀDH, BᵀB⟩ with D = diag(w). Both are taken in float64,
whose sixteen digits leave room for any cancellation that float32 factors can cause, so no second
form of the norm is needed.

On a small layer the host's time is the layer's time: scales ride on the products, as their alpha,
and nothing is converted that has its dtype already. On a large one a CPU's BLAS wants the long side
of a thin product along its vectors: the other way round dB takes up to ten times as long.
"""

import functools

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.nn.functional import linear

from loradrop.op import reference
from loradrop.op.call import Backend, Call, Grads, Needs, Output, Saved
from loradrop.op.philox import draw, gain, unpack
from loradrop.op.reference import gram

_MANY_ROWS = 512  # where a pass over y outweighs two small copies
_TALL = 64  # rows from which the copy of a thin product is nothing
_NARROW = range(2, 13)  # columns that leave a CPU's vectors empty
_MM_WIDENS = hasattr(torch.ops.aten.mm, "dtype")
_ROWS_PER_BLOCK = 512  # rows of a half-precision operand widened at a time
_ROWS_SQUARED, _SQUARES = 64, 1 << 18  # the least rows, and about the numbers, squared at a time


def forward(call: Call) -> Output:
    """As `reference.forward`; the mask of dropout is kept."""
    x, weight, bias, s = call.x, call.weight, call.bias, call.scaling
    a, b, mask = in_dtype(call.A, x.dtype), in_dtype(call.B, x.dtype), None
    if call.seed is None:
        h = linear(x, a)
    else:
        mask = draw(call.seed, x.shape[0], x.shape[1], call.dropout)
        kept = torch.where(unpack(mask, x.shape[1]), x, 0.0)
        h = linear(kept, a) * gain(call.dropout)  # not in place: see `added`
    if call.y0 is not None:
        y = torch.addmm(call.y0, h, b.t(), alpha=s)
    else:
        assert weight is not None
        y = added(frozen(x, weight, bias), h, b.t(), s)
    copies = None if a is call.A else a, None if b is call.B else b
    return Output(y, h, mask, *statistics(h, b, call), *copies)


def in_dtype(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B as it is, or a copy in `dtype`."""
    return factor if factor.dtype == dtype else factor.to(dtype)


def statistics(h: Tensor, b: Tensor, call: Call) -> tuple[Tensor | None, Tensor | None]:
    """The squared norm and the Gram matrix of h (M, r), each where `call` asks for it. b (N, r) is
    B in h's dtype.
    """
    of_h = gram(h, call.token_weights) if call.sqnorm or call.gram else None
    norm = sqnorm_of(of_h, b, call.scaling) if of_h is not None and call.sqnorm else None
    return norm, of_h if call.gram else None


def added(y: Tensor, h: Tensor, l: Tensor, scale: float) -> Tensor:
    """y + scale·h·l in place, of a fresh y (M, N), h (M, r), l (r, N); in a tensor of its own where
    a dispatch mode looks on: selective checkpointing keeps y for the backward pass.
    """
    if _len_torch_dispatch_stack():
        return torch.addmm(y, h, l, alpha=scale)
    return y.addmm_(h, l, alpha=scale)


def frozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """xWᵀ + b, rounded once.

    `linear` copies a bfloat16 bias into y on a CPU and reads it back, for up to a tenth of its
    time; oneDNN adds it before it writes y, as Inductor has it.
    """
    many = x.dtype == torch.bfloat16 and x.is_cpu and x.shape[0] >= _MANY_ROWS
    if bias is None or not many or _len_torch_dispatch_stack() or not _has_onednn():
        return linear(x, weight, bias)
    if not (x.is_contiguous() and weight.is_contiguous() and bias.is_contiguous()):
        return linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _has_onednn() -> bool:
    """Whether oneDNN multiplies bfloat16 here, and is not switched off."""
    return torch._C._get_mkldnn_enabled() and _onednn_knows_bfloat16()


@functools.cache
def _onednn_knows_bfloat16() -> bool:
    ops = torch.ops.mkldnn
    known = getattr(ops, "_is_mkldnn_bf16_supported", None)
    return known is not None and hasattr(ops, "_linear_pointwise") and bool(known())


def backward(saved: Saved, dy: Tensor, needs: Needs) -> Grads:
    """As `reference.backward`, with the mask that `forward` kept."""
    x, weight, A, B, h, mask, _, s, p = saved[:9]
    kept = None
    if mask is not None and (needs.x or needs.A):
        kept = unpack(mask, A.shape[1])
    dx = dA = dB = None
    if needs.x or needs.A:
        b = in_dtype(B, h.dtype) if saved.b is None else saved.b
        dh = _through(dy, b, s * gain(p), h)
    if needs.x:
        a = in_dtype(A, h.dtype) if saved.a is None else saved.a
        if kept is not None:
            dx = torch.where(kept, torch.mm(dh, a), 0.0)
            dx = dx if weight is None else torch.mm(dy, weight).add_(dx)
        else:
            dx = torch.mm(dh, a) if weight is None else torch.mm(dy, weight).addmm_(dh, a)
    if needs.A:
        assert x is not None
        dA = _outer(dh, x if kept is None else torch.where(kept, x, 0.0), 1.0, A)
    if needs.B:
        dB = _outer(dy, h, s, B)
    squares = None
    if needs.moment:
        assert x is not None
        squares = moment(x, saved.token_weights)
    return Grads(dx, dA, dB, squares)


def _turns(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether a thin product of these rows, in `dtype`, may be quicker as its transpose."""
    return rows.is_cpu and rows.shape[0] >= _TALL and dtype.itemsize >= 4


def _through(dy: Tensor, b: Tensor, scale: float, like: Tensor) -> Tensor:
    """scale·dy·b (M, r), of dy (M, N), b (N, r) and any `like` of the result's shape."""
    # beta = 0 leaves out what `like` holds, NaN included
    if _turns(dy, dy.dtype) and b.shape[1] in _NARROW:
        return torch.addmm(like.t(), b.t(), dy.t(), beta=0, alpha=scale).t().contiguous()
    return torch.addmm(like, dy, b, beta=0, alpha=scale)


def _widens(p: Tensor) -> bool:
    """Whether one product takes half precision to float32: in PyTorch from 2.8 on, by cuBLAS."""
    return p.is_cuda and torch.version.hip is None and _MM_WIDENS


def _outer(p: Tensor, q: Tensor, scale: float, like: Tensor) -> Tensor:
    """scale·pᵀq from p (M, P) and q (M, Q), of the shape (P, Q) and the dtype of `like`.

    Accumulated at least in float32.
    """
    if _turns(p, like.dtype) and 1 < q.shape[1] < p.shape[1]:
        return _outer(q, p, scale, like.t()).t().contiguous()
    if p.dtype == like.dtype:
        return torch.addmm(like, p.t(), q, beta=0, alpha=scale)
    if p.dtype == torch.float64:
        return torch.mm(p.t(), q).mul_(scale).to(like.dtype)
    if _widens(p):
        total = torch.mm(p.t(), q, out_dtype=torch.float32)
        return (total if scale == 1.0 else total.mul_(scale)).to(like.dtype)
    total = p.new_zeros(like.shape, dtype=torch.float32)
    for rows in range(0, p.shape[0], _ROWS_PER_BLOCK):
        block = slice(rows, rows + _ROWS_PER_BLOCK)
        total.addmm_(p[block].float().t(), q[block].float(), alpha=scale)
    return total.to(like.dtype)


def sqnorm_of(of_h: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s²·⟨HᵀDH, bᵀb⟩, 0-dim float64, from the Gram matrix of h and the rounded b (N, r)."""
    wide = b.double()
    norm = torch.dot(of_h.flatten(), (wide.T @ wide).flatten())
    return norm.mul(scaling * scaling).clamp_min(0.0)


def moment(x: Tensor, token_weights: Tensor | None) -> Tensor:
    """As `reference.moment`: on a CPU by blocks of rows that stay in its cache, on a device by one
    kernel that reads half precision as it lies.
    """
    m, k = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    w = None if token_weights is None else token_weights.to(wide).clamp_min(0.0)
    if not x.is_cpu:
        if w is not None:
            x = torch.where((w > 0.0).unsqueeze(1), x, 0.0) * w.sqrt().unsqueeze(1)
        norms: Tensor = torch.linalg.vector_norm(x, dim=0, dtype=wide)
        return norms.double().square()
    total = x.new_zeros(k, dtype=torch.float64)
    rows = max(_ROWS_SQUARED, _SQUARES // max(k, 1))
    for start in range(0, m, rows):
        block = slice(start, start + rows)
        squares = x[block].to(wide).square()
        total += squares.sum(0) if w is None else torch.mv(squares.t(), w[block])
    if w is not None and not total.isfinite().all():  # rows of weight 0 may hold anything
        return reference.moment(x, token_weights)
    return total


EAGER = Backend("eager", forward, backward)
