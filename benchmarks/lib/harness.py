"""How a benchmark of layers runs: processes of their own measure every cell, its providers
interleaved; ratios are formed within a process. Every cell is written when it is there, and whoever
runs the script again measures what is missing, at whichever commit the rest was measured.
"""

import argparse
import gc
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lib import RESULTS, environment, grids, package, results
from lib.correct import check
from lib.providers import Provider
from lib.results import Cell, Row
from loradrop.files import read_json, write_json
from loradrop.measuring import timing, workers
from loradrop.measuring.cases import make_case, run_once
from loradrop.measuring.correct import forget
from loradrop.measuring.workers import device_survives, first_line

PROCESSES = {"cpu": 5, "cuda": 1}
SECONDS = {"cpu": 5.0, "cuda": 1.0}
PATIENCE = {"cpu": 900.0, "cuda": 90.0}  # seconds for one provider, its compilation included


Notes = dict[str, dict[str, list[str]]]  # errors, left_out -> reason -> cells


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


def run_cell(
    compared: Sequence[Provider],
    cell: Cell,
    device: str,
    seconds: float,
    facts: Row,
    without: Collection[str] = (),
    begin: Callable[[str], None] = lambda _: None,
) -> Measured:
    """The rows of all providers that are right, and what became of the others.

    `without` are providers, or backends whose providers are left out. Raises
    `workers.BrokenDeviceError` where a provider leaves the device unusable.
    """
    date = datetime.now(UTC).isoformat(timespec="milliseconds")
    cases, backward = [make_case(cell, device)], cell.direction == "forward_backward"
    if grids.in_graph(cell, device):
        count = timing.copies(cases[0].bytes)
        cases += [make_case(cell, device, number) for number in range(1, count)]
    picked, without = package.chosen(cases[0], backward), set(without)
    chosen, calls = {}, {}
    errors, left_out = [], []
    for provider in compared:
        backend = picked if provider.name == "loradrop" else provider.backend
        begin(provider.key)
        own = [case.widened() for case in cases] if provider.wide else cases
        try:
            asked = "as asked" if {provider.key, backend} & without else None
            if reason := asked or provider.refuses(cell, cases[0]):
                left_out.append(f"{provider.key} is left out: {reason}")
                continue
            check(provider, own[0], backward)
            runs = [partial(run_once, provider.make(case), case, backward) for case in own]
            calls[provider.key] = timing.Graph(runs) if len(runs) > 1 else runs[0]
        except AssertionError as error:
            errors.append(f"{provider.key} is wrong, and gets no number: {error}")
        except Exception as error:  # one that fails must not cost the others their numbers
            if not device_survives(device):
                raise workers.BrokenDeviceError(provider.key, first_line(error)) from None
            errors.append(f"{provider.key} fails, and gets no number: {first_line(error)}")
        else:
            chosen[provider.key] = provider
    forget()
    begin(workers.TASK)  # from here on nobody can be blamed
    rows = []
    for key, sample in timing.measure(calls, device, seconds).items() if calls else ():
        provider, row = chosen[key], cell._asdict() | facts | {"date": date}
        row |= {"provider": provider.name, "norm": int(provider.norm)}
        if provider.bare:
            row |= {"r": 0, "dropout": 0.0}
        row |= {name: f"{value:.2f}" for name, value in list(sample._asdict().items())[:3]}
        row["peak_bytes"] = "" if sample.peak_bytes is None else sample.peak_bytes
        rows.append({column: str(row[column]) for column in results.COLUMNS})
    return Measured(rows, errors, left_out)


def options(doc: str | None) -> argparse.ArgumentParser:
    """The options of everything that is measured."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, help="of timing, for a cell in one process")
    parser.add_argument("--without", default="", help="providers or backends to leave out: a,b")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def arguments(doc: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of every benchmark of layers."""
    parser = options(doc)
    parser.add_argument("--grid", help=f"of {', '.join(grids.GRIDS)}; default: all of the device's")
    parser.add_argument("--dtype", help="default: bfloat16; on a CPU float32, bfloat16 if native")
    parser.add_argument("--shapes", help="MxKxN,... instead of the grid's")
    parser.add_argument("--ranks", help="instead of the grid's")
    parser.add_argument("--directions", help=f"of {', '.join(grids.DIRECTIONS)}")
    parser.add_argument("--processes", type=int, help="default: 5 on a CPU, 1 on CUDA")
    parser.add_argument("--out", type=Path, help="default: RESULTS/DEVICE/BENCHMARK.csv")
    return parser.parse_args(argv)


def chosen_cells(args: argparse.Namespace, default: str) -> list[Cell]:
    """The cells that the options ask for. Ends the script for what it cannot read."""
    try:
        names = (args.grid or default).split(",")
        if unknown := [name for name in names if name not in grids.GRIDS]:
            known = ", ".join(grids.GRIDS)
            raise ValueError(f"--grid {unknown[0]} is unknown; there are {known}")
        chosen = [grid for name in names for grid in grids.GRIDS[name]]
        given: dict[str, Any] = {}
        if args.shapes:
            given["shapes"] = grids.shapes(args.shapes)
        if args.ranks:
            given["ranks"] = tuple(map(int, args.ranks.split(",")))
        if args.directions:
            given["directions"] = tuple(args.directions.split(","))
        if unknown := [n for n in given.get("directions", ()) if n not in grids.DIRECTIONS]:
            raise ValueError(f"--directions {unknown[0]}: choose of {', '.join(grids.DIRECTIONS)}")
    except ValueError as error:
        sys.exit(str(error))
    return grids.cells([grid._replace(**given) for grid in chosen], args.dtype.split(","))


