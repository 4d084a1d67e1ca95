"""The words and the form that all tables share."""

from collections.abc import Iterable, Sequence

MISSING = "not yet measured"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def unique(rows: Iterable[dict[str, str]], column: str) -> str:
    """The values of a column, each once."""
    return ", ".join(dict.fromkeys(row[column] for row in rows))
