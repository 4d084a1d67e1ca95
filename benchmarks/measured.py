"""The dispatcher's table, `loradrop/assets/measured.json`, from the committed result files.

    python benchmarks/measured.py            writes it
    python benchmarks/measured.py --check    writes nothing; ends with 1 where it differs

A point is a layer on one GPU, and what it takes there with each backend, in µs: the medians of the
providers `loradrop_BACKEND` in bench_lora_linear.csv. `loradrop/costs.py` reads it.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from timing import cell_of, read_rows

from loradrop.files import read_json, write_text
from loradrop.op.costs import SERVING

ASSET = machine.ROOT / "loradrop" / "assets" / "measured.json"
KEYS = ("arch", "sms", "dtype", "k", "n", "m", "r", "dropout", "grad")


def points_of(csv: Path) -> list[dict[str, Any]]:
    """The points of one GPU. Raises ValueError without the facts of the GPU beside the file."""
    beside = csv.with_suffix(".json")
    chip = read_json(beside)["environment"].get("chip") if beside.exists() else None
    if chip is None:
        raise ValueError(f"{beside.name} in {csv.parent.name} does not say environment.chip")
    times: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in read_rows(csv):
        backend = row["provider"].removeprefix("loradrop_")
        if backend not in SERVING or backend == row["provider"] or row["norm"] == "1":
            continue
        c = cell_of(row)
        drops, grads = int(c.dropout > 0.0), int(c.direction == "forward_backward")
        key = (chip["arch"], chip["sms"], c.dtype, c.K, c.N, c.M, c.r, drops, grads)
        times.setdefault(key, {}).setdefault(backend, []).append(float(row["median_us"]))
    return [
        dict(zip(KEYS, key, strict=True))
        | {"us": {b: round(statistics.median(us[b]), 1) for b in SERVING if b in us}}
        for key, us in times.items()
    ]


def points(results: Path) -> list[dict[str, Any]]:
    """Those of every GPU, in an order of their own."""
    files = sorted(results.glob("*/bench_lora_linear.csv"))
    found = [point for csv in files if csv.parent.name != "cpu" for point in points_of(csv)]
    return sorted(found, key=lambda point: [point[key] for key in KEYS])


def text(found: Sequence[dict[str, Any]]) -> str:
    """The file: a point a line."""
    lines = ",".join(f"\n  {json.dumps(point)}" for point in found)
    return '{"schema": 1, "points": [' + lines + ("\n]}\n" if found else "]}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Ends with 1 where `--check` finds a difference."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    parser.add_argument("--out", type=Path, default=ASSET)
    args = parser.parse_args(argv)
    try:
        made = text(points(args.results))
    except ValueError as error:
        sys.exit(str(error))
    there = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else None
    if there == json.loads(made):
        return 0
    if args.check:
        print(f"{args.out.name} is not what the results give. Write it: {Path(__file__).name}")
        return 1
    write_text(args.out, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
