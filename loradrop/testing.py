"""Shapes to test and to time the op with, and the bound that every backend keeps.

The bound is relative to PyTorch's own error: no tolerance per shape, nothing to tune or to rot.
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


def assert_within(actual: Tensor, torch_path: Tensor, exact: Tensor, factor: float = 1.2) -> None:
    """‖actual − exact‖ is at most `factor` times ‖torch_path − exact‖, PyTorch's in that dtype.

    Where PyTorch is exact, as for the zeros of an empty input, so must `actual` be, up to the last
    bits of float64. Raises AssertionError with both errors, and for shapes that differ or values
    that are not finite.
    """
    shapes = tuple(actual.shape), tuple(torch_path.shape), tuple(exact.shape)
    assert shapes[0] == shapes[1] == shapes[2], f"shapes differ: {shapes}"
    assert actual.isfinite().all(), "there are values that are not finite"
    limit = factor * _norm(torch_path.double() - exact.double()) + _FLOOR * _norm(exact)
    assert _norm(actual.double() - exact.double()) <= limit, (
        f"relative error {error(actual, exact):.3g}, PyTorch's is {error(torch_path, exact):.3g}"
    )


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
