"""The Gram matrix of h, r x r, and the squared norm of the LoRA output, which follows from it.

    G = Σ_t w_t h_t h_tᵀ      C = Σ_n B_n B_nᵀ      Σ_t w_t ‖s·B·h_t‖² = s²·⟨G, C⟩

G comes in blocks of rows from the pass that makes h (`shrink`), C beside it. Products of two half-
precision numbers are exact in float32, sums over a block are float32, everything after is float64
in a fixed order.

At most two launches: `_add_blocks` adds the blocks, every program a slice of the matrices, and
`_sqnorm` adds what the slices give.

The inner product cancels where h lies in directions that B maps to almost nothing. Float32 sums
then lack digits. `_sqnorm` sees it from ⟨|G|, |C|⟩ and sums the squared products themselves
instead, tile by tile, in one program: some milliseconds, but exact. Trained adapters do not come
near it, and a launch of many programs for it would cost every other call two microseconds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loradrop.kernels.gemm_ext import load_tile
from loradrop.kernels.launch import kernel
from loradrop.kernels.tiles import cdiv, rank_tile, triton_dtype

_CANCELS = 16  # ⟨G, C⟩ of less than a sixteenth of ⟨|G|, |C|⟩
_ROWS = 256  # rows of h or B in one program of `_gram`
_SLICES = 512  # the most programs of `_add_blocks`, whose results one program adds


class Grams(NamedTuple):
    """Gram matrices in blocks, (blocks, R, R) float32 with R = rank_tile(r)."""

    of_h: Tensor  # of rows of h, weighted
    of_b: Tensor | None  # of rows of B, for the norm


@triton.jit
def outer_sum(left, right, weights, WEIGHTED: tl.constexpr):
    """Σ_t w_t left_t right_tᵀ (I, J) from (BM, I) and (BM, J) of half precision, weights (BM,).

    Three pieces of half precision hold the digits of w·left, scaled by a power of two so that
    float16 holds the largest. A row of weight 0 is left out, whatever it holds.
    """
    if WEIGHTED:
        used = (weights > 0.0)[:, None]
        right = tl.where(used, right, 0.0)
        rest = tl.where(used, left, 0.0).to(tl.float32) * weights[:, None]
        largest = tl.max(tl.abs(rest))
        exponent = tl.minimum(largest.to(tl.int32, bitcast=True) >> 23, 253)  # biased by 127
        rest *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)  # now at most 2
        piece = rest.to(right.dtype)
        total = tl.dot(tl.trans(piece), right)
        for _ in tl.static_range(2):
            rest -= piece.to(tl.float32)
            piece = rest.to(right.dtype)
            total = tl.dot(tl.trans(piece), right, total)
        total *= (exponent << 23).to(tl.float32, bitcast=True)
    else:
        total = tl.dot(tl.trans(left), right)
    return total


@triton.jit
def gram(rows, weights, WEIGHTED: tl.constexpr):
    """Σ_t w_t rows_t rows_tᵀ (R, R): the Gram matrix of rows (BM, R)."""
    return outer_sum(rows, rows, weights, WEIGHTED)


@triton.jit
def gram_of_b(B, GRAM, block, N, r, sbn, sbr, DTYPE: tl.constexpr,
              R: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """The Gram matrix of ROWS rows of B (N, r), rounded to DTYPE."""
    ranks = tl.arange(0, R).to(tl.int64)
    total = tl.zeros((R, R), tl.float32)
    for start in range(block * ROWS, min((block + 1) * ROWS, N), TILE):
        rows = start + tl.arange(0, TILE)
        place = rows.to(tl.int64)[:, None] * sbn + ranks[None, :] * sbr
        inside = (rows < N)[:, None] & (ranks < r)[None, :]
        b = tl.load(B + place, mask=inside, other=0.0).to(DTYPE)  # (TILE, R)
        total += gram(b, b, False)
    store_gram(GRAM, total, block, R)


@triton.jit
def store_gram(GRAM, total, block, R: tl.constexpr):
    """Writes block `block` of GRAM (blocks, R, R)."""
    ranks = tl.arange(0, R)
    place = ranks[:, None] * R + ranks[None, :]
    tl.store(GRAM + block.to(tl.int64) * (R * R) + place, total)


@kernel(do_not_specialize=["M", "N", "blocks"])
def _gram(H, B, WEIGHTS, GRAM, GRAM_B, M, N, blocks, r, shm, sbn, sbr,
          R: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
          WEIGHTED: tl.constexpr, NORM: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """One SIDE x SIDE piece of the Gram matrix of ROWS rows of h, or of B: for wide ranks."""
    block, piece = tl.program_id(0), tl.program_id(1)
    i = (piece // (R // SIDE) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    j = (piece % (R // SIDE) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    of_b = block >= blocks
    block = tl.where(of_b, block - blocks, block)
    count = tl.where(of_b, N, M)
    for start in range(block * ROWS, min((block + 1) * ROWS, count), TILE):
        rows = start + tl.arange(0, TILE)
        there, at = (rows < count)[:, None], rows.to(tl.int64)[:, None]
        if NORM and of_b:
            b_i = tl.load(B + at * sbn + i[None, :] * sbr, there & (i < r)[None, :], 0.0)
            b_j = tl.load(B + at * sbn + j[None, :] * sbr, there & (j < r)[None, :], 0.0)
            total += tl.dot(tl.trans(b_i.to(DTYPE)), b_j.to(DTYPE))
        else:
            left = tl.load(H + at * shm + i[None, :], there & (i < r)[None, :], 0.0)
            right = tl.load(H + at * shm + j[None, :], there & (j < r)[None, :], 0.0)
            weights = rows  # read with WEIGHTED only
            if WEIGHTED:
                weights = tl.load(WEIGHTS + rows, mask=rows < M, other=0.0)
            total += outer_sum(left, right, weights, WEIGHTED)
    place = block.to(tl.int64) * (R * R) + i[:, None] * R + j[None, :]
    if NORM and of_b:
        tl.store(GRAM_B + place, total)
    else:
        tl.store(GRAM + place, total)


@kernel(do_not_specialize=["blocks", "b_blocks", "r"])
def _add_blocks(GRAM, GRAM_B, PARTS, SUM, blocks, b_blocks, r,
                R: tl.constexpr, SLICE: tl.constexpr, TOGETHER: tl.constexpr,
                NORM: tl.constexpr, KEPT: tl.constexpr):  # fmt: skip
    """One slice of G, into SUM (r, r) if KEPT, and for the NORM of ⟨G, C⟩ and of ⟨|G|, |C|⟩, into
    PARTS (slices, 2); TOGETHER blocks at a time.
    """
    at = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    g, c = tl.zeros((SLICE,), tl.float64), tl.zeros((SLICE,), tl.float64)
    for start in range(0, max(blocks, b_blocks), TOGETHER):
        planes = start + tl.arange(0, TOGETHER)
        place = planes.to(tl.int64)[:, None] * (R * R) + at[None, :]
        of_h = tl.load(GRAM + place, mask=(planes < blocks)[:, None], other=0.0)
        g += tl.sum(of_h.to(tl.float64), 0)
        if NORM:
            of_b = tl.load(GRAM_B + place, mask=(planes < b_blocks)[:, None], other=0.0)
            c += tl.sum(of_b.to(tl.float64), 0)
    if KEPT:
        i, j = at // R, at % R
        tl.store(SUM + i * r + j, g, mask=(i < r) & (j < r))
    if NORM:
        parts = PARTS + 2 * tl.program_id(0)
        tl.store(parts, tl.sum(g * c, 0))
        tl.store(parts + 1, tl.sum(tl.abs(g * c), 0))


@kernel(do_not_specialize=["M", "N", "slices"])
def _sqnorm(PARTS, H, B, WEIGHTS, OUT, M, N, slices, scale, r, shm, sbn, sbr,
            R: tl.constexpr, SLICES: tl.constexpr, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr,
            CANCELS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """The squared norm from the inner products, or from the products h·Bᵀ where those cancel."""
    at = tl.arange(0, SLICES)
    value = tl.sum(tl.load(PARTS + 2 * at, mask=at < slices, other=0.0), 0)
    size = tl.sum(tl.load(PARTS + 2 * at + 1, mask=at < slices, other=0.0), 0)
    if CANCELS * value < size:
        value = value * 0.0
        for m in range(0, M, BM):
            rows = m + tl.arange(0, BM)
            h = load_tile(H, m, 0, M, r, shm, 1, BM, R, False)  # (BM, R)
            square = tl.zeros((BM,), tl.float32)
            for n in range(0, N, BN):
                b = load_tile(B, 0, n, r, N, sbr, sbn, R, BN, False)  # (R, BN)
                delta = tl.dot(h, b.to(DTYPE))  # (BM, BN)
                square += tl.sum(delta * delta, 1)
            if WEIGHTED:
                weights = tl.load(WEIGHTS + rows, mask=rows < M, other=0.0)
                square = tl.where(weights > 0.0, square * weights, 0.0)
            value += tl.sum(square.to(tl.float64), 0)
    tl.store(OUT, value * scale * scale)


@kernel(do_not_specialize=["count"])
def _total(PARTS, OUT, count, scale, BLOCK: tl.constexpr):
    """scale²·Σ PARTS, in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(PARTS + at, mask=at < count, other=0.0)
    tl.store(OUT, tl.sum(total, 0) * scale * scale)


