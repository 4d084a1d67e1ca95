"""Figures that can be compared: interleaved measurements, and ratios formed within one process.

On a CPU the clock counts the processor time of one thread, so that a busy machine disturbs little.
On a CUDA device, events time the work alone: L2 is flushed before every call, and the stream sleeps
while Python launches.
"""

import csv
import io
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS = (
    *("device", "dtype", "M", "K", "N", "r", "dropout", "norm", "direction", "provider"),
    *("median_us", "p20_us", "p80_us", "peak_bytes", "torch", "triton", "driver", "commit", "date"),
)
ROUNDS = (7, 51)  # at least, at most
_FLUSH_BYTES = 256 << 20  # several times any L2
_SLEEP_CYCLES = 10_000_000  # some milliseconds, longer than launching takes

# One thread, and a C library that keeps freed memory. Otherwise new pages for temporaries cost as
# much as the arithmetic or nothing, by what ran before. Who has most temporaries gains most.
SURROUNDINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}

Call = Callable[[], object]
Row = dict[str, str]


class Sample(NamedTuple):
    """The time of one call over all rounds, and its peak of memory (None on a CPU)."""

    median_us: float
    p20_us: float
    p80_us: float
    peak_bytes: int | None


class Cell(NamedTuple):
    """What is measured together, in one interleaved group: x (M, K) times weight (N, K), rank r."""

    dtype: str
    M: int
    K: int
    N: int
    r: int
    dropout: float
    direction: str


class Ratios(NamedTuple):
    """Times over that of the frozen product beside them: by label, a list over processes."""

    cell: Cell
    frozen_us: Sequence[float]
    ratios: Mapping[str, Sequence[float]]

    def median(self, label: str) -> float:
        """The median over processes."""
        return statistics.median(self.ratios[label])


def cpu_clock(calls: Sequence[Call]) -> list[float]:
    """Microseconds of processor time of each call, in the order given."""
    times = []
    for call in calls:
        start = time.process_time_ns()
        call()
        times.append((time.process_time_ns() - start) / 1e3)
    return times


def cuda_clock(calls: Sequence[Call]) -> list[float]:
    """Microseconds of device time of each call, L2 cold, in the order given."""
    import torch

    cache = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = []
    for call in calls:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]


def _peak_bytes(call: Call) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(calls: Mapping[str, Call], device: str, seconds: float) -> dict[str, Sample]:
    """Times all calls in rounds, each round in an order of its own, for about `seconds`."""
    clock = cuda_clock if device == "cuda" else cpu_clock
    names, draw = list(calls), random.Random(0)
    clock([calls[name] for name in names])  # warm-up
    times: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.monotonic() + seconds
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.monotonic() > deadline:
            break
        draw.shuffle(names)
        for name, value in zip(names, clock([calls[name] for name in names]), strict=True):
            times[name].append(value)
    samples = {}
    for name, values in times.items():
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        peak = _peak_bytes(calls[name]) if device == "cuda" else None
        samples[name] = Sample(statistics.median(values), fifths[0], fifths[3], peak)
    return samples


def read_rows(path: Path) -> list[Row]:
    """The rows of a result file, none without a file. Raises ValueError for other columns."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path.name}: columns {reader.fieldnames}, not {list(COLUMNS)}")
        return list(reader)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replaces the file, atomically."""
    from loradrop.files import write_text

    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def in_process(script: str, argv: Sequence[str]) -> Iterator[Any]:
    """The JSON lines that a process of its own prints, as they come: see `SURROUNDINGS`."""
    command, surroundings = [sys.executable, script, *argv], os.environ | SURROUNDINGS
    with subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        yield from map(json.loads, worker.stdout)
    if worker.returncode != 0:
        raise RuntimeError(f"the measuring process ended with {worker.returncode}: see above")


def label(row: Row) -> str:
    """`peft` for the PEFT whose adapters have x's dtype, the provider's name for others."""
    matching = {"float32": "peft_fp32", "bfloat16": "peft_bf16", "float16": "peft_fp16"}
    name = "peft" if row["provider"] == matching[row["dtype"]] else row["provider"]
    return f"{name}+norm" if row["norm"] == "1" and name != "peft_hook" else name


def paired(rows: Iterable[Row]) -> list[Ratios]:
    """Every cell's ratios. The rows measured together share their date."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = [row[column] for column in ("dtype", "M", "K", "N", "direction", "date")]
        groups.setdefault(tuple(key), []).append(row)
    frozen: dict[Cell, list[float]] = {}
    ratios: dict[Cell, dict[str, list[float]]] = {}
    for group in groups.values():
        base = [float(row["median_us"]) for row in group if row["provider"] == "frozen"]
        seen = set()
        for row in group:
            if row["provider"] == "frozen" or not base:
                continue
            sizes = (int(row[column]) for column in ("M", "K", "N", "r"))
            cell = Cell(row["dtype"], *sizes, float(row["dropout"]), row["direction"])
            if cell not in seen:
                frozen.setdefault(cell, []).append(base[0])
                seen.add(cell)
            of_cell = ratios.setdefault(cell, {})
            of_cell.setdefault(label(row), []).append(float(row["median_us"]) / base[0])
    return [Ratios(cell, frozen[cell], of_cell) for cell, of_cell in ratios.items()]


class Goal(NamedTuple):
    """Overheads (ratio − 1) summed over the cells, of which each is the median over processes."""

    cells: int
    processes: int  # of the cell that has fewest
    peft: float
    hook: float
    loradrop: float
    loradrop_norm: float
    norm: float  # with − without, a process at a time, as a mean over the cells

    @property
    def of_peft(self) -> float:
        """Our overhead as a part of PEFT's."""
        return self.loradrop / self.peft


def goal(cells: Iterable[Ratios], r: int, direction: str) -> Goal | None:
    """The goal's figures of one rank and direction, without dropout; None without measurements."""
    needed = ("peft", "peft_hook", "loradrop", "loradrop+norm")
    chosen = [
        cell
        for cell in cells
        if (cell.cell.r, cell.cell.direction, cell.cell.dropout) == (r, direction, 0.0)
        and set(needed) <= set(cell.ratios)
    ]
    if not chosen:
        return None
    norms = [
        statistics.median(
            on - off
            for on, off in zip(cell.ratios["loradrop+norm"], cell.ratios["loradrop"], strict=True)
        )
        for cell in chosen
    ]
    overheads = (sum(cell.median(name) - 1.0 for cell in chosen) for name in needed)
    processes = min(len(cell.ratios["loradrop"]) for cell in chosen)
    return Goal(len(chosen), processes, *overheads, norm=statistics.mean(norms))
