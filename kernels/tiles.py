"""How a kernel is cut into tiles: pure functions of the machine and the problem.

They return one of a few dozen configurations. `tests/test_aot.py` compiles them for the
architectures they are for and checks spills, shared memory and matrix instructions. Nothing is
tuned at run time.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Machine(NamedTuple):
    """What a choice may depend on. `arch` 0 is the interpreter, which gets small tiles."""

    arch: int  # 10·major + minor of the compute capability
    sms: int  # multiprocessors
    name: str = ""  # as the driver calls it; empty where it is not known


class ShrinkTiles(NamedTuple):
    """`shrink`: BM rows and BK columns of x a step, K split over `split` programs."""

    BM: int
    BK: int
    split: int
    warps: int
    stages: int
    B_ROWS: int = 256  # rows of B in one program of its Gram matrix
    gram: int = 64  # the widest rank tile whose Gram matrices are made in the same pass


class GemmTiles(NamedTuple):
    """`gemm_ext`, `single_pass`, `expand`: tiles of BM x BN outputs, BK of the sum a step."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    group: int = 8  # rows of tiles that go through the columns together
    tma: bool = False  # tensor memory accelerator for the wide operands
    halves: int = 1  # parts in which a tile is stored, one after another through shared memory
    per_sm: int = 1  # programs that live on one multiprocessor


class OuterTiles(NamedTuple):
    """`outer`, `t_and_db`: BC columns of p or dy, BM rows of the sum a step, M split over `split`
    parts.
    """

    BC: int
    BM: int
    split: int
    warps: int
    stages: int


INTERPRETER = Machine(0, 3)
_TILE = {256: 1.0, 128: 0.55}  # the time of a tile by its columns: its two ends do not shrink
_ROOMY = (80, 90, 100, 103)  # at least 163 KiB of shared memory a block; 99 KiB elsewhere


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def rank_tile(r: int) -> int:
    """The width of a tile that holds the rank r: a power of two, and at least the 16 of an MMA."""
    return max(16, power_of_two(r))


def row_bytes(columns: int) -> int:
    """The bytes of one row of a mask kept as bits: whole words of 32 columns, lowest bit first."""
    return cdiv(columns, 32) * 4


