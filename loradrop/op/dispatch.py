"""Which backend serves a call: a pure function of what is known about it, and the reason for every
refusal.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Container
from typing import Any

import torch

from loradrop.op import costs, cuda, tuned
from loradrop.op.call import Backend, Call, Problem, Saved, problem_of
from loradrop.op.eager import EAGER
from loradrop.op.reference import REFERENCE
from loradrop.op.warn import warn_once


class RefusedError(RuntimeError):
    """A named backend cannot serve; `problem` is the call that it was named for."""

    def __init__(self, name: str, reason: str, problem: Problem) -> None:
        super().__init__(
            f"backend={name!r} cannot serve this call: {reason}. "
            "Pass backend=None to let loradrop choose"
        )
        self.problem = problem


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU: Triton's own switch."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_missing() -> str | None:
    """Why Triton's kernels cannot run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if _interpreted() or torch.cuda.is_available():
        return None
    return "PyTorch finds no CUDA device, and Triton's interpreter (TRITON_INTERPRET=1) is off"


def why_not_triton(problem: Problem) -> str | None:
    """Why Triton's kernels cannot serve such a call, or None."""
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


def why_not_cuda(problem: Problem) -> str | None:
    """Why the kernels of csrc/, with those of Triton beside them, cannot serve such a call."""
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernels compute in float16 and bfloat16, not {problem.dtype}"
    if problem.n % 8 or problem.k % 8:
        return f"N and K must be multiples of 8, not {problem.n} and {problem.k}"
    if not problem.aligned:
        return "x or the weight does not lie in rows that begin at whole 16 bytes"
    if problem.arch != 90:
        return f"compute capability 9.0 is needed, not {problem.arch / 10}"
    return why_not_triton(problem)


def _fused(
    name: str, missing: Callable[[], str | None], why_not: Callable[[Problem], str | None]
) -> Backend:
    """A backend of fused.py, which imports Triton: only when it first runs."""

    @functools.cache
    def passes() -> Any:
        from loradrop.op import fused

        return getattr(fused, name.upper())

    def part(of: str) -> Callable[..., Any]:
        def run(call: Call | Saved, *rest: Any) -> Any:
            device, method = call.A.get_device(), getattr(passes(), of)
            if device < 0 or device == torch.cuda.current_device():
                return method(call, *rest)
            with torch.cuda.device(device):  # where kernels are launched
                return method(call, *rest)

        return run

    parts = part("forward"), part("backward")
    return Backend(name, *parts, missing, why_not)


BACKENDS = {
    backend.name: backend
    for backend in (
        REFERENCE,
        EAGER,
        _fused("thin", triton_missing, why_not_triton),
        _fused("triton", triton_missing, why_not_triton),
        _fused("cuda", lambda: cuda.missing() or triton_missing(), why_not_cuda),
        _fused("overlap", lambda: cuda.missing() or triton_missing(), why_not_cuda),
    )
}


def named(name: str) -> Backend:
    """The backend of that name, able or not. Raises ValueError for an unknown name."""
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: choose one of {', '.join(BACKENDS)}, or None")
    return BACKENDS[name]


def serving(call: Call, name: str | None, grad: bool = True) -> Backend:
    """The backend `name`, or the one that `choose` picks.

    Raises ValueError for an unknown name, `RefusedError` where a named backend cannot serve.
    """
    if name is None:
        x = call.x
        if x.is_cpu and _trusts_cpu():  # as `choose` has it, without a question
            return REFERENCE if x.dtype == torch.float64 else EAGER
        return BACKENDS[choose(problem_of(call, grad))]
    backend = named(name)
    reason = backend.refuses(call)
    if reason is not None:
        raise RefusedError(name, reason, problem_of(call, grad))
    return backend


@functools.cache
def _trusts_cpu() -> bool:
    """Whether `loradrop tune` found no fault on this CPU."""
    file = tuned.of_device(tuned.CPU)
    if file.why_not is not None:
        warn_once(file.why_not)
    return not any(point["refused"] for point in file.points)


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem) -> str:
    """The backend that an unnamed call gets, never one that failed in `loradrop tune`.

    The reference in float64, plain PyTorch calls on a CPU. On a CUDA device, what measurements show
    to be fastest, those of `loradrop tune` first, and the roofline's guess where they hold nothing
    near.
    """
    if problem.dtype == torch.float64:
        return "reference"
    file = tuned.of_problem(problem)
    if file.why_not is not None:
        warn_once(file.why_not)
    failed = tuned.refusals(problem, file.points)
    for name in failed:
        warn_once(f"backend {name} failed in loradrop tune, and is not used: {file.path} has why")
    refusal = triton_missing() or why_not_triton(problem)
    if refusal is not None or problem.device != "cuda":
        if problem.device == "cuda":
            warn_once(f"LoRA runs as plain PyTorch calls: {refusal}")
        return _plain(failed)
    able = [name for name in able_to(problem) if BACKENDS[name].missing() is None]
    able = [name for name in able if name not in failed]
    measured = costs.choose_measured(problem, able)
    tuned_here = file.points or file.why_not is not None  # of which was told
    if measured is None and problem.base and problem.m and not tuned_here:
        warn_once(
            f"{problem.device_name or 'this GPU'}: some of these layers were never measured on it, "
            "so bytes and launches decide between PyTorch's products and our thin kernels. "
            "loradrop tune MODEL measures which backend is fastest here"
        )
    return measured or costs.choose_predicted(problem, able)


def _plain(failed: Container[str]) -> str:
    """Who serves as PyTorch calls."""
    return "reference" if "eager" in failed else "eager"


def forget() -> None:
    """Drops every choice, so that a new file of `loradrop tune` counts in this process too."""
    tuned.of_device.cache_clear()
    _trusts_cpu.cache_clear()
    choose.cache_clear()


def able_to(problem: Problem) -> list[str]:
    """The backends that could serve, on a machine that could run everything."""
    return [name for name, backend in BACKENDS.items() if backend.why_not(problem) is None]


def explain(problem: Problem) -> str:
    """What `choose` gives on a machine that could run everything, and why, in a sentence."""
    if problem.dtype == torch.float64:
        return "reference: float64"
    file = tuned.of_problem(problem)
    failed = tuned.refusals(problem, file.points)
    rest = "".join(f"; not {name}, which failed here: {why}" for name, why in failed.items())
    rest += f"; {file.why_not}" if file.why_not else ""
    if problem.device == "cpu":
        point = costs.nearest(problem, file.points)
        took = f", by loradrop tune in µs: {costs.written(point)}" if point else ""
        return f"{_plain(failed)}: a CPU runs plain PyTorch calls{took}{rest}"
    refusal = why_not_triton(problem)
    if refusal is not None:
        return f"{_plain(failed)}: {refusal}{rest}"
    able = [name for name in able_to(problem) if name not in failed]
    absent = [name for name in able if name in ("cuda", "overlap")] if cuda.missing() else []
    why = costs.explain(problem, [name for name in able if name not in absent])
    if timed := [name for name in absent if f" {name} " in why]:
        verb = "do" if len(timed) > 1 else "does"
        why += f"; {' and '.join(timed)} {verb} not run here: {cuda.missing()}"
    return why + rest