def _work(
    bench: Bench,
    args: argparse.Namespace,
    facts: Row,
    task: list[Any],
    without: set[str],
    begin: Callable[[str], None],
) -> Measured:
    """What a worker does with a cell."""
    torch.set_num_threads(1)
    cell = Cell(*task)
    without |= set(args.without.split(","))
    compared = bench.providers(cell.dtype, args.device)
    measured = run_cell(compared, cell, args.device, args.seconds, facts, without, begin)
    gc.collect()  # graphs hold their memory
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # or else it stops compiling after the eighth size
    return measured


def _measured(
    bench: Bench, args: argparse.Namespace, cells: list[Cell]
) -> Iterator[tuple[Cell, Measured]]:
    """What came of the cells, in their order; who ended a process is among the errors."""
    command = [sys.executable, bench.script, "--worker", "--device", args.device]
    command += ["--seconds", str(args.seconds), "--commit", args.commit, "--without", args.without]
    answers = workers.answers(command, cells, PATIENCE[args.device])
    for cell, answer in zip(cells, answers, strict=True):
        found = Measured(*(answer.value or ([], [], [])))
        lost = [f"{name or 'the cell'} gets no number: {why}" for name, why in answer.lost.items()]
        yield cell, found._replace(errors=lost + found.errors)


def main(bench: Bench, args: argparse.Namespace) -> int:
    """Measures what is missing. Ends with 1 where a provider was wrong or failed."""
    if args.device == "cuda":
        environment.need_cuda("--device cuda")
    facts = environment.facts(args.device, args.commit)
    args.commit = facts["commit"]
    args.seconds = SECONDS[args.device] if args.seconds is None else args.seconds
    if args.worker:
        workers.serve(partial(_work, bench, args, facts))
        return 0
    args.dtype = args.dtype or grids.dtypes(args.device)
    cells = chosen_cells(args, bench.grids[args.device])
    processes = args.processes or PROCESSES[args.device]
    csv = args.out or environment.folder(args.results, args.device) / f"{bench.name}.csv"
    there, asked = results.read_rows(csv), set(cells)
    foreign = {row["date"] for row in there if row["device"] != facts["device"]}
    dates = {row["date"] for row in there if results.cell_of(row) in asked}
    if replaced := sum(row["date"] in foreign & dates for row in there):
        print(f"{replaced} rows of another machine are replaced")
    dates = dates if args.fresh else foreign & dates
    rows = [row for row in there if row["date"] not in dates]
    beside = csv.with_suffix(".json")
    about = _about(args, facts)
    kept = read_json(beside) if rows and beside.exists() else {}
    clocks = [of["protocol"]["clock"] for of in (kept, about) if of]
    if len(set(clocks)) > 1:
        print(f"{len(rows)} rows are measured again, by another clock: {', then '.join(clocks)}")
        rows, kept = [], {}
    notes: Notes = {name: kept.get(name, {}) for name in ("errors", "left_out")}
    lost_here = [of for of in kept.get("given_up", ()) if of["commit"] == args.commit]
    given_up = {Cell(*of["cell"]) for of in lost_here if not args.fresh}
    failed, told = False, set()
    for process in range(processes):
        measured = {(results.cell_of(row), row["date"]) for row in rows if row["r"] != "0"}
        done = Counter(cell for cell, _ in measured)
        missing = [cell for cell in cells if done[cell] <= process and cell not in given_up]
        for cell, new in _measured(bench, args, missing):
            rows += new.rows
            if not new.rows:
                given_up.add(cell)
            failed |= bool(new.errors)
            results.write_rows(csv, rows)
            lost = [{"cell": list(of), "commit": args.commit} for of in given_up]
            note(notes, cell, new, again=not done[cell])
            write_json(beside, about | {"given_up": lost} | notes)
            unsaid = [reason for reason in new.left_out if reason not in told]
            told |= set(unsaid)
            figures = [f"{results.label(row)} {row['median_us']} µs" for row in new.rows]
            print(f"{process + 1}/{processes}", *cell, ", ".join(figures) or "nothing measured")
            print(*(f"  {line}" for line in (*unsaid, *new.errors)), sep="\n", flush=True)
    return 1 if failed else 0


def note(notes: Notes, cell: Cell, new: Measured, again: bool) -> None:
    """Adds why providers have no figure in a cell; `again`: what was known of it holds no more."""
    name = " ".join(map(str, cell))
    for kind, reasons in (("errors", new.errors), ("left_out", new.left_out)):
        known = notes[kind]
        for reason in [reason for reason, cells in known.items() if again and name in cells]:
            known[reason].remove(name)
        for reason in reasons:
            if name not in known.setdefault(reason, []):
                known[reason].append(name)
        notes[kind] = {reason: cells for reason, cells in known.items() if cells}


def _about(args: argparse.Namespace, facts: Row) -> dict[str, Any]:
    """The machine and the protocol."""
    protocol: dict[str, Any] = {
        "process": workers.SURROUNDINGS,
        "clock": "process time" if args.device == "cpu" else "CUDA events, L2 cold and clean",
        "bias": args.device == "cpu",
        "seconds": args.seconds,
        "rounds": timing.ROUNDS,
    }
    if args.device == "cuda":
        protocol["in_a_graph"] = f"forward of up to {grids.FEW} tokens, inputs rotating"
    return {"environment": environment.environment(args.device, facts), "protocol": protocol}
