"""The squared norm of the LoRA output, from Gram matrices that are r x r.

    Σ_t w_t ‖s·B·h_t‖² = s²·⟨G, C⟩          G = Σ_t w_t h_t h_tᵀ      C = Σ_n B_n B_nᵀ

G comes in blocks of rows from the pass that makes h (`shrink`), C beside it. Products of two half-
precision numbers are exact in float32, sums over a block are float32, everything after is float64
in a fixed order.

The inner product cancels where h lies in directions that B maps to almost nothing. Float32 sums
then lack digits. `_sqnorm` sees it from ⟨|G|, |C|⟩ and sums the squared products themselves
instead, tile by tile, in one program: slow, but rarely needed, and exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loradrop.kernels.tiles import cdiv, rank_tile, triton_dtype

_CANCELS = 16  # ⟨G, C⟩ of less than a sixteenth of ⟨|G|, |C|⟩
_ROWS = 256  # rows of h or B in one program of `_gram`
_SLICE = 1024  # elements of a Gram matrix in one program of `_dot`


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


@triton.jit(do_not_specialize=["M", "N", "blocks"])
def _gram(H, B, WEIGHTS, GRAM, GRAM_B, M, N, r, shm, sbn, sbr, blocks,
          R: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
          WEIGHTED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
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
        if of_b:
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
    if of_b:
        tl.store(GRAM_B + place, total)
    else:
        tl.store(GRAM + place, total)


@triton.jit
def _sum_planes(GRAM, count, at, SIZE: tl.constexpr, SLICE: tl.constexpr):
    """Σ over `count` planes of SIZE numbers, at the places `at` (SLICE,); several at a time."""
    TOGETHER: tl.constexpr = 4096 // SLICE
    total = tl.zeros((SLICE,), tl.float64)
    for start in range(0, count, TOGETHER):
        planes = start + tl.arange(0, TOGETHER)
        place = planes.to(tl.int64)[:, None] * SIZE + at[None, :]
        inside = (planes < count)[:, None] & (at < SIZE)[None, :]
        total += tl.sum(tl.load(GRAM + place, mask=inside, other=0.0).to(tl.float64), 0)
    return total


@triton.jit(do_not_specialize=["blocks", "b_blocks"])
def _dot(GRAM, GRAM_B, PARTS, blocks, b_blocks, SIZE: tl.constexpr, SLICE: tl.constexpr):
    """One slice of ⟨G, C⟩ and of ⟨|G|, |C|⟩, into PARTS (slices, 2)."""
    piece = tl.program_id(0)
    at = piece * SLICE + tl.arange(0, SLICE)
    product = _sum_planes(GRAM, blocks, at, SIZE, SLICE)
    product *= _sum_planes(GRAM_B, b_blocks, at, SIZE, SLICE)
    tl.store(PARTS + 2 * piece, tl.sum(product, 0))
    tl.store(PARTS + 2 * piece + 1, tl.sum(tl.abs(product), 0))


@triton.jit(do_not_specialize=["M", "N", "blocks", "b_blocks", "slices"])
def _sqnorm(PARTS, GRAM, GRAM_B, H, B, WEIGHTS, OUT,
            M, N, r, shm, sbn, sbr, blocks, b_blocks, slices, scale,
            R: tl.constexpr, SIZE: tl.constexpr, SLICE: tl.constexpr, WHOLE: tl.constexpr,
            WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, CANCELS: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """The squared norm from the inner products, or from the products h·Bᵀ where those cancel."""
    if WHOLE:
        at = tl.arange(0, SLICE)
        product = _sum_planes(GRAM, blocks, at, SIZE, SLICE)
        product *= _sum_planes(GRAM_B, b_blocks, at, SIZE, SLICE)
        value, size = tl.sum(product, 0), tl.sum(tl.abs(product), 0)
    else:
        at = tl.arange(0, SLICE)
        value = tl.sum(tl.load(PARTS + 2 * at, mask=at < slices, other=0.0), 0)
        size = tl.sum(tl.load(PARTS + 2 * at + 1, mask=at < slices, other=0.0), 0)
    if CANCELS * value < size:
        value = value * 0.0
        for m in range(0, M, BM):
            rows = m + tl.arange(0, BM)
            square = tl.zeros((BM,), tl.float32)
            for n in range(0, N, BN):
                columns = n + tl.arange(0, BN)
                delta = tl.zeros((BM, BN), tl.float32)
                for k in range(0, R, STEP):
                    ranks = k + tl.arange(0, STEP)
                    h = tl.load(H + rows.to(tl.int64)[:, None] * shm + ranks[None, :],
                                mask=(rows < M)[:, None] & (ranks < r)[None, :], other=0.0)
                    b = tl.load(B + columns.to(tl.int64)[None, :] * sbn + ranks[:, None] * sbr,
                                mask=(columns < N)[None, :] & (ranks < r)[:, None], other=0.0)
                    delta = tl.dot(h, b.to(DTYPE), delta)  # (BM, BN)
                square += tl.sum(delta * delta, 1)
            if WEIGHTED:
                weights = tl.load(WEIGHTS + rows, mask=rows < M, other=0.0)
                square = tl.where(weights > 0.0, square * weights, 0.0)
            value += tl.sum(square.to(tl.float64), 0)
    tl.store(OUT, (value * scale * scale).to(tl.float32))


@triton.jit(do_not_specialize=["count"])
def _total(PARTS, OUT, count, scale, BLOCK: tl.constexpr):
    """scale²·Σ PARTS, in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(PARTS + at, mask=at < count, other=0.0)
    tl.store(OUT, (tl.sum(total, 0) * scale * scale).to(tl.float32))


