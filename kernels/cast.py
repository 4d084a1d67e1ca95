"""The adapters in x's dtype, in one launch: kernels that load no other read these.

    a = A    b = s·B             A, a (r, K)   B, b (N, r)
"""

import triton
import triton.language as tl
from torch import Tensor, dtype

from loradrop.kernels.launch import kernel
from loradrop.kernels.tiles import cdiv, triton_dtype

_BLOCK = 1024  # numbers of a program


@triton.jit
def _copy(FROM, TO, scale, i, rows, columns, sr, sc, DTYPE: tl.constexpr):
    inside = (i >= 0) & (i < rows * columns)
    at = (i // columns).to(tl.int64) * sr + (i % columns).to(tl.int64) * sc
    value = tl.load(FROM + at, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(TO + i, value.to(DTYPE), mask=inside)


@kernel()
def _cast(A, B, TO_A, TO_B, scale, of_a, rows_a, columns_a, sar, sac, rows_b, columns_b, sbr, sbc,
          BLOCK: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
          DTYPE: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if HAS_A:  # the first programs, so many as `of_a`
        _copy(A, TO_A, 1.0, i, rows_a, columns_a, sar, sac, DTYPE)
    if HAS_B:  # and the others
        _copy(B, TO_B, scale, i - of_a * BLOCK, rows_b, columns_b, sbr, sbc, DTYPE)


def cast(
    A: Tensor | None, B: Tensor | None, scale: float, to: dtype
) -> tuple[Tensor | None, Tensor | None]:
    """A and scale·B in a dtype of at most 32 bits, contiguous; None for what is None.

    A (r, K), B (N, r) of any strides and float dtype
    """
    if A is None and B is None:
        return None, None
    a, b = (None if given is None else given.new_empty(given.shape, dtype=to) for given in (A, B))
    of_a, of_b = (0 if given is None else cdiv(given.numel(), _BLOCK) for given in (A, B))
    forms = (
        (0, 0, 0, 0) if given is None else (*given.shape, *given.stride()) for given in (A, B)
    )
    form_a, form_b = forms
    _cast(
        (of_a + of_b,), (A, B, a, b), (float(scale),), (of_a, *form_a, *form_b),
        BLOCK=_BLOCK, HAS_A=A is not None, HAS_B=B is not None, DTYPE=triton_dtype(to),
    )  # fmt: skip
    return a, b
