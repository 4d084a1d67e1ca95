"""What LoRA costs over the frozen product alone: PEFT, PEFT with a norm hook, addmm, and loradrop.

Every provider gets the same x, W, A and B, and is compared with the float64 reference before it is
timed: a wrong one gets no number, and the script ends with 1. Several processes measure every cell,
its providers interleaved; ratios are formed within a process. A second run adds what is missing.

    python benchmarks/bench_lora_linear.py                    the CPU, one thread
    python benchmarks/bench_lora_linear.py --device cuda      one CUDA device

Adapters have x's dtype, but for `peft_fp32` beside an x of half precision. There is a bias on a
CPU (encoders) and none on CUDA (Llama). `forward` runs under `no_grad`; in `forward_backward` x, A
and B need gradients.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import timing
import torch
from providers import Case, Output, check, forget, frozen, make_case, providers
from timing import Cell, Row
from torch import nn

from loradrop.env import report
from loradrop.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = {  # MxKxN
    "cpu": "4096x384x384,4096x384x1536,2048x768x768,2048x768x3072,512x4096x4096",
    "cuda": "8192x4096x4096,8192x4096x11008,8192x11008x4096,8192x4096x14336,8192x14336x4096,"
    "8192x5120x5120,8192x4096x1024",
}
DTYPES = {"cpu": "float32,bfloat16", "cuda": "bfloat16"}
PROCESSES = {"cpu": 5, "cuda": 1}


def run_cell(cell: Cell, device: str, seconds: float, facts: Row) -> tuple[list[Row], list[str]]:
    """The rows of all providers that are right, and what the others got wrong."""
    date = datetime.now(UTC).isoformat(timespec="milliseconds")
    shared, backward = make_case(cell, device), cell.direction == "forward_backward"
    chosen, calls, errors = {}, {}, []

    def timed(run: Callable[[], Output], case: Case) -> None:
        if backward:
            run()[0].backward(case.dy)
            case.x.grad = case.A.grad = case.B.grad = None
        else:
            with torch.no_grad():
                run()

    for provider in providers(cell.dtype, device):
        case, key = shared, f"{provider.name}{'+norm' if provider.norm else ''}"
        if provider.wide:
            wide = (nn.Parameter(t.detach().float()) for t in (case.A, case.B))
            case = replace(case, **dict(zip("AB", wide, strict=True)))
        try:
            check(provider, case, backward)
        except AssertionError as error:
            errors.append(f"{key} is wrong, and gets no number: {error}")
            continue
        chosen[key], calls[key] = provider, partial(timed, provider.make(case), case)
    forget()
    rows = []
    for key, sample in timing.measure(calls, device, seconds).items():
        provider, row = chosen[key], cell._asdict() | facts | {"date": date}
        row |= {"provider": provider.name, "norm": int(provider.norm)}
        if provider.make is frozen:
            row |= {"r": 0, "dropout": 0.0}
        row |= {name: f"{value:.2f}" for name, value in list(sample._asdict().items())[:3]}
        row["peak_bytes"] = sample.peak_bytes or ""
        rows.append({column: str(row[column]) for column in timing.COLUMNS})
    return rows, errors


def _facts(device: str, commit: str | None) -> Row:
    """The columns that are the same in every row of one run."""

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    driver = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    return {
        "device": _device_name(device),
        "torch": torch.__version__,
        "triton": report()["packages"]["triton"] or "",
        "driver": said(*driver).split("\n")[0] if device == "cuda" else "",
        "commit": commit or said("git", "rev-parse", "--short", "HEAD"),
    }


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _arguments() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", help="default: float32,bfloat16 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--shapes", help="MxKxN,..., default: those of encoders, or of Llama")
    parser.add_argument("--ranks", default="8")
    parser.add_argument("--dropouts", default="0.0")
    parser.add_argument("--directions", default="forward,forward_backward")
    parser.add_argument("--processes", type=int, help="default: 5 on a CPU, 1 on CUDA")
    parser.add_argument("--seconds", type=float, default=5.0, help="for a cell in one process")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE/...csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _cells(args: argparse.Namespace) -> list[Cell]:
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    ranks, dropouts = map(int, args.ranks.split(",")), map(float, args.dropouts.split(","))
    grid = product(args.directions.split(","), ranks, dropouts, shapes, args.dtype.split(","))
    return [Cell(dtype, *mkn, r, p, direction) for direction, r, p, mkn, dtype in grid]


def _work(args: argparse.Namespace, facts: Row) -> None:
    """What one of the processes does: a line of JSON for each cell."""
    torch.set_num_threads(1)
    for cell in json.loads(args.worker):
        rows, errors = run_cell(Cell(*cell), args.device, args.seconds, facts)
        print(json.dumps([rows, errors]), flush=True)


def _summary(args: argparse.Namespace, facts: Row, rows: list[Row]) -> dict[str, Any]:
    cells = timing.paired(rows)
    goals = []
    for r, direction in sorted({(cell.cell.r, cell.cell.direction) for cell in cells}):
        figures = timing.goal(cells, r, direction)
        if figures is not None:
            named = figures._asdict() | {"loradrop_of_peft": figures.of_peft}
            goals.append({"r": r, "direction": direction} | named)
    protocol = {
        "process": timing.SURROUNDINGS,
        "clock": "process time" if args.device == "cpu" else "CUDA events, L2 cold",
        "bias": args.device == "cpu",
        "seconds": args.seconds,
        "rounds": timing.ROUNDS,
    }
    return {
        "environment": report() | {"platform": platform.system()} | facts,
        "protocol": protocol,
        "goals": goals,
        "rows": [
            cell.cell._asdict() | {"frozen_us": cell.frozen_us, "ratios": cell.ratios}
            for cell in cells
        ],
    }


def main() -> int:
    args = _arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no CUDA device here; choose --device cpu")
    facts = _facts(args.device, args.commit)
    args.shapes = args.shapes or SHAPES[args.device]
    args.dtype = args.dtype or DTYPES[args.device]
    args.processes = args.processes or PROCESSES[args.device]
    folder = "cpu" if args.device == "cpu" else facts["device"].lower().replace(" ", "-")
    args.out = args.out or RESULTS / folder / "bench_lora_linear.csv"
    if args.worker:
        _work(args, facts)
        return 0
    rows = [] if args.fresh else timing.read_rows(args.out)
    ours = [row for row in rows if all(row[name] == value for name, value in facts.items())]
    if len(ours) < len(rows):
        print(f"{len(rows) - len(ours)} rows of another machine, version or commit are replaced")
    rows, failed = ours, set()
    for process in range(args.processes):
        done = {cell.cell: len(cell.frozen_us) for cell in timing.paired(rows)}
        missing = [cell for cell in _cells(args) if done.get(cell, 0) <= process]
        argv = ["--device", args.device, "--seconds", str(args.seconds)]
        argv += ["--commit", facts["commit"], "--worker", json.dumps(missing)]
        for new, errors in timing.in_process(__file__, argv) if missing else ():
            rows += new
            failed |= set(errors)
            timing.write_rows(args.out, rows)
            print(f"{process + 1}/{args.processes}", _line(new), *errors, sep="\n  ", flush=True)
    write_json(args.out.with_suffix(".json"), _summary(args, facts, rows))
    return 1 if failed else 0


def _line(rows: list[Row]) -> str:
    if not rows:
        return "nothing measured"
    base = float(rows[0]["median_us"])
    size = "{dtype} {M}x{K}->{N} {direction}".format(**rows[-1])
    ratios = (f"{timing.label(row)} {float(row['median_us']) / base:.3f}" for row in rows[1:])
    return f"{size} r={rows[-1]['r']}: linear {base / 1e3:.2f} ms, " + ", ".join(ratios)


if __name__ == "__main__":
    sys.exit(main())
