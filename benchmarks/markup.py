"""The words and the form that all tables share."""

from collections.abc import Iterable, Sequence

from timing import Cell, Row

MISSING = "not yet measured"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def shape(cell: Cell) -> str:
    """M×K→N"""
    return f"{cell.M}×{cell.K}→{cell.N}"


def direction(cell: Cell) -> str:
    """forward, or forward + backward"""
    return cell.direction.replace("_", " + ")


def unique(rows: Iterable[Row], column: str) -> str:
    """The values of a column, each once."""
    return ", ".join(dict.fromkeys(row[column] for row in rows))


def about(rows: Sequence[Row]) -> str:
    """Which machine and which versions measured the rows of a GPU."""
    return (
        f"{unique(rows, 'device')}, torch {unique(rows, 'torch')}, Triton "
        f"{unique(rows, 'triton')}, driver {unique(rows, 'driver')}, commit "
        f"{unique(rows, 'commit')}"
    )
