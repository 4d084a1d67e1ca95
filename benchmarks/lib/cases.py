"""The operands of one cell, the same for all that are compared."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.results import Cell

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
