"""Processor time of calls, measured in processes of their own: with this checkout of loradrop, and
in alternation with another one.

One thread; the clock counts processor time, so that a busy machine disturbs little.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lib import ROOT

Calls = Mapping[str, Callable[[], object]]


def arguments(doc: str, out: Path, processes: int, **measure: Any) -> argparse.Namespace:
    """Those of a script; `measure` says what `--measure`, which ends a process, takes."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style)
    parser.add_argument("--before", type=Path, help="a checkout of loradrop to compare with")
    count = f"of each checkout; default: {processes}"
    parser.add_argument("--processes", type=int, default=processes, help=count)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--measure", help="one process: print and end", **measure)
    return parser.parse_args()


def checkouts(before: Path | None) -> dict[str, Path]:
    """Which -> its folder: this checkout is "after"."""
    return ({"before": before.resolve()} if before else {}) | {"after": ROOT}


def use_checkout() -> None:
    """In a process of `in_a_process`: what lies in its folder is imported, not this checkout."""
    import torch

    sys.path.insert(0, os.getcwd())
    import loradrop

    assert Path(loradrop.__file__).is_relative_to(Path.cwd()), loradrop.__file__
    torch.set_num_threads(1)
    torch.manual_seed(0)


def in_a_process(script: str, checkout: Path, *what: str) -> Any:
    """What `script --measure WHAT` prints, as JSON, with the loradrop of that checkout."""
    one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, script, "--measure", *what],
        env=os.environ | one, cwd=checkout, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def times(calls: Calls, count: int, blocks: int) -> dict[str, list[float]]:
    """Microseconds of each call: of blocks of `count`, all calls' blocks shuffled, after one."""
    found: dict[str, list[float]] = {}
    for name, call in calls.items():
        found[name] = []
        for _ in range(count):
            call()
    order = list(calls) * blocks
    random.Random(0).shuffle(order)
    for name in order:
        call, start = calls[name], time.process_time_ns()
        for _ in range(count):
            call()
        found[name].append((time.process_time_ns() - start) / count / 1e3)
    return found


def median(values: Any, digits: int) -> float:
    """Rounded, as a result file holds it."""
    return round(statistics.median(values), digits)


def write(
    args: argparse.Namespace, protocol: Mapping[str, Any], key: str, rows: list[dict[str, Any]]
) -> None:
    """The result file, with the rows under `key`, and the rows themselves on stdout."""
    from lib.environment import commit_of, device_name
    from loradrop.command.env import report

    facts = {name: of for name, of in report().items() if name in ("python", "packages", "cpu")}
    facts["cpu"]["name"] = device_name("cpu")
    commits = {which: commit_of(path) for which, path in checkouts(args.before).items()}
    how = {"clock": "process time", "processes": args.processes, **protocol}
    whole = {"environment": facts | {"commits": commits}, "protocol": how, key: rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(json.dumps(row))