@functools.lru_cache(maxsize=4096)
def shrink(machine: Machine, dtype: torch.dtype, m: int, k: int, r: int) -> ShrinkTiles:
    """For `shrink` of x (m, k) to rank r."""
    ranks = rank_tile(r)
    if machine.arch == 0:
        return ShrinkTiles(64, 64, 2 if k > 128 else 1, 4, 2, 64)
    if dtype == torch.float32:
        BM, BK, warps, stages = (32, 32, 4, 2) if ranks <= 64 else (16, 32, 8, 1)
    else:
        BM = min(64, max(16, power_of_two(m)))
        BK, warps, stages = {
            16: (128, 4, 4),
            32: (128, 4, 3),
            64: (64, 4, 4),
            128: (64, 8, 3),
            256: (32, 8, 3),
        }[ranks]
        stages = stages if machine.arch in _ROOMY else 2
        BK = 64 if machine.arch >= 100 and ranks == 16 else BK  # 128 spills a register there
    # Enough programs to fill the machine, each with at least 512 columns to read.
    programs = cdiv(m, BM)
    split = min(power_of_two(cdiv(machine.sms, programs)), max(1, k // 512), 32)
    split = split if 2 * programs <= machine.sms else 1
    gram = 32 if machine.arch >= 100 else 64  # Triton 3.6 does not compile 64 there
    return ShrinkTiles(BM, BK, split, warps, stages, gram=gram)


@functools.lru_cache(maxsize=4096)
def outer(
    machine: Machine, dtype: torch.dtype, m: int, c: int, r: int, *, moment: bool = False
) -> OuterTiles:
    """For `outer` of p (m, c) and q (m, r); with the moment of p beside the product, or without."""
    ranks = rank_tile(r)
    if machine.arch == 0:
        return OuterTiles(64, 64, 2 if m > 64 else 1, 4, 2)
    if dtype == torch.float32:
        BC, BM, warps, stages = (64, 32, 4, 2) if ranks <= 32 else (32, 16, 8, 2)
    else:
        BC, BM, warps, stages = {
            16: (128, 64, 4, 4),
            32: (128, 64, 4, 4),
            64: (128, 64, 4, 3),
            128: (64, 64, 4, 3),
            256: (64, 64, 8, 2),
        }[ranks]
        stages = stages if machine.arch in _ROOMY else 2
        BC = BC if c % 8 == 0 else 32  # narrow loads take many registers
        BM = BM // 2 if moment and ranks in (64, 128) else BM  # so do the squares of a block
    split = min(power_of_two(cdiv(2 * machine.sms, cdiv(c, BC))), max(1, m // 256), 64)
    return OuterTiles(BC, BM, split, warps, stages)


@functools.lru_cache(maxsize=4096)
def backward(machine: Machine, dtype: torch.dtype, m: int, n: int, r: int) -> OuterTiles | None:
    """For `t_and_db` of dy (m, n) and rank r; None where reading dy twice moves as much.

    Planes of t, written and read, are 8·rank_tile(r)/BC bytes for each element of dy, of which two
    bytes need not be read again; and that costs something only where dy does not stay in L2.
    """
    ranks = rank_tile(r)
    if machine.arch == 0:
        return OuterTiles(64, 64, 2 if m > 64 else 1, 4, 2)
    roomy = machine.arch in _ROOMY
    # B stays in registers, which elsewhere hold it as operands of the matrix units.
    BC, warps, widest = (256, 8, 32) if roomy and machine.arch >= 90 else (128, 4, 16)
    if dtype == torch.float32 or ranks > widest or 2 * m * n < 1 << 26 or n % 8:
        return None
    split = min(power_of_two(cdiv(2 * machine.sms, cdiv(n, BC))), m // 256, 64)
    return OuterTiles(BC, 64, split, warps, 3 if roomy else 2)


@functools.lru_cache(maxsize=4096)
def gemm_ext(
    machine: Machine,
    dtype: torch.dtype,
    m: int,
    c: int,
    *,
    first: bool = False,
    aligned: bool = True,
) -> GemmTiles:
    """For `gemm_ext` with an output (m, c).

    first: the LoRA product starts the sum   aligned: the wide operands lie in rows of 16 bytes
    """
    if machine.arch == 0:
        return GemmTiles(64, 64, 64, 4, 2, group=2)
    if dtype == torch.float32:
        return GemmTiles(32, 32, 16, 4, 2)
    if not aligned:
        return GemmTiles(64, 128, 32, 8, 2)
    if machine.arch < 90 or machine.arch not in _ROOMY:
        return GemmTiles(128, 128, 32, 8, 3, per_sm=2 if machine.arch == 80 else 1)
    # Three stages where the sum starts with a product: its operands need shared memory too.
    narrow = GemmTiles(128, 128, 64, 8, 3 if first else 4, tma=True)
    wide = narrow._replace(BN=256, halves=2)

    def cost(tiles: GemmTiles) -> float:
        return cdiv(cdiv(m, tiles.BM) * cdiv(c, tiles.BN), machine.sms) * _TILE[tiles.BN]

    return min(wide, narrow, key=cost)


def single_pass(machine: Machine, dtype: torch.dtype, m: int) -> GemmTiles:
    """For `single_pass` of m rows."""
    if machine.arch == 0:
        return GemmTiles(16, 64, 128, 4, 2)
    if dtype == torch.float32:
        return GemmTiles(16, 32, 32, 4, 2)
    # One program on a multiprocessor: W comes as fast as its loads in flight, 8 KiB a stage, allow.
    return GemmTiles(16 if m <= 16 else 32, 32, 128, 4, 5 if machine.arch in _ROOMY else 3)


def rank_step(dtype: torch.dtype, r: int) -> int:
    """The ranks that `gemm_ext` and `expand` add at a time, beside a tile of outputs."""
    return min(rank_tile(r), 16 if dtype == torch.float32 else 64)


@functools.lru_cache(maxsize=4096)
def expand(machine: Machine, dtype: torch.dtype) -> GemmTiles:
    """For `expand`."""
    if machine.arch == 0:
        return GemmTiles(32, 64, 0, 4, 1)
    if dtype == torch.float32:
        return GemmTiles(32, 32, 0, 4, 1)
    return GemmTiles(64, 32 if machine.arch >= 100 else 64, 0, 4, 1)


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """What the device is; the interpreter for anything but a GPU."""
    if device.type != "cuda":
        return INTERPRETER
    facts = torch.cuda.get_device_properties(device)
    return Machine(10 * facts.major + facts.minor, facts.multi_processor_count, facts.name)


def as_stored(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose where that is what lies in memory row by row."""
    row, column = matrix.stride()
    return matrix.T if row == 1 and column != 1 else matrix


def rows_aligned(matrix: Tensor) -> bool:
    """Whether its rows are contiguous, apart, and begin at whole 16 bytes: what TMA and csrc/ read.

    The one place that asks.
    """
    row, column = matrix.stride()  # once: every question costs the host
    return (
        column == 1
        and row * matrix.itemsize % 16 == 0
        and row >= matrix.shape[1]
        and matrix.data_ptr() % 16 == 0
    )


def scale_mode(scale: float, dtype: torch.dtype) -> str:
    """How s acts on a LoRA product that comes last: "none", on "h" where exact, or on the "sum"."""
    if scale == 1.0:
        return "none"
    power_of_two = math.frexp(scale)[0] in (0.5, -0.5) and 2.0**-16 <= abs(scale) <= 2.0**16
    if dtype == torch.float32 or scale == 0.0 or (power_of_two and dtype == torch.bfloat16):
        return "h"
    return "sum"


def new_rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for (rows, columns), in `rows_aligned`; of one piece where the columns allow it."""
    dtype = dtype or like.dtype
    width = 16 // dtype.itemsize * cdiv(columns * dtype.itemsize, 16)
    made = like.new_empty((rows, width), dtype=dtype)
    return made if width == columns else made[:, :columns]


@functools.cache
def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    import triton.language as tl

    names = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return names[dtype]


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: float32 without TF32; half precision is exact either way."""
    return "ieee" if dtype == torch.float32 else "tf32"
