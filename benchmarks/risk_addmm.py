"""Does `addmm_` in place run at the speed of memory, and what does the other form cost? bfloat16.

    in place       y.addmm_(h, Bᵀ): y (M, N) is read and written once
    out of place   torch.addmm(y, h, Bᵀ): where it copies y first, twice as much

The floor is those bytes over the bandwidth of a large copy, measured in the same run.

    python benchmarks/risk_addmm.py
"""

import machine
import single
import torch
from grids import shapes

SHAPES = "8192x16x4096,8192x64x4096,8192x16x14336,2048x16x4096"


def main() -> None:
    args = single.arguments(__doc__, __file__)
    ceilings = machine.ceilings()
    rows: single.Rows = []
    for m, r, n in shapes(SHAPES):
        y, h, B = single.normal(m, n), single.normal(m, r), single.normal(n, r, r**-0.5)
        floor = 2 * y.numel() * y.element_size() / ceilings["copy_bytes_per_s"] * 1e6
        calls = {
            "in place": lambda y=y, h=h, B=B: y.addmm_(h, B.T, alpha=1e-3),  # y must not overflow
            "out of place": lambda y=y, h=h, B=B: torch.addmm(y, h, B.T, alpha=1e-3),
        }
        sizes = {"M": m, "K": r, "N": n, "r": r}
        for row in single.timed(sizes, calls, args.seconds):
            rows.append(row | {"floor_us": floor, "of_floor": row["median_us"] / floor})
    single.finish(args, rows, "of_floor", {"ceilings": ceilings})


if __name__ == "__main__":
    main()
