"""Shapes to test and to time the op with, and the bound that every backend keeps.

The bound is relative to PyTorch's own error, or comes from the number of additions: nothing to tune
for a shape or a machine.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

_FLOOR = 16 * torch.finfo(torch.float64).eps  # float64 is the yardstick: it cannot tell less apart


class Shape(NamedTuple):
    """x (m, k) times weight (n, k), with adapters of rank r."""

    m: int
    k: int
    n: int
    r: int


REAL = {
    "minilm query": Shape(4096, 384, 384, 8),
    "minilm up": Shape(4096, 384, 1536, 8),
    "minilm down": Shape(4096, 1536, 384, 8),
    "bert query": Shape(2048, 768, 768, 8),
    "bert up": Shape(2048, 768, 3072, 8),
    "llama3-8b q": Shape(512, 4096, 4096, 8),
    "llama3-8b k": Shape(512, 4096, 1024, 8),
    "llama3-8b down": Shape(512, 14336, 4096, 8),
}
AWKWARD = {
    "no token": Shape(0, 24, 40, 8),
    "one token": Shape(1, 50, 130, 17),
    "rank 1": Shape(37, 45, 33, 1),
    "rank 4": Shape(37, 31, 17, 4),
    "rank 8": Shape(37, 100, 65, 8),
    "rank 64": Shape(37, 72, 130, 64),
    "long rows": Shape(16, 2048, 512, 8),
    "many tokens": Shape(600, 33, 20, 8),
}
SHAPES = REAL | AWKWARD


def torch_delta(
    x: Tensor, A: Tensor, B: Tensor, scaling: float, kept: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """s·(mask∘x/(1−p) Aᵀ)Bᵀ as PyTorch computes it, by autograd too; `kept` (M, K) is the mask."""
    dropped = x if kept is None else x * kept / (1.0 - p)
    return linear(linear(dropped, A), B) * scaling


def error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖ in float64 (Frobenius); 0 where nothing differs, NaN for a NaN."""
    off, size = _norm(actual.double() - exact.double()), _norm(exact)
    return 0.0 if off == 0.0 else off / size if size else float("inf")


def assert_within(
    actual: Tensor, torch_path: Tensor, exact: Tensor, additions: int = 0, factor: float = 1.2
) -> None:
    """‖actual − exact‖ is at most `factor` times the larger of two errors:

    PyTorch's, ‖torch_path − exact‖ in the same dtype, which depends on the machine's BLAS, and what
    rounding alone explains in any order of summation, ‖exact‖·√((additions·u² + v²)/3), for
    results that are sums of so many terms of random sign. u is half an ulp of the dtype that sums
    (float32, or float64), v of the result's: a rounding is off by u/√3 of its value, root mean
    square, and no partial sum is larger than the whole.

    Where the exact result is zero, as for an empty input, so must `actual` be. Raises
    AssertionError with both errors, and for shapes that differ or values that are not finite, under
    `python -O` too.
    """
    shapes = tuple(actual.shape), tuple(torch_path.shape), tuple(exact.shape)
    if not shapes[0] == shapes[1] == shapes[2]:
        raise AssertionError(f"shapes differ: {shapes}")
    if not actual.isfinite().all():
        raise AssertionError("there are values that are not finite")
    u = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps / 2
    v = torch.finfo(actual.dtype).eps / 2
    rounding = ((additions * u**2 + v**2) / 3) ** 0.5
    size = _norm(exact)
    limit = factor * max(_norm(torch_path.double() - exact.double()), rounding * size)
    if not _norm(actual.double() - exact.double()) <= limit + _FLOOR * size:
        raise AssertionError(
            f"relative error {error(actual, exact):.3g}, PyTorch's is "
            f"{error(torch_path, exact):.3g}, that of {additions} additions {rounding:.3g}"
        )


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
