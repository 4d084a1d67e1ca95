"""One read of dy for both of its thin products.

    t = scale·dyB            (M, r)     dy (M, N)   B (N, r)
    dB = scale_dB·dyᵀh       (N, r)     h (M, r)

`shrink` and `outer` read dy once each. Here a program owns BC columns of dy and a part of its rows:
it keeps its B and its sum of dB in registers, and writes what its columns add to t as a plane.
`_finish` adds the planes of t and `_add_planes` those of dB, in their order: no atomics, the same
bits in every run.
"""

import torch
import triton.language as tl
from torch import Tensor

from loradrop.kernels.gemm_ext import in_eights
from loradrop.kernels.launch import kernel
from loradrop.kernels.outer import add_planes
from loradrop.kernels.shrink import add_parts, new_planes
from loradrop.kernels.tiles import OuterTiles, cdiv, dot_precision, new_rows, rank_tile


@kernel(do_not_specialize=["M", "rows_per_part"])
def _t_and_db(DY, H, B, T_PLANES, OUT, M, rows_per_part, scale_dB,
              N, r, sdm, sdn, shm, shr, sbn, sbr, plane,
              BC: tl.constexpr, BM: tl.constexpr, R: tl.constexpr,
              EIGHTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    r, shm, sbn = in_eights(r, EIGHTS), in_eights(shm, EIGHTS), in_eights(sbn, EIGHTS)
    slice, part = tl.program_id(0), tl.program_id(1)
    columns, ranks = slice * BC + tl.arange(0, BC), tl.arange(0, R)
    inside = (columns < N)[:, None] & (ranks < r)[None, :]
    b_at = B + columns.to(tl.int64)[:, None] * sbn + ranks[None, :] * sbr
    b = tl.load(b_at, mask=inside, other=0.0).to(DY.dtype.element_ty)  # (BC, R)
    acc = tl.zeros((R, BC), tl.float32)
    first = part * rows_per_part
    for m in range(first, min(M, first + rows_per_part), BM):
        rows = m + tl.arange(0, BM)
        there, at = rows < M, rows.to(tl.int64)[:, None]
        dy = tl.load(DY + at * sdm + columns.to(tl.int64)[None, :] * sdn,
                     mask=there[:, None] & (columns < N)[None, :], other=0.0)  # (BM, BC)
        h = tl.load(H + at * shm + ranks[None, :] * shr,
                    mask=there[:, None] & (ranks < r)[None, :], other=0.0)  # (BM, R)
        acc = tl.dot(tl.trans(h), dy, acc, input_precision=PRECISION)
        t = tl.dot(dy, b, input_precision=PRECISION)  # (BM, R)
        place = (slice * M + rows).to(tl.int64)[:, None] * R + ranks[None, :]
        tl.store(T_PLANES + place, t, mask=there[:, None])
    place = part * plane + columns.to(tl.int64)[None, :] * r + ranks[:, None]
    tl.store(OUT + place, (acc * scale_dB).to(OUT.dtype.element_ty),
             mask=(columns < N)[None, :] & (ranks < r)[:, None])  # fmt: skip


def t_and_db(
    dy: Tensor,
    B: Tensor,
    h: Tensor,
    scale: float,
    scale_dB: float,
    dtype: torch.dtype,
    tiles: OuterTiles,
) -> tuple[Tensor, Tensor]:
    """t = scale·dyB (M, r) in dy's dtype and in `rows_aligned`, and dB = scale_dB·dyᵀh (N, r) in
    `dtype`, both summed in float32.

    dy (M, N) and h (M, r) of any strides, one dtype   B (N, r) of any strides and float dtype
    """
    (m, n), r = dy.shape, h.shape[1]
    ranks, slices = rank_tile(r), cdiv(n, tiles.BC)
    rows_per_part = cdiv(cdiv(m, tiles.split), tiles.BM) * tiles.BM
    split = cdiv(m, rows_per_part)
    t, dB = new_rows(dy, m, r), dy.new_empty((n, r), dtype=dtype)
    t_planes = new_planes(dy, slices, m, ranks)
    planes = dB if split == 1 else new_planes(dy, split, n, r)
    (h_row, h_column), (b_row, b_column) = h.stride(), B.stride()
    _t_and_db(
        (slices, split), (dy, h, B, t_planes, planes), (m, rows_per_part, float(scale_dB)),
        (n, r, *dy.stride(), h_row, h_column, b_row, b_column, n * r),
        tiles.warps, tiles.stages,
        BC=tiles.BC, BM=tiles.BM, R=ranks, EIGHTS=r % 8 == h_row % 8 == b_row % 8 == 0,
        PRECISION=dot_precision(dy.dtype),
    )  # fmt: skip
    add_parts(t_planes, t, scale)
    if split > 1:
        add_planes(planes, dB)
    return t, dB
