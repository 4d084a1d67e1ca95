"""What does programmatic dependent launch gain between shrink and the product? bfloat16.

shrink            alone
cublas            the frozen product alone
shrink, cublas    one after the other, without the LoRA product
shrink, gemm_ext  the whole forward pass in two kernels, one after the other
early launch      `gemm_ext` may be launched early, but shrink never says so: the launch is hidden
early start       shrink says so at once, and `gemm_ext` waits for h before its last chunk

python benchmarks/risk_pdl.py
"""

from collections.abc import Callable
from functools import partial

import single
import torch
from grids import shapes
from torch import Tensor

SHAPES = "8192x4096x4096,8192x4096x14336,8192x14336x4096"
PDL = {  # whether shrink signals, and whether gemm_ext listens
    "shrink, gemm_ext": (False, False),
    "early launch": (False, True),
    "early start": (True, True),
}


def variants(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The forward pass and its parts, of x (M, K), W (N, K), A (r, K), B (N, r)."""
    from loradrop.kernels import tiles as config
    from loradrop.kernels.gemm_ext import gemm_ext
    from loradrop.kernels.shrink import shrink

    machine, (m, k), (n, r) = config.machine_of(x.device), x.shape, B.shape
    thin = config.shrink(machine, x.dtype, m, k, r)
    tiles = config.gemm_ext(machine, x.dtype, m, n)
    programs = machine.sms * tiles.per_sm

    def both(signals: bool, listens: bool) -> Tensor:
        h = shrink(x, A, 1.0, thin._replace(pdl=signals)).h
        return gemm_ext(x, W.T, None, h, B.T, 2.0, tiles._replace(pdl=listens), programs)[0]

    def then_cublas() -> Tensor:
        shrink(x, A, 1.0, thin)
        return torch.mm(x, W.T)

    return {
        "shrink": lambda: shrink(x, A, 1.0, thin).h,
        "cublas": lambda: torch.mm(x, W.T),
        "shrink, cublas": then_cublas,
        **{name: partial(both, *pdl) for name, pdl in PDL.items()},
    }


def main() -> None:
    args = single.arguments(__doc__, __file__)
    rows: single.Rows = []
    for m, k, n in shapes(SHAPES):
        for r in (16, 64):
            x, W = single.normal(m, k), single.normal(n, k, k**-0.5)
            A, B = single.normal(r, k, k**-0.5), single.normal(n, r, r**-0.5)
            calls = variants(x, W, A, B)
            sizes, found = {"M": m, "K": k, "N": n, "r": r}, []
            plain = torch.mm(x, W.T) + 2.0 * torch.mm(torch.mm(x, A.T), B.T)
            exact = x.double() @ (W.double() + 2.0 * B.double() @ A.double()).T
            for name in PDL:
                if fault := single.right(calls[name], exact, plain):
                    found.append({**sizes, "variant": name, "fault": fault})
                    del calls[name]
            timings = single.timed(sizes, calls, args.seconds)
            base = single.first(timings, "cublas")
            rows += [row | {"of_frozen": row["median_us"] / base} for row in timings] + found
    single.finish(args, rows, "of_frozen", {})


if __name__ == "__main__":
    main()
