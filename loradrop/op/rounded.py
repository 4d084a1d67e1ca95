"""The adapters of a call in x's dtype, rounded once a step.

The backward pass, and the second forward pass under activation checkpointing, read the same copies
as the first one. Every forward pass outside of a backward pass makes its own, and they live as long
as its graph. So what a forward pass reads is never older than A and B are, whatever an optimiser
writes, and however, and whoever still holds an old loss.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loradrop.kernels.stream import current_stream
from loradrop.kernels.tiles import scale_mode


class Pair(NamedTuple):
    """The adapters as they are, where they have x's dtype already."""

    a: Tensor
    b: Tensor


class Rounded:
    """A (r, K) and B (N, r) in `dtype`, each made when it is first asked for."""

    def __init__(self, A: Tensor, B: Tensor, dtype: torch.dtype) -> None:
        self.A, self.B, self.dtype = A, B, dtype
        self._made: dict[Any, Tensor] = {}
        self._versions: tuple[int, int] | None = None  # of A and B, where it is held
        self.open = False  # while the forward pass runs that it is made for

    @property
    def a(self) -> Tensor:
        """A, rounded."""
        return self._rounded("a", self.A)

    @property
    def b(self) -> Tensor:
        """B, rounded."""
        return self._rounded("b", self.B)

    def scaled(self, s: float) -> tuple[Tensor, float]:
        """B rounded, times s where that is exact; and the scale that is left."""
        if s == 1.0 or scale_mode(s, self.dtype) != "h":
            return self.b, s
        made = self._made.get(s)
        if made is None:
            made = torch.empty_like(self.B, dtype=self.dtype)
            self._made[s] = torch.mul(self.B, s, out=made)
        return made, 1.0

    def _rounded(self, name: str, factor: Tensor) -> Tensor:
        if factor.dtype == self.dtype:
            return factor
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = factor.to(self.dtype)
        return made


_HELD: weakref.WeakValueDictionary[tuple[Any, ...], Rounded] = weakref.WeakValueDictionary()


def _key(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    # A copy is ready on the stream that made it. An id holds: who is held holds A and B.
    return id(A), id(B), dtype, current_stream(A.get_device() if A.is_cuda else -1)


def near(A: Tensor, B: Tensor, dtype: torch.dtype) -> "Pair | Rounded":
    """The adapters in `dtype`: themselves where they have it, else rounded copies."""
    return Pair(A, B) if A.dtype == dtype == B.dtype else of(A, B, dtype)


def of(A: Tensor, B: Tensor, dtype: torch.dtype) -> Rounded:
    """Those that this forward pass made, those of the graph in a backward pass, or new ones."""
    held = _HELD.get(_key(A, B, dtype))
    if held is None or held._versions != (A._version, B._version):
        return Rounded(A, B, dtype)
    backward = torch._C._current_graph_task_id() != -1
    return held if held.open or backward else Rounded(A, B, dtype)


def hold(A: Tensor, B: Tensor, dtype: torch.dtype) -> Rounded:
    """As `of`, for a forward pass that begins now: until the caller sets `open` to False, it reads
    these, and so does its backward pass for as long as the caller keeps the result.
    """
    found = of(A, B, dtype)
    found.open = True
    if found._versions is None:
        found._versions = A._version, B._version
        _HELD[_key(A, B, dtype)] = found
    return found