def wide_grams(h: Tensor, B: Tensor, token_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The Gram matrices of h and of B, (blocks, R, R), where the rank is too wide for `shrink`."""
    (m, r), n = h.shape, B.shape[0]
    tile, side = rank_tile(r), 32
    blocks, b_blocks = cdiv(m, _ROWS), cdiv(n, _ROWS)
    grams = [h.new_empty((count, tile, tile), dtype=torch.float32) for count in (blocks, b_blocks)]
    _gram[(blocks + b_blocks, (tile // side) ** 2)](
        h, B, token_weights, *grams, m, n, r, h.stride(0), *B.stride(), blocks,
        R=tile, ROWS=_ROWS, TILE=64, SIDE=side, WEIGHTED=token_weights is not None,
        DTYPE=triton_dtype(h.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    return grams[0], grams[1]


def sqnorm(
    grams: tuple[Tensor, Tensor],
    h: Tensor,
    B: Tensor,
    scale: float,
    token_weights: Tensor | None,
) -> Tensor:
    """scale²·Σ_t w_t ‖B·h_t‖², 0-dim float32.

    grams (blocks, R, R) of h, weighted, and of B   h (M, r) rows contiguous   B (N, r)
    token_weights (M,) float32
    """
    (m, r), n, size = h.shape, B.shape[0], grams[0][0].numel()
    blocks, b_blocks = len(grams[0]), len(grams[1])
    slices = cdiv(size, _SLICE)
    out = h.new_empty((), dtype=torch.float32)
    parts = None
    if slices > 1:
        parts = h.new_empty((slices, 2), dtype=torch.float64)
        _dot[(slices,)](*grams, parts, blocks, b_blocks, SIZE=size, SLICE=_SLICE, num_warps=4)
    _sqnorm[(1,)](
        parts, *grams, h, B, token_weights, out, m, n, r, h.stride(0), *B.stride(),
        blocks, b_blocks, slices, scale,
        R=rank_tile(r), SIZE=size, SLICE=min(size, _SLICE) if slices == 1 else 64,
        WHOLE=slices == 1, WEIGHTED=token_weights is not None, DTYPE=triton_dtype(h.dtype),
        CANCELS=_CANCELS, BM=64, BN=64, STEP=min(rank_tile(r), 64), num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def total(parts: Tensor, scale: float) -> Tensor:
    """scale²·Σ parts, 0-dim float32, summed in float64: the squared norm from the sums of tiles."""
    out = parts.new_empty((), dtype=torch.float32)
    _total[(1,)](parts, out, parts.numel(), scale, BLOCK=1024, num_warps=4)
    return out
