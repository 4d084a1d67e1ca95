"""How a benchmark of layers runs: several processes measure every cell, its providers interleaved;
ratios are formed within a process. Whoever runs it again measures what is missing.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import clocks
import grids
import machine
import timing
import torch
from cases import Case, Output, make_case
from correct import check, forget
from providers import Provider
from timing import Cell, Row
from torch import nn

from loradrop.files import read_json, write_json
from loradrop.op import dispatch

PROCESSES = {"cpu": 5, "cuda": 1}
SECONDS = {"cpu": 5.0, "cuda": 1.0}


class Bench(NamedTuple):
    """One benchmark: its script, what it compares, and the names of its grids by device."""

    script: str
    providers: Callable[[str, str], list[Provider]]  # of a dtype on a device
    grids: dict[str, str]

    @property
    def name(self) -> str:
        """Of its result files."""
        return Path(self.script).stem


class Measured(NamedTuple):
    """What came of one cell in one process."""

    rows: list[Row]
    errors: list[str]
    left_out: list[str]  # who cannot serve, and why
    chosen: str  # the backend that the dispatcher picked


def _timed(run: Callable[[], Output], case: Case, backward: bool) -> None:
    if backward:
        run()[0].backward(case.dy)
        case.x.grad = case.A.grad = case.B.grad = None
    else:
        with torch.no_grad():
            run()


def _widened(case: Case) -> Case:
    wide = (nn.Parameter(t.detach().float()) for t in (case.A, case.B))
    return replace(case, **dict(zip("AB", wide, strict=True)))


def run_cell(
    compared: Sequence[Provider], cell: Cell, device: str, seconds: float, facts: Row
) -> Measured:
    """The rows of all providers that are right, and what became of the others."""
    date = datetime.now(UTC).isoformat(timespec="milliseconds")
    cases, backward = [make_case(cell, device)], cell.direction == "forward_backward"
    if grids.in_graph(cell, device):
        count = clocks.copies(cases[0].bytes)
        cases += [make_case(cell, device, number) for number in range(1, count)]
    chosen, calls = {}, {}
    errors, left_out = [], []
    for provider in compared:
        reason = provider.refuses(cell, cases[0].x)
        if reason is not None:
            left_out.append(f"{provider.key} is left out: {reason}")
            continue
        own = [_widened(case) for case in cases] if provider.wide else cases
        try:
            check(provider, own[0], backward)
            runs = [partial(_timed, provider.make(case), case, backward) for case in own]
            calls[provider.key] = clocks.Graph(runs) if len(runs) > 1 else runs[0]
        except AssertionError as error:
            errors.append(f"{provider.key} is wrong, and gets no number: {error}")
        except Exception as error:  # one that fails must not cost the others their numbers
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            errors.append(f"{provider.key} fails, and gets no number: {said}")
        else:
            chosen[provider.key] = provider
    forget()
    rows = []
    for key, sample in clocks.measure(calls, device, seconds).items() if calls else ():
        provider, row = chosen[key], cell._asdict() | facts | {"date": date}
        row |= {"provider": provider.name, "norm": int(provider.norm)}
        if provider.bare:
            row |= {"r": 0, "dropout": 0.0}
        row |= {name: f"{value:.2f}" for name, value in list(sample._asdict().items())[:3]}
        row["peak_bytes"] = "" if sample.peak_bytes is None else sample.peak_bytes
        rows.append({column: str(row[column]) for column in timing.COLUMNS})
    layer = machine.problem(cases[0].x, cell.N, cell.r, cell.dropout, backward)
    return Measured(rows, errors, left_out, dispatch.choose(layer))


def arguments(doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of every benchmark of layers."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--grid", help=f"of {', '.join(grids.GRIDS)}; default: all of the device's")
    parser.add_argument("--dtype", help="default: float32,bfloat16 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--shapes", help="MxKxN,... instead of a grid, at rank 8 without dropout")
    parser.add_argument("--ranks", help="instead of the grid's")
    parser.add_argument("--dropouts", help="instead of the grid's")
    parser.add_argument("--directions", help="of forward,forward_backward; default: the grid's")
    parser.add_argument("--processes", type=int, help="default: 5 on a CPU, 1 on CUDA")
    parser.add_argument("--seconds", type=float, help="for a cell in one process; default: 5, or 1")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    parser.add_argument("--out", type=Path, help="default: RESULTS/DEVICE/BENCHMARK.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def chosen_cells(args: argparse.Namespace, default: str) -> list[Cell]:
    """The cells that the options ask for. Ends the script for what it cannot read."""
    try:
        if args.shapes:
            chosen = [grids.Grid(grids.shapes(args.shapes))]
        else:
            names = (args.grid or default).split(",")
            if unknown := [name for name in names if name not in grids.GRIDS]:
                known = ", ".join(grids.GRIDS)
                raise ValueError(f"--grid {unknown[0]} is unknown; there are {known}")
            chosen = [grid for name in names for grid in grids.GRIDS[name]]
        given = {}
        for name, kind in (("ranks", int), ("dropouts", float), ("directions", str)):
            if getattr(args, name):
                given[name] = tuple(map(kind, getattr(args, name).split(",")))
        if unknown := [name for name in given.get("directions", ()) if name not in grids.BOTH]:
            raise ValueError(f"--directions {unknown[0]}: choose of {', '.join(grids.BOTH)}")
    except ValueError as error:
        sys.exit(str(error))
    return grids.cells([grid._replace(**given) for grid in chosen], args.dtype.split(","))


def _worker(bench: Bench, args: argparse.Namespace, facts: Row) -> None:
    """What one of the processes does: a line of JSON for each cell."""
    torch.set_num_threads(1)
    for numbers in json.loads(args.worker):
        cell = Cell(*numbers)
        compared = bench.providers(cell.dtype, args.device)
        measured = run_cell(compared, cell, args.device, args.seconds, facts)
        print(json.dumps(measured), flush=True)
        gc.collect()  # graphs hold their memory
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # or else it stops compiling after the eighth size


def _measured(bench: Bench, args: argparse.Namespace, missing: list[Cell]) -> Iterator[Measured]:
    """What came of the missing cells, in their order. A cell at which its process dies, as one does
    after a fault of the GPU, gets no numbers, and another process takes the rest.
    """
    fruitless = 0
    while missing:
        argv = ["--device", args.device, "--seconds", str(args.seconds), "--dtype", args.dtype]
        argv += ["--commit", args.commit, "--worker", json.dumps(missing)]
        done = 0
        try:
            for line in timing.in_process(bench.script, argv):
                done += 1
                yield Measured(*line)
        except RuntimeError as error:
            fruitless = 0 if done else fruitless + 1
            if fruitless == 2:
                raise
            yield Measured([], [str(error)], [], "")
            done += 1
        missing = missing[done:]


def main(bench: Bench, args: argparse.Namespace) -> int:
    """Measures what is missing. Ends with 1 where a provider was wrong or failed."""
    if args.device == "cuda":
        machine.need_cuda("--device cuda")
    facts = machine.facts(args.device, args.commit)
    args.commit, args.dtype = facts["commit"], args.dtype or grids.DTYPES[args.device]
    args.seconds = SECONDS[args.device] if args.seconds is None else args.seconds
    if args.worker:
        _worker(bench, args, facts)
        return 0
    cells = chosen_cells(args, bench.grids[args.device])
    processes = args.processes or PROCESSES[args.device]
    csv = args.out or machine.folder(args.results, args.device) / f"{bench.name}.csv"
    rows = [] if args.fresh else timing.read_rows(csv)
    ours = [row for row in rows if all(row[name] == value for name, value in facts.items())]
    if len(ours) < len(rows):
        print(f"{len(rows) - len(ours)} rows of another machine, version or commit are replaced")
    kept = read_json(csv.with_suffix(".json")) if ours and csv.with_suffix(".json").exists() else {}
    report = _about(args, facts, kept)
    chosen = {Cell(*row["cell"]): row["chosen"] for row in kept.get("dispatcher", ())}
    rows, failed, said = ours, False, set()
    for process in range(processes):
        done = {cell.cell: len(cell.frozen_us) for cell in timing.paired(rows)}
        missing = [cell for cell in cells if done.get(cell, 0) <= process]
        for cell, new in zip(missing, _measured(bench, args, missing), strict=True):
            rows += new.rows
            if new.chosen:
                chosen[cell] = new.chosen
            failed |= bool(new.errors)
            timing.write_rows(csv, rows)
            write_json(csv.with_suffix(".json"), _summary(report, rows, chosen))
            notes = [note for note in new.left_out if note not in said]
            said |= set(notes)
            head = f"{process + 1}/{processes}", _line(new.rows)
            print(*head, *notes, *new.errors, sep="\n  ", flush=True)
    write_json(csv.with_suffix(".json"), _summary(report, rows, chosen))
    return 1 if failed else 0


def _about(args: argparse.Namespace, facts: Row, kept: dict[str, Any]) -> dict[str, Any]:
    """The machine and the protocol."""
    protocol: dict[str, Any] = {
        "process": timing.SURROUNDINGS,
        "clock": "process time" if args.device == "cpu" else "CUDA events, L2 cold",
        "bias": args.device == "cpu",
        "seconds": args.seconds,
        "rounds": clocks.ROUNDS,
    }
    about = {"environment": machine.environment(args.device, facts), "protocol": protocol}
    if args.device == "cuda":
        protocol["in_a_graph"] = f"forward of up to {grids.FEW} tokens, inputs rotating"
        about["ceilings"] = kept.get("ceilings") or machine.ceilings()
        torch.cuda.empty_cache()  # the measuring process needs the memory
    return about


def _summary(about: dict[str, Any], rows: list[Row], chosen: dict[Cell, str]) -> dict[str, Any]:
    cells = timing.paired(rows)
    goals = []
    for r, direction in sorted({(cell.cell.r, cell.cell.direction) for cell in cells}):
        figures = timing.goal(cells, r, direction)
        if figures is not None:
            named = figures._asdict() | {"loradrop_of_peft": figures.of_peft}
            goals.append({"r": r, "direction": direction} | named)
    picks = [{"cell": list(cell), "chosen": name} for cell, name in chosen.items()]
    return about | {
        "goals": goals,
        "rows": [
            cell.cell._asdict() | {"frozen_us": cell.frozen_us, "ratios": cell.ratios}
            for cell in cells
        ],
        "dispatcher": picks,
    }


def _line(rows: list[Row]) -> str:
    if not rows:
        return "nothing measured"
    base = float(rows[0]["median_us"])
    about = next((row for row in rows if row["r"] != "0"), rows[0])
    size = "{dtype} {M}x{K}->{N} {direction} r={r} dropout={dropout}".format(**about)
    ratios = (f"{timing.label(row)} {float(row['median_us']) / base:.3f}" for row in rows[1:])
    return f"{size}: linear {base / 1e3:.3f} ms, " + ", ".join(ratios)
