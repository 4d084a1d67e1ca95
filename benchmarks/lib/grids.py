"""What is measured: sizes of layers, ranks, dropouts and directions, by name."""

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

from loradrop.machine import native_bf16
from loradrop.op.points import DIRECTIONS as BOTH
from loradrop.op.points import FORWARD, Cell

PARTS = "parts"  # what stands for a direction where kernels are timed by themselves
DIRECTIONS = (*BOTH, PARTS)
RANKS = (16, 64, 8, 128)  # the most telling first
FEW = 32  # tokens up to which a forward pass is one of decoding

Shape = tuple[int, int, int]  # M, K, N


class Grid(NamedTuple):
    """Every combination of these."""

    shapes: tuple[Shape, ...]
    ranks: tuple[int, ...] = (8,)
    dropouts: tuple[float, ...] = (0.0,)
    directions: tuple[str, ...] = BOTH


def shapes(text: str) -> tuple[Shape, ...]:
    """From MxKxN,MxKxN,... Raises ValueError for anything else."""
    found = tuple(tuple(map(int, shape.split("x"))) for shape in text.split(","))
    if any(len(shape) != 3 or min(shape) < 1 for shape in found):
        raise ValueError(f"{text!r}: give shapes as MxKxN,MxKxN,...")
    return found  # type: ignore[return-value]


_ENCODERS = "4096x384x384,4096x384x1536,2048x768x768,2048x768x3072,512x4096x4096"
_LLAMA = "8192x4096x4096,8192x4096x14336,8192x14336x4096,8192x4096x11008,8192x11008x4096"
_TOKENS = (2048, 4096, 6144, 8192)
_DECODE = ((4096, 4096), (4096, 14336), (14336, 4096))

GRIDS: dict[str, tuple[Grid, ...]] = {
    "encoders": (Grid(shapes(_ENCODERS)),),
    "encoders_all": (Grid(shapes(_ENCODERS), (8, 64), (0.0, 0.1)),),
    "llama": (Grid(shapes(_LLAMA), RANKS, (0.0, 0.1)),),
    "lorafusion": (
        Grid(tuple((m, d, d) for d in (4096, 5120, 8192) for m in _TOKENS[::-1]), (16,), (0.1,)),
        Grid(((8192, 5120, 5120),), (16,)),
    ),
    "llama_1b": (
        Grid(shapes("8192x2048x2048,8192x2048x8192,8192x8192x2048,8192x2048x512"), (16,)),
    ),
    "gqa": (Grid(shapes("8192x4096x1024"), RANKS, (0.0, 0.1)),),
    "decode": (
        Grid(
            tuple((m, k, n) for m in (1, 2, 4, 8, 16, 32) for k, n in _DECODE),
            (16, 64),
            directions=(FORWARD,),
        ),
    ),
    # Cells of no other grid, so that whoever is stopped while PEFT is compiled loses these alone.
    "compiled": (Grid(shapes("4096x4096x14336"), (16,), (0.0, 0.1)),),
    "quick": (
        Grid(shapes("8192x4096x4096"), (16,), (0.0, 0.1)),
        Grid(shapes("1x4096x4096"), (16,), directions=(FORWARD,)),
    ),
    "parts": (
        Grid(
            shapes("8192x4096x4096,8192x4096x14336,8192x14336x4096,8192x4096x1024"),
            (16, 64),
            directions=(PARTS,),
        ),
    ),
    "probe": (Grid(shapes(f"{_LLAMA},8192x4096x1024"), (16, 64)),),
}


def dtypes(device: str) -> str:
    """What is measured there: bfloat16, and on a CPU float32, and bfloat16 where it has it."""
    if device == "cuda":
        return "bfloat16"
    return "float32,bfloat16" if native_bf16() else "float32"


def cells(grids: Iterable[Grid], dtypes: Iterable[str]) -> list[Cell]:
    """Every cell once, in the order of the grids."""
    dtypes = list(dtypes)
    found: dict[Cell, None] = {}
    for grid in grids:
        order = product(grid.ranks, grid.directions, grid.dropouts, grid.shapes, dtypes)
        found |= dict.fromkeys(
            Cell(dtype, *mkn, r, p, direction) for r, direction, p, mkn, dtype in order
        )
    return list(found)


def in_graph(cell: Cell, device: str) -> bool:
    """Whether it is so small that launching it from Python would be what is measured."""
    return device == "cuda" and cell.M <= FEW and cell.direction == FORWARD
