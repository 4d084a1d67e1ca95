"""Which backend serves a call: a pure function of what is known about it, and the reason for every
refusal.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loradrop.op import costs, cuda, eager, reference
from loradrop.op.costs import Problem

Forward = Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]
Backward = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


class Backend(NamedTuple):
    """One implementation of the op.

    forward    (x, weight, bias, y0, A, B, scaling, dropout, seed, token_weights, norm)
               -> y (M, N), h (M, r), mask, sqnorm: as `reference.forward` and `reference.sqnorm`;
               sqnorm is None without `norm`
    backward   (dy, x, weight, A, B, h, mask, scaling, dropout, seed, needs) -> dx, dA, dB: as
               `reference.backward`, given the h and the mask of its own forward

    mask is None where the backend draws dropout anew (`masks` off), else (M, row_bytes(K)) uint8.
    """

    name: str
    available: Callable[[], str | None]  # None, or why it cannot run on this machine
    supports: Callable[[Problem], str | None]  # None, or why it cannot serve this call
    load: Callable[[], Any]  # the object that has `forward` and `backward`
    masks: bool = False

    @property
    def forward(self) -> Forward:
        """The forward pass; for kernels, their first import."""
        return self.load().forward  # type: ignore[no-any-return]

    @property
    def backward(self) -> Backward:
        """The backward pass."""
        return self.load().backward  # type: ignore[no-any-return]


class _Plain:
    """A module with `forward`, `backward` and `sqnorm` as a backend: it keeps no mask."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y0: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        dropout: float,
        seed: Tensor | None,
        token_weights: Tensor | None,
        norm: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        y, h = self.module.forward(x, weight, bias, y0, A, B, scaling, dropout, seed)
        return y, h, None, self.module.sqnorm(h, B, scaling, token_weights) if norm else None

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        A: Tensor,
        B: Tensor,
        h: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout: float,
        seed: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grads: tuple[Tensor | None, Tensor | None, Tensor | None] = self.module.backward(
            dy, x, weight, A, B, h, scaling, dropout, seed, needs
        )
        return grads


def _always(*_: object) -> str | None:
    return None


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU: Triton's own switch."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'loradrop[triton]'"
    if _interpreted() or torch.cuda.is_available():
        return None
    return "PyTorch finds no CUDA device, and Triton's interpreter (TRITON_INTERPRET=1) is off"


def _triton_supports(problem: Problem) -> str | None:
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels compute in float32, float16 and bfloat16, not {problem.dtype}"
    if problem.r > 256:
        return f"the kernels hold ranks up to 256, not {problem.r}"
    if problem.device == "cpu" and not _interpreted():
        return "the tensors are on a CPU and Triton's interpreter (TRITON_INTERPRET=1) is off"
    if problem.device == "cpu" and problem.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly; take float16 or float32"
    if problem.device not in ("cpu", "cuda") or torch.version.hip:
        kind = "those of ROCm" if torch.version.hip else problem.device
        return f"the kernels are for CUDA devices, not {kind}"
    if problem.device == "cuda" and problem.arch < 80:
        return f"compute capability 8.0 is needed, not {problem.arch / 10}"
    return None


def _cuda_available() -> str | None:
    return cuda.available() or _triton_available()


def _cuda_supports(problem: Problem) -> str | None:
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernels compute in float16 and bfloat16, not {problem.dtype}"
    if problem.n % 8 or problem.k % 8:
        return f"N and K must be multiples of 8, not {problem.n} and {problem.k}"
    if not problem.aligned:
        return "x or the weight does not lie in rows that begin at whole 16 bytes"
    if problem.arch != 90:
        return f"compute capability 9.0 is needed, not {problem.arch / 10}"
    return _triton_supports(problem)


def _load_fused(name: str) -> Callable[[], Any]:
    @functools.cache
    def load() -> Any:
        from loradrop.op import fused

        return getattr(fused, name)

    return load


_REFERENCE, _EAGER = _Plain(reference), _Plain(eager)
_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", _always, _always, lambda: _REFERENCE),
        Backend("eager", _always, _always, lambda: _EAGER),
        Backend("thin", _triton_available, _triton_supports, _load_fused("THIN"), masks=True),
        Backend("triton", _triton_available, _triton_supports, _load_fused("TRITON"), masks=True),
        Backend("cuda", _cuda_available, _cuda_supports, _load_fused("CUDA"), masks=True),
    )
}


def backends() -> list[Backend]:
    """Every backend there is a name for, whether or not it can run here."""
    return list(_BACKENDS.values())


@functools.cache
def _say_once(refusal: str) -> None:
    warnings.warn(f"LoRA runs as plain PyTorch calls: {refusal}", stacklevel=4)


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem) -> str:
    """The backend that an unnamed call gets.

    The reference in float64, plain PyTorch calls on a CPU. On a CUDA device, what the shipped
    measurements show to be fastest, and the roofline's guess where they hold nothing near.
    """
    if problem.dtype == torch.float64:
        return "reference"
    if problem.device != "cuda":
        return "eager"
    refusal = _triton_available() or _triton_supports(problem)
    if refusal is not None:
        _say_once(refusal)
        return "eager"
    return costs.choose_measured(problem, _able(problem)) or costs.choose_predicted(problem)


def _able(problem: Problem) -> tuple[str, ...]:
    """The backends that could serve."""
    return tuple(
        backend.name
        for backend in _BACKENDS.values()
        if backend.available() is None and backend.supports(problem) is None
    )


def explain(problem: Problem) -> str:
    """What `choose` gives on a machine that could run everything, and why, in a sentence."""
    if problem.dtype == torch.float64:
        return "reference: float64"
    refusal = _triton_supports(problem)
    if refusal is not None:
        return f"eager: {refusal}"
    able = [b.name for b in _BACKENDS.values() if b.supports(problem) is None]
    return costs.explain(problem, [n for n in able if n != "cuda" or cuda.available() is None])


def get(name: str) -> Backend:
    """The backend of that name, able or not."""
    return _BACKENDS[name]


def known(name: str) -> str:
    """`name` itself. Raises ValueError for one that is no backend's."""
    if name not in _BACKENDS:
        raise ValueError(f"backend={name!r}: choose one of {', '.join(_BACKENDS)}, or None")
    return name


def resolve(name: str | None, problem: Problem) -> Backend:
    """The backend `name`, or the one `choose` picks.

    Raises ValueError for an unknown name, RuntimeError with the reason where a named backend cannot
    serve.
    """
    if name is None:
        return _BACKENDS[choose(problem)]
    backend = _BACKENDS[known(name)]
    reason = backend.available() or backend.supports(problem)
    if reason is not None:
        raise RuntimeError(
            f"backend={name!r} cannot serve this call: {reason}. "
            "Pass backend=None to let loradrop choose"
        )
    return backend
