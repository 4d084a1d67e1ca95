"""Each kernel alone, against its own floor: where the time of a layer goes that the floor does not
explain. bfloat16, one CUDA device.

    cublas, gemm, gemm+chunk    the wide product by cuBLAS, by `gemm_ext`, and with the LoRA product
    shrink, outer, addmm_       the thin products; `addmm_` is what the chunk replaces

Forward and backward: xWᵀ and x·Aᵀ, dyW and dy·B, dA and dB. Beside every time stand the operations
and the fewest bytes of it, and in the file what this GPU copies and multiplies at.

    python benchmarks/bench_parts.py
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import machine
import single
import torch
from grids import shapes
from providers import by_triton
from torch import Tensor

SHAPES = "8192x4096x4096,8192x4096x14336,8192x14336x4096,8192x4096x1024"
RANKS = (16, 64)


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


def parts(m: int, k: int, n: int, r: int) -> dict[str, Part]:
    """By name; those of the backward pass end in " of dx", " of dy", " for dA" or " for dB"."""
    from loradrop.kernels import tiles as config
    from loradrop.kernels.outer import outer
    from loradrop.kernels.shrink import shrink
    from loradrop.op import fused

    chip, half = config.machine_of(torch.device("cuda")), torch.bfloat16
    x, W, dy = single.normal(m, k), single.normal(n, k, k**-0.5), single.normal(m, n)
    A, B = single.normal(r, k, k**-0.5), single.normal(n, r, r**-0.5)
    h, t = single.normal(m, r), single.normal(m, r)

    def wide(p: Tensor, q: Tensor, h: Tensor, l: Tensor) -> tuple[Part, Part, Part]:
        chunk = partial(fused.by_triton, p, q, None, h, l, 1.0)
        return (
            _product(p, q, partial(torch.mm, p, q)),
            _product(p, q, partial(by_triton, p, q)),
            _product(p, q, chunk, h, l),
        )

    def thin(p: Tensor, a: Tensor) -> Part:
        tiles = config.shrink(chip, half, *p.shape, r)
        return _product(p, a.T, lambda: shrink(p, a, 1.0, tiles).h)

    def tall(p: Tensor, q: Tensor) -> Part:
        tiles = config.outer(chip, half, *p.shape, r)
        return _product(p.T, q, lambda: outer(p, q, 1.0, half, tiles))

    y = single.normal(m, n)
    added = Part(
        lambda: y.addmm_(h, B.T, alpha=1e-3),  # y must not overflow
        lambda: y.double() + 1e-3 * h.double() @ B.double().T,
        lambda: torch.addmm(y, h, B.T, alpha=1e-3),
        2 * m * n * r,
        (2 * y.numel() + h.numel() + B.numel()) * y.element_size(),
    )
    names = "cublas", "gemm", "gemm+chunk"
    forward = dict(zip(names, wide(x, W.T, h, B.T), strict=True))
    backward = zip(names, wide(dy, W, t, A), strict=True)
    return {
        **forward,
        "shrink": thin(x, A),
        "addmm_": added,
        **{f"{name} of dx": part for name, part in backward},
        "shrink of dy": thin(dy, B.T),
        "outer for dA": tall(x, t),
        "outer for dB": tall(dy, h),
    }


def floor_us(row: dict[str, float], ceilings: dict[str, float]) -> float:
    """The larger of operations over rate and bytes over bandwidth."""
    work = row["flops"] / ceilings["bf16_flops_per_s"], row["bytes"] / ceilings["copy_bytes_per_s"]
    return 1e6 * max(work)


def main() -> None:
    args = single.arguments(__doc__, __file__)
    ceilings = machine.ceilings()
    rows: single.Rows = []
    for m, k, n in shapes(SHAPES):
        for r in RANKS:
            sizes, found = {"M": m, "K": k, "N": n, "r": r}, parts(m, k, n, r)
            faults = {}
            for name, part in found.items():
                exact, plain = part.exact(), part.plain()
                if fault := single.right(part.run, exact, plain):
                    faults[name] = {**sizes, "variant": name, "fault": fault}
            calls = {name: part.run for name, part in found.items() if name not in faults}
            for row in single.timed(sizes, calls, args.seconds):
                part = found[row["variant"]]
                row |= {"flops": part.flops, "bytes": part.bytes}
                rows.append(row | {"of_floor": row["median_us"] / floor_us(row, ceilings)})
            rows += faults.values()
    single.finish(args, rows, "of_floor", {"ceilings": ceilings})


if __name__ == "__main__":
    main()
