"""The whole forward in one pass: x·Wᵀ and x·Aᵀ in one loop over K, for few rows or narrow outputs.

    h = x Aᵀ        y = xWᵀ + b + s·hBᵀ        sqnorms[tile] = Σ_t w_t ‖h_t Bᵀ‖² over the tile

Every program computes h again, which costs r / BN of the product (half of it at r = 16), and reads
A again, from L2. That pays for few tokens, where W has to be read anyway and a second launch would
cost more. The LoRA product has a sum of its own, so its squared norm falls out of the tile, and y
has the same bits with and without it.
"""

import torch
import triton.language as tl
from torch import Tensor

from loradrop.kernels.gemm_ext import load_tile
from loradrop.kernels.launch import kernel
from loradrop.kernels.tiles import GemmTiles, cdiv, dot_precision, rank_tile, triton_dtype


@kernel(do_not_specialize=["M"])
def _single_pass(X, W, A, B, BIAS, Y, H, WEIGHTS, SQNORMS, M, scale,
                 N, K, r, sxm, sxk, swn, swk, sar, sak, sbn, sbr, shm,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
                 HAS_BIAS: tl.constexpr, SQNORM: tl.constexpr, WEIGHTED: tl.constexpr,
                 DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc, thin = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, R), tl.float32)
    for k in range(0, K, BK):
        x = load_tile(X, m, k, M, K, sxm, sxk, BM, BK, False)  # (BM, BK)
        w = load_tile(W, k, n, K, N, swk, swn, BK, BN, False)  # (BK, BN)
        a = load_tile(A, k, 0, K, r, sak, sar, BK, R, False).to(DTYPE)  # (BK, R)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        thin = tl.dot(x, a, thin, input_precision=PRECISION)
    h = thin.to(DTYPE)
    rows, ranks, columns = m + tl.arange(0, BM), tl.arange(0, R), n + tl.arange(0, BN)
    if n == 0:
        place = rows.to(tl.int64)[:, None] * shm + ranks[None, :]
        tl.store(H + place, h, mask=(rows < M)[:, None] & (ranks < r)[None, :])
    b = load_tile(B, 0, n, r, N, sbr, sbn, R, BN, False).to(DTYPE)  # (R, BN)
    delta = tl.dot(h, b, input_precision=PRECISION)  # (BM, BN)
    if SQNORM:
        square = tl.sum(delta * delta, 1)  # (BM,)
        if WEIGHTED:
            weights = tl.load(WEIGHTS + rows, mask=rows < M, other=0.0)
            square = tl.where(weights > 0.0, square * weights, 0.0)
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(SQNORMS + tile, tl.sum(square, 0))
    acc += scale * delta
    if HAS_BIAS:
        acc += tl.load(BIAS + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    place = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(Y + place, acc.to(DTYPE), mask=(rows < M)[:, None] & (columns < N)[None, :])


def single_pass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    tiles: GemmTiles,
    *,
    sqnorm: bool = False,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, h and, with `sqnorm`, the sums of w·(hBᵀ)² by tile, in float32. Without dropout.

    x (M, K)   weight (N, K)   A (r, K)   B (N, r), all of any strides   bias (N,) or None
    token_weights (M,) float32   ->  y (M, N), h (M, r), (tiles,) or None
    """
    (m, k), (n, r) = x.shape, B.shape
    bias = None if bias is None else bias.contiguous()
    y, h = x.new_empty((m, n)), x.new_empty((m, r))
    grid = cdiv(m, tiles.BM), cdiv(n, tiles.BN)
    sqnorms = x.new_empty(grid[0] * grid[1], dtype=torch.float32) if sqnorm else None
    _single_pass(
        grid, (x, weight, A, B, bias, y, h, token_weights, sqnorms), (m, float(scale)),
        (n, k, r, *x.stride(), *weight.stride(), *A.stride(), *B.stride(), h.stride(0)),
        tiles.warps, tiles.stages,
        BM=tiles.BM, BN=tiles.BN, BK=tiles.BK, R=rank_tile(r), HAS_BIAS=bias is not None,
        SQNORM=sqnorm, WEIGHTED=token_weights is not None, DTYPE=triton_dtype(x.dtype),
        PRECISION=dot_precision(x.dtype),
    )  # fmt: skip
    return y, h, sqnorms
