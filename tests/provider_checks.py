"""Every provider of a GPU that serves on this machine, by values and gradients.

python tests/provider_checks.py DTYPE [SKIPPED]     prints who was checked; SKIPPED begins names
"""

import sys
from dataclasses import replace

import torch

from bench_parts import parts
from lib.correct import check
from lib.providers import probing, providers
from lib.results import Cell
from loradrop.measuring.cases import make_case
from loradrop.op.points import BACKWARD, FORWARD


def checked(dtype: str, skipped: str = "none") -> set[str]:
    """The keys of those that serve. Raises AssertionError for one that computes something else."""
    found = set()
    for dropout, direction in ((0.1, BACKWARD), (0.0, FORWARD)):
        cell = Cell(dtype, 40, 64, 96, 4, dropout, direction)
        case = replace(make_case(cell, "cpu"), bias=None)
        for provider in [each for of in (providers, probing, parts) for each in of(dtype, "cuda")]:
            if provider.name.startswith(skipped) or provider.refuses(cell, case):
                continue
            check(provider, case, dropout > 0.0)
            found.add(provider.key)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*checked(*sys.argv[1:]), sep="\n")
