"""The thin product of LoRA: one read of x gives h, the mask of dropout, and the Gram matrices of h
and of the squared output norm.

    h = scale·(mask∘x)Aᵀ                    x (M, K)   A (r, K)   h (M, r)
    gram[b] = Σ_t w_t h_t h_tᵀ              over the rows t of block b, of the rounded h
    gram[b] = Σ_n B_n B_nᵀ                  over the rows n of B, in programs of their own

The same kernel serves the backward's dy·B, with the strides of B for those of A.

It is bound by reading x, so a program takes BM rows and goes through K, with A from L2. Where that
makes too few programs, K is split over planes, which `_finish` adds up in their order: no atomics,
the same bits in every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loradrop.kernels.gemm_ext import in_eights
from loradrop.kernels.gram import Grams, gram, gram_of_b, new_grams, store_gram, wide_grams
from loradrop.kernels.launch import kernel
from loradrop.kernels.philox import draw_words, where_kept
from loradrop.kernels.tiles import (
    ShrinkTiles,
    cdiv,
    dot_precision,
    new_rows,
    rank_tile,
    row_bytes,
)


class Shrunk(NamedTuple):
    """What one pass over x gives."""

    h: Tensor  # (M, r) in x's dtype
    mask: Tensor | None  # (M, row_bytes(K)) uint8, with dropout
    grams: Grams | None


@triton.jit
def _emit(acc, H, WEIGHTS, GRAM, block, rows, M, r, shm, scale,
          R: tl.constexpr, GRAMS: tl.constexpr, WEIGHTED: tl.constexpr):  # fmt: skip
    """Rounds and stores one block of h, and its Gram matrix."""
    ranks = tl.arange(0, R)
    h = (acc * scale).to(H.dtype.element_ty)  # (BM, R)
    place = rows.to(tl.int64)[:, None] * shm + ranks[None, :]
    tl.store(H + place, h, mask=(rows < M)[:, None] & (ranks < r)[None, :])
    if GRAMS:
        weights = rows  # read with WEIGHTED only
        if WEIGHTED:
            weights = tl.load(WEIGHTS + rows, mask=rows < M, other=0.0)  # (BM,)
        store_gram(GRAM, gram(h, weights, WEIGHTED), block, R)


@kernel(do_not_specialize=["M", "N", "steps", "blocks", "threshold"])
def _shrink(X, A, H, MASK, SEED, WEIGHTS, GRAM, B, GRAM_B, PLANES,
            M, N, steps, blocks, threshold, scale, K, r, sxm, sxk, sar, sak, shm, smask, sbn, sbr,
            BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr,
            DROPOUT: tl.constexpr, GRAMS: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr,
            PRECISION: tl.constexpr, B_ROWS: tl.constexpr, EIGHTS: tl.constexpr):  # fmt: skip
    r, sak = in_eights(r, EIGHTS), in_eights(sak, EIGHTS)
    block, part = tl.program_id(0), tl.program_id(1)
    if NORM and block >= blocks:
        gram_of_b(B, GRAM_B, block - blocks, N, r, sbn, sbr, H.dtype.element_ty, R, B_ROWS, BM)
    else:
        rows = block * BM + tl.arange(0, BM)
        ranks, inner = tl.arange(0, R), tl.arange(0, BK)
        first = part * steps * BK  # this program's columns of x
        last = min(K, first + steps * BK)
        x_at = X + rows.to(tl.int64)[:, None] * sxm + (first + inner).to(tl.int64)[None, :] * sxk
        a_at = A + ranks.to(tl.int64)[None, :] * sar
        a_at += (first + inner).to(tl.int64)[:, None] * sak
        if DROPOUT:
            seed = tl.load(SEED)
        acc = tl.zeros((BM, R), tl.float32)
        for start in range(first, last, BK):
            there = inner < K - start
            x = tl.load(x_at, mask=(rows < M)[:, None] & there[None, :], other=0.0)  # (BM, BK)
            a = tl.load(a_at, mask=there[:, None] & (ranks < r)[None, :], other=0.0)  # (BK, R)
            if DROPOUT:
                words = draw_words(seed, rows, start // 32, smask, threshold, BK // 32)
                column = start // 32 + tl.arange(0, BK // 32)
                place = rows.to(tl.int64)[:, None] * smask + column[None, :]
                inside = (rows < M)[:, None] & (column < smask)[None, :]
                tl.store(MASK + place, words, mask=inside)
                x = where_kept(words, x)
            acc = tl.dot(x, a.to(x.dtype), acc, input_precision=PRECISION)
            x_at += BK * tl.cast(sxk, tl.int64)
            a_at += BK * tl.cast(sak, tl.int64)
        if not SPLIT:
            _emit(acc, H, WEIGHTS, GRAM, block, rows, M, r, shm, scale, R, GRAMS, WEIGHTED)
        else:
            place = (part * M + rows).to(tl.int64)[:, None] * R + ranks[None, :]
            tl.store(PLANES + place, acc, mask=(rows < M)[:, None])


@kernel(do_not_specialize=["M", "N", "blocks", "parts"])
def _finish(PLANES, H, WEIGHTS, GRAM, B, GRAM_B, M, N, blocks, parts, scale, r, shm, sbn, sbr,
            BM: tl.constexpr, R: tl.constexpr, GRAMS: tl.constexpr, NORM: tl.constexpr,
            WEIGHTED: tl.constexpr, B_ROWS: tl.constexpr):  # fmt: skip
    """Adds the planes of a split K, in their order."""
    block = tl.program_id(0)
    if NORM and block >= blocks:
        gram_of_b(B, GRAM_B, block - blocks, N, r, sbn, sbr, H.dtype.element_ty, R, B_ROWS, BM)
    else:
        rows, ranks = block * BM + tl.arange(0, BM), tl.arange(0, R)
        acc = tl.zeros((BM, R), tl.float32)
        for part in range(parts):
            place = (part * M + rows).to(tl.int64)[:, None] * R + ranks[None, :]
            acc += tl.load(PLANES + place, mask=(rows < M)[:, None], other=0.0)
        _emit(acc, H, WEIGHTS, GRAM, block, rows, M, r, shm, scale, R, GRAMS, WEIGHTED)


def shrink(
    x: Tensor,
    A: Tensor,
    scale: float,
    tiles: ShrinkTiles,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    gram: bool = False,
    B: Tensor | None = None,
    token_weights: Tensor | None = None,
    aligned: bool = False,
) -> Shrunk:
    """h = scale·(mask∘x)Aᵀ, rounded to x's dtype, and what else the one read of x gives.

    x (M, K) of any strides   A (r, K) of any strides and float dtype   dropout quantised
    seed 0-dim int64   gram: the Gram matrices of h come too, weighted by token_weights (M,) float32
    B (N, r): they come, and those of B; both for an x of half precision only
    aligned: h lies in `rows_aligned`, whatever its rank
    """
    (m, k), r, n = x.shape, A.shape[0], 0 if B is None else B.shape[0]
    ranks, masked = rank_tile(r), dropout > 0.0
    gram = gram or B is not None
    in_pass = gram and ranks <= tiles.gram
    blocks, b_blocks = cdiv(m, tiles.BM), cdiv(n, tiles.B_ROWS) if in_pass else 0
    steps = cdiv(cdiv(k, tiles.split), tiles.BK)
    split = cdiv(k, steps * tiles.BK)
    h = new_rows(x, m, r) if aligned else x.new_empty((m, r))
    mask = x.new_empty((m, row_bytes(k)), dtype=torch.uint8) if masked else None
    words = None if mask is None else mask.view(torch.int32)
    grams = planes = None
    if in_pass:
        grams = new_grams(x, r, blocks, b_blocks)
    if split > 1:
        planes = new_planes(x, split, m, ranks)
    gram_h, gram_b = grams if grams is not None else (None, None)
    weights = token_weights if in_pass else None
    b_strides = (0, 0) if B is None else B.stride()
    a_row, a_column = A.stride()
    _shrink(
        (blocks + (b_blocks if split == 1 else 0), split),
        (x, A, h, words, seed, weights, gram_h, B, gram_b, planes),
        (m, n, steps, blocks, round(dropout * 4096), float(scale)),
        (k, r, *x.stride(), a_row, a_column, h.stride(0), 0 if words is None else words.stride(0),
         *b_strides),
        tiles.warps, tiles.stages,
        BM=tiles.BM, BK=tiles.BK, R=ranks, SPLIT=split > 1, DROPOUT=masked,
        GRAMS=in_pass and split == 1, NORM=b_blocks > 0 and split == 1,
        WEIGHTED=weights is not None,
        PRECISION=dot_precision(x.dtype), B_ROWS=tiles.B_ROWS,
        EIGHTS=r % 8 == a_column % 8 == 0,
    )  # fmt: skip
    if split > 1:
        _finish(
            (blocks + b_blocks,), (planes, h, weights, gram_h, B, gram_b),
            (m, n, blocks, split, float(scale)), (r, h.stride(0), *b_strides), tiles.warps,
            BM=tiles.BM, R=ranks, GRAMS=in_pass, NORM=b_blocks > 0,
            WEIGHTED=weights is not None, B_ROWS=tiles.B_ROWS,
        )  # fmt: skip
    if gram and not in_pass:
        grams = wide_grams(h, B, token_weights)
    return Shrunk(h, mask, grams)


def add_parts(planes: Tensor, h: Tensor, scale: float) -> None:
    """h (M, r) = scale times the sum of the planes (count, M, R) of float32, R = rank_tile(r)."""
    (m, r), (count, _, ranks), rows = h.shape, planes.shape, 64
    blocks = cdiv(m, rows)
    _finish(
        (blocks,), (planes, h, None, None, None, None), (m, 0, blocks, count, float(scale)),
        (r, h.stride(0), 0, 0), 4,
        BM=rows, R=ranks, GRAMS=False, NORM=False, WEIGHTED=False, B_ROWS=rows,
    )  # fmt: skip


def new_planes(like: Tensor, *shape: int) -> Tensor:
    """Float32 memory for partial results."""
    return like.new_empty(shape, dtype=torch.float32)
