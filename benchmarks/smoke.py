"""Does every backend give right values here? A small call and a Llama-shaped one of each, forward
and backward, with dropout and without, against float64.

    python benchmarks/smoke.py --device cuda              all backends, each in a process of its own
    python benchmarks/smoke.py --device cuda --only thin  one backend, in this process

A backend that gives wrong values, fails, ends its process or hangs is named, and the others are not
disturbed. Ends with 1 where one was named.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

from lib import package

SECONDS = 45.0  # for one backend, its compilation included
SMALL, LLAMA = (37, 136, 264), (2048, 4096, 4096)  # M, K, N
OK, ABSENT = "right", "not here"
HUNG = "gave no answer"
Command = Callable[[str], list[str]]  # backend -> what checks it


def one(backend: str, device: str) -> str:
    """`OK`, or why the backend is not here. Raises AssertionError where a value is wrong."""
    from lib.correct import check
    from lib.providers import named
    from lib.results import Cell
    from loradrop.measuring.cases import make_case
    from loradrop.op.points import BACKWARD

    dtype = "bfloat16" if device == "cuda" else "float32"
    sizes = (SMALL, LLAMA) if device == "cuda" else (SMALL,)
    for m, k, n in sizes:
        for dropout in (0.0, 0.1):
            cell = Cell(dtype, m, k, n, 16, dropout, BACKWARD)
            provider, case = named(backend, norm=True), replace(make_case(cell, device), bias=None)
            if reason := provider.refuses(cell, case):
                if dropout:  # it serves the layer without
                    continue
                return f"{ABSENT}: {reason}"
            try:
                check(provider, case, True)
            except AssertionError as error:
                raise AssertionError(f"{m}x{k}->{n}, dropout {dropout:g}: {error}") from None
    return OK


def commands(device: str) -> Command:
    """The checks on that device."""
    return lambda name: [sys.executable, __file__, "--device", device, "--only", name]


def together(names: Iterable[str], command: Command, seconds: float) -> dict[str, str]:
    """What became of each backend, all checked at once."""
    pipe = subprocess.PIPE
    children = {n: subprocess.Popen(command(n), stdout=pipe, stderr=pipe, text=True) for n in names}
    deadline, found = time.monotonic() + seconds, {}
    for name, child in children.items():
        try:
            out, errors = child.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            with suppress(subprocess.TimeoutExpired):  # one that hangs in a driver stays
                child.communicate(timeout=5.0)
            found[name] = f"{HUNG} in {seconds:g} s"
            continue
        last = ((out if child.returncode == 0 else errors).strip().splitlines() or [""])[-1]
        found[name] = last if child.returncode == 0 else f"ended with {child.returncode}: {last}"
    return found


def run(command: Command, seconds: float = SECONDS) -> dict[str, str]:
    """Backend -> what became of it. Whoever gives no answer in time is asked again by itself, once:
    the others, or one that hangs, may have held it up.
    """
    found = together(package.BACKENDS, command, seconds)
    for name in [name for name, outcome in found.items() if outcome.startswith(HUNG)]:
        found |= together([name], command, seconds)
    return found


def faulty(found: dict[str, str]) -> dict[str, str]:
    """The backends to leave out of everything, and why."""
    return {n: why for n, why in found.items() if why != OK and not why.startswith(ABSENT)}


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=package.BACKENDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one backend")
    args = parser.parse_args()
    if args.only:
        print(one(args.only, args.device))
        return 0
    found = run(commands(args.device), args.seconds)
    print(json.dumps(found))
    return 1 if faulty(found) else 0


if __name__ == "__main__":
    sys.exit(main())
