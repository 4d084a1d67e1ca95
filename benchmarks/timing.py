"""Figures that can be compared: rows of a result file, and ratios formed within one process."""

import csv
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS = (
    *("device", "dtype", "M", "K", "N", "r", "dropout", "norm", "direction", "provider"),
    *("median_us", "p20_us", "p80_us", "peak_bytes", "torch", "triton", "driver", "commit", "date"),
)

# One thread, and a C library that keeps freed memory. Otherwise new pages for temporaries cost as
# much as the arithmetic or nothing, by what ran before. Who has most temporaries gains most.
SURROUNDINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}

Row = dict[str, str]


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
    """`peft` for the PEFT whose adapters have x's dtype, the provider's name for others.

    `+norm` marks the provider that gives the squared norm too; of a hook that goes without saying.
    """
    matching = {"float32": "peft_fp32", "bfloat16": "peft_bf16", "float16": "peft_fp16"}
    name = "peft" if row["provider"] == matching[row["dtype"]] else row["provider"]
    hooked = name.startswith("peft_hook")
    return f"{name}+norm" if row["norm"] == "1" and not hooked else name


def cell_of(row: Row) -> Cell:
    """The cell of a row of a provider that has an adapter."""
    sizes = (int(row[column]) for column in ("M", "K", "N", "r"))
    return Cell(row["dtype"], *sizes, float(row["dropout"]), row["direction"])


def paired(rows: Iterable[Row]) -> list[Ratios]:
    """Every cell's ratios. The rows measured together share their date; products without an
    adapter, whose r is 0, belong to the cell that they were measured with.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = [row[column] for column in ("dtype", "M", "K", "N", "direction", "date")]
        groups.setdefault(tuple(key), []).append(row)
    frozen: dict[Cell, list[float]] = {}
    ratios: dict[Cell, dict[str, list[float]]] = {}
    for group in groups.values():
        base = [float(row["median_us"]) for row in group if row["provider"] == "frozen"]
        cells = dict.fromkeys(cell_of(row) for row in group if row["r"] != "0")
        for cell in cells if base else ():
            frozen.setdefault(cell, []).append(base[0])
            of_cell = ratios.setdefault(cell, {})
            for row in group:
                if row["provider"] != "frozen" and (row["r"] == "0" or cell_of(row) == cell):
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
