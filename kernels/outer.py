"""The gradients of A and B: tall matrices contracted over the tokens.

    out = scale·Σ_m (mask∘p)[m]ᵀ q[m]       p (M, C)   q (M, r)   out (C, r), in float32

    dB = s·dyᵀh       (N, r)                p = dy   q = h
    dA = tᵀ(mask∘x)   (r, K), transposed    p = x    q = t = s·dyB/(1 − dropout)
    moment[c] = Σ_m w_m p_mc²               of p as it is before the mask, on request

Bound by reading p once. M is split over planes, and `_add_planes` adds them in their order: no
atomics, the same bits in every run.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from loradrop.kernels.gemm_ext import in_eights, mask_words
from loradrop.kernels.launch import kernel
from loradrop.kernels.philox import where_kept
from loradrop.kernels.tiles import OuterTiles, cdiv, dot_precision, rank_tile


class Outer(NamedTuple):
    """What one pass over p gives."""

    out: Tensor  # (C, r), or (r, C) transposed
    moment: Tensor | None  # (C,) float64, where it is asked for


@kernel(do_not_specialize=["M", "rows_per_part"])
def _outer(P, Q, OUT, MASK, WEIGHTS, MOMENT, M, rows_per_part, scale,
           C, r, spm, spc, sqm, sqr, plane, soc, sor, smask,
           BC: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr,
           MOMENTS: tl.constexpr, WEIGHTED: tl.constexpr,
           EIGHTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    r, sqm = in_eights(r, EIGHTS), in_eights(sqm, EIGHTS)
    column, part = tl.program_id(0) * BC, tl.program_id(1)
    columns, ranks = column + tl.arange(0, BC), tl.arange(0, R)
    acc = tl.zeros((R, BC), tl.float32)  # this way round p may come from registers, masked
    if MOMENTS:
        squares = tl.zeros((BM, BC), tl.float32)  # added over the rows once, at the end
    first = part * rows_per_part
    for m in range(first, min(M, first + rows_per_part), BM):
        rows = m + tl.arange(0, BM)
        there, at = rows < M, rows.to(tl.int64)[:, None]
        p = tl.load(P + at * spm + columns.to(tl.int64)[None, :] * spc,
                    mask=there[:, None] & (columns < C)[None, :], other=0.0)  # (BM, BC)
        q = tl.load(Q + at * sqm + ranks[None, :] * sqr,
                    mask=there[:, None] & (ranks < r)[None, :], other=0.0)  # (BM, R)
        if MOMENTS:
            square = p.to(tl.float32) * p.to(tl.float32)
            if WEIGHTED:
                weights = tl.load(WEIGHTS + rows, mask=there, other=0.0)[:, None]  # (BM, 1)
                square = tl.where(weights > 0.0, square * weights, 0.0)
            squares += square
        if MASKED:
            p = where_kept(mask_words(MASK, m, column, M, smask, BM, BC), p)
        acc = tl.dot(tl.trans(q), p, acc, input_precision=PRECISION)
    place = part * plane + columns.to(tl.int64)[None, :] * soc + ranks.to(tl.int64)[:, None] * sor
    inside = (columns < C)[None, :] & (ranks < r)[:, None]
    tl.store(OUT + place, (acc * scale).to(OUT.dtype.element_ty), mask=inside)
    if MOMENTS:
        tl.store(MOMENT + part * C + columns, tl.sum(squares, 0), mask=columns < C)


@kernel(do_not_specialize=["count"])
def _add_planes(PLANES, OUT, count, size, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The sum of `count` planes of `size` numbers, in their order; in float64 if WIDE."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc, at = tl.zeros((BLOCK,), tl.float64 if WIDE else tl.float32), PLANES + place
    for _ in range(count):
        acc += tl.load(at, mask=place < size, other=0.0)
        at += size
    tl.store(OUT + place, acc.to(OUT.dtype.element_ty), mask=place < size)


def outer(
    p: Tensor,
    q: Tensor,
    scale: float,
    dtype: torch.dtype,
    tiles: OuterTiles,
    *,
    mask: Tensor | None = None,
    transposed: bool = False,
    moment: bool = False,
    token_weights: Tensor | None = None,
) -> Outer:
    """scale·(mask∘p)ᵀq (C, r), or its transpose (r, C), summed in float32, in `dtype`; and on
    request the weighted sum of each column of p², which leaves out rows of weight 0.

    p (M, C) and q (M, r) of any strides, one dtype   mask (M, row_bytes(C)) uint8
    token_weights (M,) float32
    """
    (m, c), r = p.shape, q.shape[1]
    rows_per_part = cdiv(cdiv(m, tiles.split), tiles.BM) * tiles.BM
    split = cdiv(m, rows_per_part)
    shape = (r, c) if transposed else (c, r)
    out = p.new_empty(shape, dtype=dtype)
    planes = out if split == 1 else p.new_empty((split, *shape), dtype=torch.float32)
    squares = p.new_empty((split, c), dtype=torch.float32) if moment else None
    weights = token_weights if moment else None
    words = None if mask is None else mask.view(torch.int32)
    (q_row, q_column), size = q.stride(), c * r
    _outer(
        (cdiv(c, tiles.BC), split), (p, q, planes, words, weights, squares),
        (m, rows_per_part, float(scale)),
        (c, r, *p.stride(), q_row, q_column, size, *((1, c) if transposed else (r, 1)),
         0 if words is None else words.stride(0)),
        tiles.warps, tiles.stages,
        BC=tiles.BC, BM=tiles.BM, R=rank_tile(r), MASKED=words is not None,
        MOMENTS=moment, WEIGHTED=weights is not None,
        EIGHTS=r % 8 == q_row % 8 == 0, PRECISION=dot_precision(p.dtype),
    )  # fmt: skip
    if split > 1:
        add_planes(planes, out)
    if squares is None:
        return Outer(out, None)
    total = squares.new_empty((c,), dtype=torch.float64)
    add_planes(squares, total)
    return Outer(out, total)


def add_planes(planes: Tensor, out: Tensor) -> None:
    """out (...) = the sum of the planes (count, ...), float32 and contiguous; in float64 for one of
    float64.
    """
    count, size, block = planes.shape[0], out.numel(), 1024
    wide = out.dtype == torch.float64
    _add_planes((cdiv(size, block),), (planes, out), (count,), (size,), BLOCK=block, WIDE=wide)
