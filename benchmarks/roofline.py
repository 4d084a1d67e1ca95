"""What a layer could cost on a GPU, by arithmetic: nothing here is measured.

    python benchmarks/roofline.py                           an H100
    python benchmarks/roofline.py --device "NVIDIA L4"      any device that costs.py knows by name

In the layout of the measured table of docs/results.md: ratios to the frozen product, which is in
µs. `floor` is what no backend can be faster than; the others are the backends as they are built. A
second table has what they move, in MB, and how often they launch. Rates and counts come from
`loradrop/op/costs.py`.
"""

import argparse
import itertools
from collections.abc import Callable

import torch

from lib.markdown import markdown
from loradrop.op import costs
from loradrop.op.call import Problem
from loradrop.op.points import DIRECTIONS, SERVING

M, RANKS, DROPOUTS = 8192, (16, 64, 128), (0.0, 0.1)
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (14336, 4096))
COLUMNS = ["dtype", "M", "K", "N", "r", "dropout", "direction", "frozen", "floor"]
CHIPS = {"H100": (90, 132), "H200": (90, 132), "A100": (80, 108), "B200": (100, 148),
         "4090": (89, 128), "L4": (89, 58), "5090": (120, 170), "3090": (86, 82)}  # fmt: skip


def problems(device: str) -> list[Problem]:
    """The layers of a Llama on the device, forward and with the backward pass."""
    words = device.upper().split()
    arch, sms = next((facts for chip, facts in CHIPS.items() if chip in words), (90, 132))
    cells = itertools.product(SHAPES, RANKS, DROPOUTS, (False, True))
    return [
        Problem("cuda", torch.bfloat16, M, k, n, r, p, grad, arch=arch, sms=sms, device_name=device)
        for (k, n), r, p, grad in cells
    ]


def floor(problem: Problem) -> costs.Work:
    """What no backend can be faster than: the frozen products with the LoRA product in the same
    sums, and x once more for dA, which needs all of dy first. Dropout adds its bits.
    """
    m, k, n, size = problem.m, problem.k, problem.n, problem.dtype.itemsize
    rate, passes = costs.rates_of(problem), 1 + problem.grad
    amount = size * (m * k + k * n + m * n)
    thin = 2.0 * m * (k + n) * problem.r  # h and its product with B; t and its product with A
    each = max((2.0 * m * k * n + thin) / rate.flops, amount / rate.bytes)
    more = size * m * k * problem.grad + (problem.dropout > 0) * m * k / 8
    return costs.Work(1e6 * (passes * each + more / rate.bytes), passes * amount + more, passes)


def frozen(problem: Problem) -> costs.Work:
    """The frozen product by cuBLAS, with that of dx."""
    m, k, n, passes = problem.m, problem.k, problem.n, 1 + problem.grad
    rate = costs.rates_of(problem)
    amount = problem.dtype.itemsize * (m * k + k * n + m * n)
    each = max(2.0 * m * k * n / rate.flops, amount / rate.bytes)
    return costs.Work(1e6 * passes * each, passes * amount, passes)


def backends(problem: Problem) -> list[str]:
    """Those that are built for the architecture."""
    return [n for n in SERVING if problem.arch == 90 or n not in ("cuda", "overlap")]


def lines(device: str, of: Callable[[costs.Work, costs.Work], str]) -> list[list[str]]:
    """A line for each layer: `of` a backend's work and the frozen one."""
    made = []
    for problem in problems(device):
        base = frozen(problem)
        direction = DIRECTIONS[problem.grad]
        facts = ("bfloat16", M, problem.k, problem.n, problem.r, problem.dropout, direction)
        works = [floor(problem), *(costs.work(problem, n) for n in backends(problem))]
        made.append([*map(str, facts), f"{base.us:.0f}", *(of(work, base) for work in works)])
    return made


def sheet(device: str) -> str:
    """Both tables."""
    columns = [*COLUMNS, *(f"loradrop_{name}" for name in backends(problems(device)[0]))]
    ratio = markdown(columns, lines(device, lambda work, base: f"{work.us / base.us:.2f}"))
    moved = lines(device, lambda work, _: f"{work.bytes / 1e6:.0f}, {work.launches}")
    titles = f"{device}: predicted, over the frozen product", f"{device}: MB moved, and launches"
    return f"{titles[0]}\n\n{ratio}\n\n{titles[1]}\n\n{markdown(columns, moved)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="NVIDIA H100 80GB HBM3", help="as its driver calls it")
    print(sheet(parser.parse_args().device))
