"""Which backend serves a call: a pure function of what is known about it, and the reason for every
refusal.
"""

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from loradrop import eager, reference

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


class Problem(NamedTuple):
    """What a backend may know before it runs: x (m, k) times weight (n, k), rank r."""

    device: str
    dtype: torch.dtype
    m: int
    k: int
    n: int
    r: int
    dropout: float


class Backend(NamedTuple):
    """One implementation of the op: `forward`, `backward` and `sqnorm` with the signatures of
    `reference`.
    """

    name: str
    available: Callable[[], str | None]  # None, or why it cannot run on this machine
    supports: Callable[[Problem], str | None]  # None, or why it cannot serve this call
    forward: Forward
    backward: Backward
    sqnorm: Callable[..., Tensor]


def _always(*_: object) -> str | None:
    return None


def _missing(what: str) -> Callable[..., str | None]:
    return lambda *_: f"{what} are not part of this version"


def _absent(*_: object) -> NoReturn:
    raise NotImplementedError("this backend has no kernels in this version")


_NO_TRITON = _missing("the Triton kernels")
_NO_CUDA = _missing("the CUDA kernels")
_BACKENDS = {
    "reference": Backend(
        "reference", _always, _always, reference.forward, reference.backward, reference.sqnorm
    ),
    "eager": Backend("eager", _always, _always, eager.forward, eager.backward, eager.sqnorm),
    "triton": Backend("triton", _NO_TRITON, _NO_TRITON, _absent, _absent, eager.sqnorm),
    "cuda": Backend("cuda", _NO_CUDA, _NO_CUDA, _absent, _absent, eager.sqnorm),
}


def backends() -> list[Backend]:
    """Every backend there is a name for, whether or not it can run here."""
    return list(_BACKENDS.values())


def choose(problem: Problem) -> str:
    """The backend that an unnamed call gets.

    The reference in float64, plain PyTorch calls otherwise.
    """
    return "reference" if problem.dtype == torch.float64 else "eager"


def get(name: str) -> Backend:
    """The backend of that name, able or not."""
    return _BACKENDS[name]


def resolve(name: str | None, problem: Problem) -> Backend:
    """The backend `name`, or the one `choose` picks.

    Raises ValueError for an unknown name, RuntimeError with the reason where a named backend cannot
    serve.
    """
    if name is None:
        return _BACKENDS[choose(problem)]
    if name not in _BACKENDS:
        raise ValueError(f"backend={name!r}: choose one of {', '.join(_BACKENDS)}, or None")
    backend = _BACKENDS[name]
    reason = backend.available() or backend.supports(problem)
    if reason is not None:
        raise RuntimeError(
            f"backend={name!r} cannot serve this call: {reason}. "
            "Pass backend=None to let loradrop choose"
        )
    return backend
