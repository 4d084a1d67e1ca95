"""The LoRA product added to a base that is already there, in one pass over it.

    y = base + scale·mask∘(h·l)             base, y (M, C)   h (M, r)   l (r, C)

It serves `lora_add`, whose backward pass has no base, and dx under dropout where another kernel
made the frozen product, cuBLAS's or one of csrc/: there it adds in place. Without a mask cuBLAS's
`addmm_` does the same.
"""

import torch
import triton.language as tl
from torch import Tensor

from loradrop.kernels.gemm_ext import add_thin, load_tile, mask_words
from loradrop.kernels.launch import kernel
from loradrop.kernels.philox import where_kept
from loradrop.kernels.tiles import (
    GemmTiles,
    cdiv,
    dot_precision,
    rank_step,
    rank_tile,
    triton_dtype,
)


@kernel(do_not_specialize=["M"])
def _expand(BASE, H, L, Y, MASK, M, scale, C, r, sbm, sbc, shm, slr, slc, sym, smask,
            BM: tl.constexpr, BN: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr,
            HAS_BASE: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    acc = add_thin(acc, H, L, m, n, M, C, r, shm, slr, slc, 1.0,
                   BM, BN, RANKS, STEP, False, DTYPE, PRECISION)  # fmt: skip
    acc *= scale
    if MASKED:
        acc = where_kept(mask_words(MASK, m, n, M, smask, BM, BN), acc)
    if HAS_BASE:
        acc += load_tile(BASE, m, n, M, C, sbm, sbc, BM, BN, False).to(tl.float32)
    rows, columns = m + tl.arange(0, BM), n + tl.arange(0, BN)
    place = rows.to(tl.int64)[:, None] * sym + columns[None, :]
    tl.store(Y + place, acc.to(DTYPE), mask=(rows < M)[:, None] & (columns < C)[None, :])


def expand(
    base: Tensor | None,
    h: Tensor,
    l: Tensor,
    scale: float,
    tiles: GemmTiles,
    mask: Tensor | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """base + scale·mask∘(h·l), in h's dtype; without a base the product alone.

    base (M, C) of any strides   h (M, r) rows contiguous   l (r, C) of any strides and float dtype
    mask (M, row_bytes(C)) uint8   in_place: into `base`, which is contiguous
    """
    (m, r), c = h.shape, l.shape[1]
    y = base if in_place and base is not None else h.new_empty((m, c))
    words = None if mask is None else mask.view(torch.int32)
    _expand(
        (cdiv(m, tiles.BM), cdiv(c, tiles.BN)), (base, h, l, y, words), (m, float(scale)),
        (c, r, *((0, 0) if base is None else base.stride()), h.stride(0), *l.stride(), c,
         0 if words is None else words.stride(0)),
        tiles.warps, tiles.stages,
        BM=tiles.BM, BN=tiles.BN, RANKS=rank_tile(r), STEP=rank_step(h.dtype, r),
        HAS_BASE=base is not None, MASKED=mask is not None, DTYPE=triton_dtype(h.dtype),
        PRECISION=dot_precision(h.dtype),
    )  # fmt: skip
    return y
