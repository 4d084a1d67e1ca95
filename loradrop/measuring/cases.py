"""The operands of one cell, the same for all that are compared, and two ways to compute it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from loradrop.op.linear import lora_linear
from loradrop.op.points import Cell

Output = tuple[Tensor, Tensor | None]  # y, and the squared norm where it is asked for


@dataclass(frozen=True)
class Case:
    """x (M, K), weight (N, K), A (r, K), B (N, r), dy (M, N)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    dy: Tensor
    scaling: float
    dropout: float

    @property
    def bytes(self) -> int:
        """Of what a forward pass reads."""
        return sum(t.numel() * t.element_size() for t in (self.x, self.weight, self.A, self.B))

    def widened(self) -> "Case":
        """The same with float32 adapters, as layers have them beside a base of half precision."""
        A, B = (nn.Parameter(t.detach().float()) for t in (self.A, self.B))
        return replace(self, A=A, B=B)


MASKED = 1 << 20  # elements of x from which a mask by PyTorch calls takes thousands of launches


def make_case(cell: Cell, device: str, number: int = 0) -> Case:
    """Random operands whose delta is about as large as the base's output."""
    draw = torch.Generator(device).manual_seed(number)
    dtype = getattr(torch, cell.dtype)

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, device=device, generator=draw).mul_(scale).to(dtype)

    return Case(
        x=normal(cell.M, cell.K).requires_grad_(),
        weight=normal(cell.N, cell.K, cell.K**-0.5),
        bias=normal(1, cell.N)[0] if device == "cpu" else None,
        A=nn.Parameter(normal(cell.r, cell.K, cell.K**-0.5)),
        B=nn.Parameter(normal(cell.N, cell.r, cell.r**-0.5)),
        dy=normal(cell.M, cell.N),
        scaling=2.0,
        dropout=cell.dropout,
    )


def ours(
    case: Case, norm: bool = False, backend: str | None = None, **sinks: Any
) -> Callable[[], Output]:
    """The op; without a `backend` the dispatcher picks. Its seed is drawn as the layer does."""

    def run() -> Output:
        seed = None
        if case.dropout:
            seed = torch.randint(0, 1 << 62, (), device=case.x.device)
        operands = (case.x, case.weight, case.bias, case.A, case.B, case.scaling)
        found = lora_linear(
            *operands, dropout=case.dropout, seed=seed, return_sqnorm=norm, backend=backend, **sinks
        )
        return found if norm else (found, None)

    return run


def as_peft(case: Case) -> Callable[[], Output]:
    """The calls that PEFT's layer makes: in the adapters' dtype, with a mask of PyTorch's."""

    def run() -> Output:
        y = linear(case.x, case.weight, case.bias)
        h = linear(dropout(case.x.to(case.A.dtype), case.dropout), case.A)
        return (y + linear(h, case.B) * case.scaling).to(y.dtype), None

    return run


def run_once(run: Callable[[], Output], case: Case, backward: bool) -> None:
    """What is timed: a forward pass under `no_grad`, or one with its backward pass."""
    if backward:
        run()[0].backward(case.dy)  # type: ignore[no-untyped-call]
        case.x.grad = case.A.grad = case.B.grad = None
    else:
        with torch.no_grad():
            run()