def new_grams(like: Tensor, r: int, blocks: int, b_blocks: int) -> Grams:
    """Memory for so many blocks; none of B if there are no blocks of it."""
    tile = rank_tile(r)
    of_h = like.new_empty((blocks, tile, tile), dtype=torch.float32)
    return Grams(of_h, of_h.new_empty((b_blocks, tile, tile)) if b_blocks else None)


def wide_grams(h: Tensor, B: Tensor | None, token_weights: Tensor | None) -> Grams:
    """The Gram matrices of an h that `shrink` has not made, or that is too wide for it, and of B
    where there is one.

    h (M, r) rows contiguous   B (N, r)   token_weights (M,) float32
    """
    (m, r), n = h.shape, 0 if B is None else B.shape[0]
    tile, side = rank_tile(r), min(32, rank_tile(r))
    blocks, b_blocks = cdiv(m, _ROWS), cdiv(n, _ROWS)
    grams = new_grams(h, r, blocks, b_blocks)
    _gram(
        (blocks + b_blocks, (tile // side) ** 2), (h, B, token_weights, *grams), (m, n, blocks),
        (r, h.stride(0), *((0, 0) if B is None else B.stride())), 4, 2,
        R=tile, ROWS=_ROWS, TILE=64, SIDE=side, WEIGHTED=token_weights is not None,
        NORM=B is not None, DTYPE=triton_dtype(h.dtype),
    )  # fmt: skip
    return grams


def sums(
    grams: Grams,
    h: Tensor,
    B: Tensor,
    scale: float,
    token_weights: Tensor | None,
    *,
    gram: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """scale²·Σ_t w_t ‖B·h_t‖², 0-dim, where `grams` has B's, and with `gram` Σ_t w_t h_t h_tᵀ,
    (r, r): both float64.

    h (M, r) rows contiguous   B (N, r)   token_weights (M,) float32
    """
    (m, r), n, size = h.shape, B.shape[0], grams.of_h[0].numel()
    width = max(32, size // _SLICES)  # 32: a line of memory of each block
    slices, tile, norm = size // width, rank_tile(r), grams.of_b is not None
    parts = h.new_empty((slices, 2), dtype=torch.float64) if norm else None
    out = h.new_empty((), dtype=torch.float64) if norm else None
    kept = h.new_empty((r, r), dtype=torch.float64) if gram else None
    b_blocks = 0 if grams.of_b is None else len(grams.of_b)
    _add_blocks(
        (slices,), (*grams, parts, kept), (len(grams.of_h), b_blocks, r), (), 8,
        R=tile, SLICE=width, TOGETHER=4096 // width, NORM=norm, KEPT=gram,
    )  # fmt: skip
    if not norm:
        return None, kept
    _sqnorm(
        (1,), (parts, h, B, token_weights, out), (m, n, slices, float(scale)),
        (r, h.stride(0), *B.stride()), 4, 2,
        R=tile, SLICES=_SLICES, WEIGHTED=token_weights is not None, DTYPE=triton_dtype(h.dtype),
        CANCELS=_CANCELS, BM=64, BN=64 if tile <= 128 else 32,
    )  # fmt: skip
    return out, kept


def total(parts: Tensor, scale: float) -> Tensor:
    """scale²·Σ parts, 0-dim float64: the squared norm from the sums of tiles."""
    out = parts.new_empty((), dtype=torch.float64)
    _total((1,), (parts, out), (parts.numel(), float(scale)), (), 4, BLOCK=1024)
    return out
