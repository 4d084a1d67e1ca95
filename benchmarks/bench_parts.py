"""Each kernel alone, against its own floor: where the time of a layer goes that the floor does not
explain. bfloat16, one CUDA device.

    cublas, gemm, gemm+chunk    the wide product by cuBLAS, by `gemm_ext`, and with the LoRA product
    shrink, outer, addmm_       the thin products; `addmm_` is what the chunk replaces

Forward and backward: xWᵀ and x·Aᵀ, dyW and dy·B, dA and dB. Beside every time stand the operations
and the fewest bytes of it, and in the file what this GPU copies and multiplies at. A kernel that
ends or hangs its process is named, and the others are measured without it.

    python benchmarks/bench_parts.py
"""

import argparse
import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib import RESULTS, cells, environment, package, timing, workers
from lib.grids import shapes
from lib.harness import device_survives, first_line
from loradrop.testing import error

SHAPES = "8192x4096x4096,8192x4096x14336,8192x14336x4096,8192x4096x1024"
RANKS = (16, 64)
CEILINGS = {"what": "ceilings"}


class Part(NamedTuple):
    """A kernel on its operands, what it should give in float64, and what PyTorch gives."""

    run: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    flops: int
    bytes: int


def _product(p: Tensor, q: Tensor, run: Callable[[], Tensor], *more: Tensor) -> Part:
    """A part that is p·q, or p·q + h·l with `more` = (h, l)."""
    m, d, c = *p.shape, q.shape[1]
    ranks = more[0].shape[1] if more else 0
    numbers = m * d + d * c + m * c + sum(t.numel() for t in more)

    def value(wide: bool) -> Tensor:
        a, b, *rest = (t.double() if wide else t for t in (p, q, *more))
        return a @ b + rest[0] @ rest[1] if rest else a @ b

    bytes_ = numbers * p.element_size()
    return Part(run, partial(value, True), partial(value, False), 2 * m * (d + ranks) * c, bytes_)


def parts(m: int, k: int, n: int, r: int, device: str = "cuda") -> dict[str, Part]:
    """By name; those of the backward pass end in " of dx", " of dy", " for dA" or " for dB"."""

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, device=device).mul_(scale).bfloat16()

    x, W, dy = normal(m, k), normal(n, k, k**-0.5), normal(m, n)
    A, B = normal(r, k, k**-0.5), normal(n, r, r**-0.5)
    h, t, y = normal(m, r), normal(m, r), normal(m, n)

    def wide(end: str, p: Tensor, q: Tensor, h: Tensor, l: Tensor) -> dict[str, Part]:
        return {
            f"cublas{end}": _product(p, q, partial(torch.mm, p, q)),
            f"gemm{end}": _product(p, q, partial(package.gemm_triton, p, q)),
            f"gemm+chunk{end}": _product(p, q, partial(package.gemm_triton, p, q, h, l), h, l),
        }

    def thin(p: Tensor, a: Tensor) -> Part:
        return _product(p, a.T, partial(package.shrink, p, a))

    def tall(p: Tensor, q: Tensor) -> Part:
        return _product(p.T, q, partial(package.outer, p, q))

    added = Part(
        lambda: y.addmm_(h, B.T, alpha=1e-3),  # y must not overflow
        lambda: y.double() + 1e-3 * h.double() @ B.double().T,
        lambda: torch.addmm(y, h, B.T, alpha=1e-3),
        2 * m * n * r,
        (2 * y.numel() + h.numel() + B.numel()) * y.element_size(),
    )
    return {
        **wide("", x, W.T, h, B.T),
        "shrink": thin(x, A),
        "addmm_": added,
        **wide(" of dx", dy, W, t, A),
        "shrink of dy": thin(dy, B.T),
        "outer for dA": tall(x, t),
        "outer for dB": tall(dy, h),
    }


def fault(part: Part) -> str | None:
    """None where a part is within twice PyTorch's error, or what is wrong with it."""
    exact, plain = part.exact(), part.plain()
    found, limit = error(part.run(), exact), 2 * error(plain, exact)
    return None if found <= limit else f"relative error {found:.3g}, PyTorch's is {limit / 2:.3g}"


def measured(
    found: dict[str, Part],
    device: str,
    seconds: float,
    without: set[str],
    begin: Callable[[str], None],
) -> dict[str, Any]:
    """The figures of the parts of one layer, or the fault of each that has none."""
    figures, calls = {}, {}
    for name, part in found.items():
        if name in without:
            continue
        begin(name)
        try:
            wrong = fault(part)
        except Exception as exception:  # a kernel that does not compile is a finding
            if not device_survives(device):
                raise workers.BrokenDeviceError(name, first_line(exception)) from None
            wrong = first_line(exception)
        if wrong:
            figures[name] = {"fault": wrong}
        else:
            calls[name] = part.run
    begin(workers.TASK)
    for name, sample in timing.measure(calls, device, seconds).items() if calls else ():
        times = {n: round(getattr(sample, n), 2) for n in ("median_us", "p20_us", "p80_us")}
        figures[name] = times | {"flops": found[name].flops, "bytes": found[name].bytes}
    return {"parts": figures}


def work(
    args: argparse.Namespace, key: cells.Key, without: set[str], begin: Callable[[str], None]
) -> dict[str, Any]:
    """What a worker does with a cell."""
    torch.set_num_threads(1)
    gc.collect()
    if key == CEILINGS:
        return environment.ceilings()
    found = parts(*(key[name] for name in "MKNr"), args.device)
    if "triton" in args.without.split(","):
        without |= {name for name in found if not name.startswith(("cublas", "addmm_"))}
    return measured(found, args.device, args.seconds, without, begin)


def main(argv: list[str] | None = None) -> int:
    """Ends with 1 where a part is wrong or fails."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu rehearses")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--seconds", type=float, default=2.0, help="for one size")
    parser.add_argument("--without", default="", help="backends to leave out: triton")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cuda":
        environment.need_cuda("bench_parts")
    if args.worker:
        workers.serve(partial(work, args))
        return 0
    path = environment.folder(args.results, args.device) / "bench_parts.json"
    keys: list[cells.Key] = [CEILINGS] if args.device == "cuda" else []
    sizes = [(*shape, r) for shape in shapes(args.shapes) for r in RANKS]
    keys += [dict(zip("MKNr", size, strict=True)) for size in sizes]
    command = [__file__, "--seconds", str(args.seconds), "--without", args.without]
    return 0 if cells.fill(path, command, keys, 90.0, args) else 1


if __name__ == "__main__":
    sys.exit(main())
