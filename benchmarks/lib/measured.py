"""The dispatcher's table, `loradrop/assets/measured.json`, from the result files.

A point is a layer on one GPU, and what it takes there with each backend, in µs: the medians of the
providers `loradrop_BACKEND` in bench_lora_linear.csv. `loradrop/op/costs.py` reads it.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib import ROOT
from lib.package import BACKENDS
from lib.results import cell_of, read_rows
from loradrop.files import read_json
from loradrop.op.points import KEYS, key_of, point_of

ASSET = ROOT / "loradrop" / "assets" / "measured.json"


def points_of(csv: Path) -> list[dict[str, Any]]:
    """The points of one GPU. Raises ValueError without the facts of the GPU beside the file."""
    beside = csv.with_suffix(".json")
    chip = read_json(beside)["environment"].get("chip") if beside.exists() else None
    if chip is None:
        raise ValueError(f"{beside.name} in {csv.parent.name} does not say environment.chip")
    times: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in read_rows(csv):
        backend = row["provider"].removeprefix("loradrop_")
        if backend not in BACKENDS or backend == row["provider"] or row["norm"] == "1":
            continue
        key = key_of(cell_of(row), row["device"], chip["arch"], chip["sms"])
        times.setdefault(key, {}).setdefault(backend, []).append(float(row["median_us"]))
    return [
        point_of(key, {b: round(statistics.median(us[b]), 1) for b in BACKENDS if b in us})
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
