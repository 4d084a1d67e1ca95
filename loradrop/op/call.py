"""The records that a call of the op is made of. Everything else in this folder stands on them.

    Call -> Backend.forward -> Output          Saved, dy, Needs -> Backend.backward -> Grads

A backend gets them whole. `Problem` is a call as plain data, which decides who serves it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loradrop.kernels.tiles import Machine, as_stored, machine_of, rows_aligned


class Call(NamedTuple):
    """What a forward pass reads. Either `weight` or `y0` is None: y0 stands for xWᵀ + b."""

    x: Tensor  # (M, K)
    weight: Tensor | None  # (N, K), frozen as the bias is
    bias: Tensor | None  # (N,)
    y0: Tensor | None  # (M, N)
    A: Tensor  # (r, K)
    B: Tensor  # (N, r)
    scaling: float
    dropout: float = 0.0  # quantised
    seed: Tensor | None = None  # 0-dim int64; None exactly where dropout is 0
    token_weights: Tensor | None = None  # (M,)
    sqnorm: bool = False  # whether it is asked for
    gram: bool = False  # whether it is asked for


class Output(NamedTuple):
    """What a forward pass gives."""

    y: Tensor  # (M, N)
    h: Tensor  # (M, r), unscaled
    mask: Tensor | None  # (M, row_bytes(K)) uint8; None where the backward draws dropout again
    sqnorm: Tensor | None  # 0-dim float64; None where it was not asked for
    gram: Tensor | None = None  # (r, r) float64: Σ w h hᵀ; None where it was not asked for
    a: Tensor | None = None  # A and B as the same backend's backward pass reads them, in x's dtype
    b: Tensor | None = None  # ... where that took a copy, which may be scaled


class Saved(NamedTuple):
    """What is kept for the backward pass; weights, sqnorm and gram are for statistics.

    h has the dtype and the device of x, and A its width, also where x itself is not there.
    """

    x: Tensor | None  # None where nobody reads it: A is frozen
    weight: Tensor | None
    A: Tensor
    B: Tensor
    h: Tensor
    mask: Tensor | None
    seed: Tensor | None
    scaling: float
    dropout: float
    token_weights: Tensor | None = None
    sqnorm: Tensor | None = None
    gram: Tensor | None = None
    a: Tensor | None = None  # as `Output` has them; None where no forward pass handed them over
    b: Tensor | None = None


class Needs(NamedTuple):
    """What somebody asks the backward pass for: gradients, and the moment of x."""

    x: bool
    A: bool
    B: bool
    moment: bool = False


class Grads(NamedTuple):
    """What a backward pass gives; None where nobody asks."""

    x: Tensor | None  # (M, K)
    A: Tensor | None  # (r, K)
    B: Tensor | None  # (N, r)
    moment: Tensor | None = None  # (K,) float64: Σ w x²


class Sinks(NamedTuple):
    """The float64 leaves that want a statistic as their gradient."""

    sqnorm: Tensor | None = None  # 0-dim
    moment: Tensor | None = None  # (K,)
    gram_in: Tensor | None = None  # (r, r)
    core: Tensor | None = None  # (r, r)


NO_SINKS = Sinks()


class Problem(NamedTuple):
    """What is known about a call before it runs: x (m, k) times weight (n, k), rank r."""

    device: str
    dtype: torch.dtype
    m: int
    k: int
    n: int
    r: int
    dropout: float
    grad: bool = True  # whether there will be a backward pass
    base: bool = True  # whether there is a weight; else y0 is given
    arch: int = 0  # 10·major + minor of the compute capability, 0 on a CPU
    sms: int = 0  # multiprocessors
    aligned: bool = True  # whether x and the weight lie in `rows_aligned`
    device_name: str = ""  # as the driver calls it; empty where it is not known


def problem_on(
    machine: Machine,
    device: str,
    dtype: torch.dtype,
    m: int,
    k: int,
    n: int,
    r: int,
    dropout: float = 0.0,
    grad: bool = True,
) -> Problem:
    """A layer with its weight on a machine, before there is a call of it."""
    problem = Problem(device, dtype, m, k, n, r, dropout, grad)
    return problem._replace(arch=machine.arch, sms=machine.sms, device_name=machine.name)


def problem_of(call: Call, grad: bool = True) -> Problem:
    """The plain data of a call."""
    x, weight = call.x, call.weight
    (m, k), (n, r), device = x.shape, call.B.shape, call.A.device
    machine = machine_of(device)
    aligned = machine.arch == 0 or (
        rows_aligned(as_stored(x)) and (weight is None or rows_aligned(as_stored(weight)))
    )
    return Problem(
        device.type, x.dtype, m, k, n, r, call.dropout, grad, weight is not None,
        machine.arch, machine.sms, aligned, machine.name,
    )  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """One implementation of the op, as a value.

    missing    () -> why it cannot run on this machine, or None
    why_not    (problem) -> why it cannot serve such a call, or None
    """

    name: str
    forward: Callable[[Call], Output]
    backward: Callable[[Saved, Tensor, Needs], Grads]
    missing: Callable[[], str | None] = lambda: None
    why_not: Callable[[Problem], str | None] = lambda _: None

    def refuses(self, call: Call) -> str | None:
        """Why it cannot serve this call here, or None."""
        return self.missing() or self.why_not(problem_of(call))
