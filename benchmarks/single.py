"""What the scripts that time single kernels share: options, clock, check and result file."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import clocks
import machine
import torch
from torch import Tensor

from loradrop.files import write_json
from loradrop.testing import error

Rows = list[dict[str, Any]]


def arguments(doc: str | None, script: str, *flags: str) -> argparse.Namespace:
    """The options, `flags` among them. Ends the script with 1 where there is no CUDA device."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style)
    parser.add_argument("--seconds", type=float, default=2.0, help="for one size")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    machine.need_cuda(Path(script).stem)
    args.out = machine.folder(args.results, "cuda") / f"{Path(script).stem}.json"
    return args


def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
    """Random bfloat16 numbers on the GPU."""
    return torch.randn(rows, columns, device="cuda").mul_(scale).bfloat16()


def right(call: Callable[[], Tensor], exact: Tensor, yardstick: Tensor) -> str | None:
    """None where the call is within twice PyTorch's error, or what is wrong with it."""
    try:
        found, limit = error(call(), exact), 2 * error(yardstick, exact)
    except Exception as fault:  # a variant that does not compile is a finding
        return f"{type(fault).__name__}: {(str(fault).splitlines() or [''])[0]}"
    return None if found <= limit else f"relative error {found:.3g}, PyTorch's is {limit / 2:.3g}"


def timed(
    sizes: Mapping[str, int], calls: Mapping[str, Callable[[], object]], seconds: float
) -> Rows:
    """A row for each call at one size, all interleaved."""
    samples = clocks.measure(calls, "cuda", seconds)
    names = ("median_us", "p20_us", "p80_us")
    return [
        {**sizes, "variant": name, **{n: round(getattr(sample, n), 2) for n in names}}
        for name, sample in samples.items()
    ]


def finish(args: argparse.Namespace, rows: Rows, figure: str, about: dict[str, Any]) -> None:
    """Prints the rows, `figure` being the column that answers the question, and writes the file."""
    for row in rows:
        size = "x".join(str(row[name]) for name in ("M", "K", "N"))
        value = row.get("fault") or f"{row['median_us']:9.1f} µs  {figure} {row[figure]:.3f}"
        print(f"{size:<18} r={row.get('r', 0):<4} {row['variant']:<28} {value}")
    known = {"environment": machine.environment("cuda", machine.facts("cuda", args.commit))}
    write_json(args.out, known | about | {"rows": rows})


def first(rows: Rows, variant: str) -> float:
    """The median of a variant."""
    return next(float(row["median_us"]) for row in rows if row["variant"] == variant)
