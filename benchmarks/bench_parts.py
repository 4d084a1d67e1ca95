"""Each kernel alone: where the time of a layer goes. One CUDA device.

    cublas, gemm, gemm_cuda    the wide product by cuBLAS, by our Triton kernel, by our CUDA kernel
    gemm+chunk                 by our Triton kernel, with the LoRA product as its last steps
    shrink, outer, addmm_      the thin products; `addmm_` is what the chunk replaces
    t+dB                       both thin products of dy from one read of it: checked by t, and by dB
    copy                       of x: what reading and writing it costs; shrink only reads it

Forward and backward: xWᵀ and x·Aᵀ, dyW and dy·B, dA and dB. Files, options and protocol are those
of `bench_lora_linear.py`; every time is one kernel's, beside the frozen product of the layer.

    python benchmarks/bench_parts.py --device cuda
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lib import harness, package
from lib.providers import Provider
from lib.results import FROZEN
from lib.rivals import frozen
from loradrop.measuring.cases import Case, Output


class Operands(NamedTuple):
    """Of one layer: x (M, K), W (N, K), A (r, K), B (N, r), dy and y (M, N), h and t (M, r)."""

    x: Tensor
    W: Tensor
    A: Tensor
    B: Tensor
    dy: Tensor
    y: Tensor
    h: Tensor
    t: Tensor


def operands(case: Case) -> Operands:
    """Those of a case; h, t and y are copies of a part of x, of dy, and of dy."""
    x, W, A, B, dy = (t.detach() for t in (case.x, case.weight, case.A, case.B, case.dy))
    h, t = (of[:, : A.shape[0]].contiguous() for of in (x, dy))
    return Operands(x, W, A, B, dy, dy.clone(), h, t)


Formula = Callable[[Operands], Tensor]


def part(name: str, backend: str | None, kernel: Formula, formula: Formula) -> Provider:
    """A kernel on the operands of a layer, and what it computes, by PyTorch in any dtype."""

    def make(case: Case) -> Callable[[], Output]:
        of = operands(case)
        return lambda: (kernel(of), None)

    return Provider(name, make, formula=lambda case: formula(operands(case)), backend=backend)


def wide(end: str, of: Callable[[Operands], tuple[Tensor, ...]]) -> list[Provider]:
    """The products p·q, and p·q + h·l, of the operands `of` gives."""
    kernels = {"cublas": (None, torch.mm), "gemm": ("triton", package.gemm_triton),
               "gemm_cuda": ("cuda", package.gemm_cuda)}  # fmt: skip

    def extended(o: Operands) -> Tensor:
        p, q, h, l = of(o)
        return p @ q + h @ l

    return [
        *(
            part(
                name + end,
                backend,
                lambda o, kernel=kernel: kernel(*of(o)[:2]),
                lambda o: torch.mm(*of(o)[:2]),
            )
            for name, (backend, kernel) in kernels.items()
        ),
        part(f"gemm+chunk{end}", "triton", lambda o: package.gemm_triton(*of(o)), extended),
    ]


def parts(_: str, __: str) -> list[Provider]:
    """Those of the backward pass end in " of dx", " of dy", " for dA" or " for dB"."""
    shrink, outer = package.shrink, package.outer

    def at_once(o: Operands) -> tuple[Tensor, Tensor]:
        return package.t_and_db(o.dy, o.B, o.h)

    return [
        Provider(FROZEN, frozen, bare=True),
        part("copy", None, lambda o: o.x.clone(), lambda o: o.x),
        *wide("", lambda o: (o.x, o.W.T, o.h, o.B.T)),
        part("shrink", "triton", lambda o: shrink(o.x, o.A), lambda o: o.x @ o.A.T),
        part(
            "addmm_",
            None,
            lambda o: o.y.addmm_(o.h, o.B.T, alpha=1e-3),  # y must not overflow
            lambda o: torch.addmm(o.y, o.h, o.B.T, alpha=1e-3),
        ),
        *wide(" of dx", lambda o: (o.dy, o.W, o.t, o.A)),
        part("shrink of dy", "triton", lambda o: shrink(o.dy, o.B.T), lambda o: o.dy @ o.B),
        part("outer for dA", "triton", lambda o: outer(o.x, o.t), lambda o: o.x.T @ o.t),
        part("outer for dB", "triton", lambda o: outer(o.dy, o.h), lambda o: o.dy.T @ o.h),
        *(
            replace(
                part(f"t+dB {end}", "triton", lambda o, i=i: at_once(o)[i], formula),
                rule=lambda c: None if package.once(c.M, c.N, c.r) else "two reads move as much",
            )
            for i, (end, formula) in enumerate(
                (("of dy", lambda o: o.dy @ o.B), ("for dB", lambda o: o.dy.T @ o.h))
            )
        ),
    ]


BENCH = harness.Bench(__file__, parts, {"cpu": "parts", "cuda": "parts"})


if __name__ == "__main__":
    sys.exit(harness.main(BENCH, harness.arguments(__doc__)))
