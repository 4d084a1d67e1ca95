"""The adapters in x's dtype, in one launch: for kernels that load no other, and where it pays.

    a = A    b = s·B             A, a (r, K)   B, b (N, r)
"""

import triton
import triton.language as tl
from torch import Tensor, dtype

from loradrop.kernels.gemm_ext import in_eights
from loradrop.kernels.launch import kernel
from loradrop.kernels.tiles import cdiv, new_rows, triton_dtype

_BLOCK = 1024  # numbers of a program


@triton.jit
def _copy(FROM, TO, scale, i, rows, columns, sr, sc, st, EIGHTS: tl.constexpr,
          DTYPE: tl.constexpr):  # fmt: skip
    columns, sr, st = in_eights(columns, EIGHTS), in_eights(sr, EIGHTS), in_eights(st, EIGHTS)
    inside = (i >= 0) & (i < rows * columns)
    row, column = (i // columns).to(tl.int64), (i % columns).to(tl.int64)
    value = tl.load(FROM + row * sr + column * sc, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(TO + row * st + column, value.to(DTYPE), mask=inside)


@kernel()
def _cast(A, B, TO_A, TO_B, scale, of_a, rows_a, columns_a, sar, sac, sta, rows_b, columns_b, sbr,
          sbc, stb, BLOCK: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
          EIGHTS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if HAS_A:  # the first programs, so many as `of_a`
        _copy(A, TO_A, 1.0, i, rows_a, columns_a, sar, sac, sta, EIGHTS, DTYPE)
    if HAS_B:  # and the others
        _copy(B, TO_B, scale, i - of_a * BLOCK, rows_b, columns_b, sbr, sbc, stb, EIGHTS, DTYPE)


def cast(
    A: Tensor | None, B: Tensor | None, scale: float, to: dtype
) -> tuple[Tensor | None, Tensor | None]:
    """A and scale·B in a dtype of at most 32 bits and in `rows_aligned`; None for what is None.

    A (r, K), B (N, r) of any strides and float dtype
    """
    if A is None and B is None:
        return None, None
    a, of_a, form_a = _copied(A, to)
    b, of_b, form_b = _copied(B, to)
    _cast(
        (of_a + of_b,), (A, B, a, b), (float(scale),), (of_a, *form_a, *form_b),
        BLOCK=_BLOCK, HAS_A=A is not None, HAS_B=B is not None,
        EIGHTS=_in_eights(*form_a) and _in_eights(*form_b), DTYPE=triton_dtype(to),
    )  # fmt: skip
    return a, b


def _copied(matrix: Tensor | None, to: dtype) -> tuple[Tensor | None, int, tuple[int, ...]]:
    """Memory for its copy, how many programs write that, and the shape and the strides of both."""
    if matrix is None:
        return None, 0, (0, 0, 0, 0, 0)
    rows, columns = matrix.shape
    made = new_rows(matrix, rows, columns, to)
    form = (rows, columns, *matrix.stride(), made.stride(0))
    return made, cdiv(rows * columns, _BLOCK), form


def _in_eights(rows: int, columns: int, row: int, column: int, to_row: int) -> bool:
    return columns % 8 == row % 8 == to_row % 8 == 0
