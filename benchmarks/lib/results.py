"""The rows of a result file, and the ratios between those that were measured together."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lib.markdown import SHORT
from loradrop.op.points import Cell

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = (
    *("device", "dtype", "M", "K", "N", "r", "dropout", "norm", "direction", "provider"),
    *("median_us", "p20_us", "p80_us", "peak_bytes", "torch", "triton", "driver", "commit", "date"),
)
FROZEN = "frozen"  # the provider that is the linear layer alone
Row = dict[str, str]


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


def cell_of(row: Row) -> Cell:
    """The cell of a row of a provider that has an adapter; others have r = 0."""
    sizes = (int(row[column]) for column in ("M", "K", "N", "r"))
    return Cell(row["dtype"], *sizes, float(row["dropout"]), row["direction"])


def label(row: Row) -> str:
    """`peft` for the PEFT whose adapters have x's dtype, the provider's name for others.

    `+norm` marks the provider that gives the squared norm too; of a hook that goes without saying.
    """
    name = "peft" if row["provider"] == f"peft_{SHORT[row['dtype']]}" else row["provider"]
    hooked = name.startswith("peft_hook")
    return f"{name}+norm" if row["norm"] == "1" and not hooked else name


def ratios(rows: Iterable[Row]) -> "DataFrame":
    """Times over that of the frozen product beside them: a row for each cell in each process, by
    `Cell` and date, a column for each label; `frozen` itself is in µs.

    The rows measured together share their date. The frozen product, whose r is 0, belongs to the
    cell that it was measured with.
    """
    import pandas as pd

    rows = list(rows)
    cells = {_group(row): cell_of(row) for row in rows if row["r"] != "0"}
    flat = [
        {**cells[_group(row)]._asdict(), "date": row["date"], label(row): float(row["median_us"])}
        for row in rows
        if _group(row) in cells
    ]
    index = [*Cell._fields, "date"]
    labels = dict.fromkeys([FROZEN, *(name for of in flat for name in of if name not in index)])
    table = pd.DataFrame(flat, columns=[*index, *labels])
    table = table.groupby(index, sort=False).first().dropna(subset=[FROZEN])
    return table.div(table[FROZEN], axis=0).assign(**{FROZEN: table[FROZEN]})


def _group(row: Row) -> tuple[str, ...]:
    """What the rows measured together have in common."""
    return tuple(row[column] for column in ("dtype", "M", "K", "N", "direction", "date"))


def medians(table: "DataFrame") -> "DataFrame":
    """Every cell's medians over the processes."""
    return table.groupby(list(Cell._fields), sort=False).median()
