"""The frozen product with the LoRA product as further steps of the same sum.

    y = p·q + b + s·h·l             p (M, D)   q (D, C)   b (C,)   h (M, r)   l (r, C)   y (M, C)

    forward    p = x    q = Wᵀ   l = Bᵀ       y  = xWᵀ + b + s·hBᵀ
    backward   p = dy   q = W    l = A        dx = dy W + mask∘(tA)

The LoRA product is the last chunk of the sum (`FIRST` off). With a mask on it, it is the first:
what is in the accumulator then is the LoRA product alone. A last chunk of few ranks is loaded
before the sum, into registers, so that no tile waits for it (`AHEAD`). Persistent: the programs go
through the tiles in groups that keep q in L2.

A scale other than 1 has to act on the LoRA product only. Last, it multiplies h where that is exact
(`SCALE` "h"); elsewhere the sum is divided by s before the chunk and multiplied after ("sum"), two
roundings in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loradrop.kernels.descriptors import descriptor
from loradrop.kernels.launch import kernel
from loradrop.kernels.philox import where_kept
from loradrop.kernels.tiles import (
    GemmTiles,
    as_stored,
    cdiv,
    dot_precision,
    rank_step,
    rank_tile,
    rows_aligned,
    scale_mode,
    triton_dtype,
)

_AHEAD = 128  # bytes of a column of l for which registers beside a tile suffice


@triton.jit
def in_eights(n, KNOWN: tl.constexpr):
    """n, a multiple of 8 where KNOWN. Triton itself looks for multiples of 16 only, and loads one
    number at a time where it does not know that rows begin at whole 16 bytes."""
    return n // 8 * 8 if KNOWN else n


@triton.jit
def load_tile(P, first, second, rows, columns, s0, s1,
              BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """The tile (BR, BC) of P (rows, columns) at (first, second), zero outside."""
    if TMA:
        tile = P.load([first, second])
    else:
        i, j = first + tl.arange(0, BR), second + tl.arange(0, BC)
        place = i.to(tl.int64)[:, None] * s0 + j.to(tl.int64)[None, :] * s1
        tile = tl.load(P + place, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)
    return tile


@triton.jit
def as_bits(tile):
    """A tile as integers. Those stay in registers, where Triton would move numbers that are ready
    for a product to shared memory at once."""
    return tile.to(tl.int16 if tile.dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True)


@triton.jit
def add_thin(acc, H, L, m, n, M, C, r, shm, slr, slc, scale,
             BM: tl.constexpr, BN: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr,
             SCALED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + h·l for the tile at (m, n), with scale·h for h where SCALED."""
    for k in tl.range(0, RANKS, STEP, num_stages=1):
        h = load_tile(H, m, k, M, r, shm, 1, BM, STEP, False)  # (BM, STEP)
        if SCALED:
            h = (h.to(tl.float32) * scale).to(DTYPE)
        l = load_tile(L, k, n, r, C, slr, slc, STEP, BN, False)  # (STEP, BN)
        acc = tl.dot(h, l.to(DTYPE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def mask_words(MASK, m, n, M, smask, BM: tl.constexpr, BN: tl.constexpr):
    """The mask (BM, BN / 32) int32 of the tile at (m, n); `smask` words a row."""
    rows, words = m + tl.arange(0, BM), n // 32 + tl.arange(0, BN // 32)
    inside = (rows < M)[:, None] & (words < smask)[None, :]
    return tl.load(MASK + rows.to(tl.int64)[:, None] * smask + words[None, :], inside, other=0)


@triton.jit
def place_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """The row and the column of a tile in an order that keeps GROUP rows of count together."""
    per_group = GROUP * tiles_n
    first = tile // per_group * GROUP
    height = min(tiles_m - first, GROUP)
    return first + tile % per_group % height, tile % per_group // height


@kernel(do_not_specialize=["M"])
def _gemm_ext(P, Q, H, L, BIAS, Y, MASK, M, scale, inverse,
              C, D, r, spm, spd, sqd, sqc, shm, slr, slc, sym, smask,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RANKS: tl.constexpr,
              STEP: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
              Q_T: tl.constexpr, HAS_BIAS: tl.constexpr, FIRST: tl.constexpr,
              MASKED: tl.constexpr, SCALE: tl.constexpr, LORA: tl.constexpr, AHEAD: tl.constexpr,
              H_EIGHTS: tl.constexpr, L_EIGHTS: tl.constexpr, HALVES: tl.constexpr,
              DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    r, shm, slc = in_eights(r, H_EIGHTS), in_eights(shm, H_EIGHTS), in_eights(slc, L_EIGHTS)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(C, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=False):
        tile_m, tile_n = place_tile(tile, tiles_m, tiles_n, GROUP)
        m, n = tile_m * BM, tile_n * BN
        acc = tl.zeros((BM, BN), tl.float32)
        if FIRST:
            acc = add_thin(acc, H, L, m, n, M, C, r, shm, slr, slc, 1.0,
                           BM, BN, RANKS, STEP, False, DTYPE, PRECISION)  # fmt: skip
            acc *= scale
            if MASKED:
                acc = where_kept(mask_words(MASK, m, n, M, smask, BM, BN), acc)
        if AHEAD:
            h = as_bits(load_tile(H, m, 0, M, r, shm, 1, BM, STEP, False))
            l = as_bits(load_tile(L, 0, n, r, C, slr, slc, STEP, BN, False))
        for d in range(0, D, BK):
            p = load_tile(P, m, d, M, D, spm, spd, BM, BK, TMA)  # (BM, BK)
            if Q_T:
                q = load_tile(Q, n, d, C, D, sqc, sqd, BN, BK, TMA).T
            else:
                q = load_tile(Q, d, n, D, C, sqd, sqc, BK, BN, TMA)  # (BK, BN)
            acc = tl.dot(p, q, acc, input_precision=PRECISION)
        if LORA and not FIRST:
            if SCALE == "sum":
                acc *= inverse
            if AHEAD:
                h = h.to(DTYPE, bitcast=True)
                if SCALE == "h":
                    h = (h.to(tl.float32) * scale).to(DTYPE)
                l = l.to(L.dtype.element_ty, bitcast=True)
                acc = tl.dot(h, l.to(DTYPE), acc, input_precision=PRECISION)
            else:
                acc = add_thin(acc, H, L, m, n, M, C, r, shm, slr, slc, scale,
                               BM, BN, RANKS, STEP, SCALE == "h", DTYPE, PRECISION)  # fmt: skip
            if SCALE == "sum":
                acc *= scale
        if HALVES == 1:
            _store(Y, BIAS, acc, m, n, M, C, sym, BM, BN, TMA, HAS_BIAS, DTYPE)
        else:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
            _store(Y, BIAS, left, m, n, M, C, sym, BM, BN // 2, TMA, HAS_BIAS, DTYPE)
            _store(Y, BIAS, right, m, n + BN // 2, M, C, sym, BM, BN // 2, TMA, HAS_BIAS, DTYPE)


@triton.jit
def _store(Y, BIAS, acc, m, n, M, C, sym, BM: tl.constexpr, BN: tl.constexpr,
           TMA: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Adds the bias, rounds, and stores the tile at (m, n)."""
    columns = n + tl.arange(0, BN)
    if HAS_BIAS:
        acc += tl.load(BIAS + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    if TMA:
        Y.store([m, n], acc.to(DTYPE))
    else:
        rows = m + tl.arange(0, BM)
        place = rows.to(tl.int64)[:, None] * sym + columns[None, :]
        tl.store(Y + place, acc.to(DTYPE), mask=(rows < M)[:, None] & (columns < C)[None, :])


def divides(scale: float) -> bool:
    """Whether a sum can be divided by it and multiplied again."""
    return scale == 0.0 or 2.0**-40 < abs(scale) < 2.0**40


def gemm_ext(
    p: Tensor,
    q: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    l: Tensor | None,
    scale: float,
    tiles: GemmTiles,
    programs: int,
    *,
    mask: Tensor | None = None,
    first: bool = False,
) -> Tensor:
    """y = p·q + bias + scale·mask∘(h·l) in p's dtype (M, C); without h and l the product alone.

    p (M, D)   q (D, C) in either layout   bias (C,) or None   h (M, r) rows contiguous   l (r, C)
    of any strides and float dtype   mask (M, row_bytes(C)) uint8

    At most `programs` programs run. The LoRA product comes first where a mask or a scale that no
    sum can be divided by needs it by itself, or `first` asks for it.
    """
    (m, d), c, r = p.shape, q.shape[1], 1 if h is None else h.shape[1]
    h_row, l_strides = (0, (0, 0)) if h is None or l is None else (h.stride(0), l.stride())
    first = first or mask is not None or not divides(scale)
    bias = None if bias is None else bias.contiguous()
    y = p.new_empty((m, c))
    stored = as_stored(q)
    turned = stored is not q
    tma = tiles.tma and d > 0 and all(map(rows_aligned, (p, stored, y)))
    count = cdiv(m, tiles.BM) * cdiv(c, tiles.BN)
    words = None if mask is None else mask.view(torch.int32)
    ranks, step = rank_tile(r), rank_step(p.dtype, r)
    narrow = l is not None and l.element_size() <= 4 and ranks * l.element_size() <= _AHEAD
    ahead = narrow and not first and ranks == step
    wide: tuple[object, ...] = (p, q, y)
    if tma:
        box = (tiles.BN, tiles.BK) if turned else (tiles.BK, tiles.BN)
        wide = (
            descriptor(p, tiles.BM, tiles.BK),
            descriptor(stored, *box),
            descriptor(y, tiles.BM, tiles.BN // tiles.halves),
        )
    _gemm_ext(
        (min(programs, count),), (wide[0], wide[1], h, l, bias, wide[2], words),
        (m, float(scale), 1.0 / scale if scale else 0.0),
        (c, d, r, *p.stride(), *q.stride(), h_row, *l_strides, c,
         0 if words is None else words.stride(0)),
        tiles.warps, tiles.stages,
        BM=tiles.BM, BN=tiles.BN, BK=tiles.BK, RANKS=ranks, STEP=step,
        GROUP=tiles.group, TMA=tma, Q_T=turned, HAS_BIAS=bias is not None, FIRST=first,
        MASKED=mask is not None, SCALE=scale_mode(scale, p.dtype), LORA=h is not None,
        AHEAD=ahead, H_EIGHTS=r % 8 == h_row % 8 == 0, L_EIGHTS=l_strides[1] % 8 == 0,
        HALVES=tiles.halves, DTYPE=triton_dtype(p.dtype), PRECISION=dot_precision(p.dtype),
    )  # fmt: skip
    return y
