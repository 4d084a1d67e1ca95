"""The tables for a terminal."""

import math
import sys
from collections.abc import Sequence

from loradrop.plan import Plan
from loradrop.report.grid import Arm, Grid, count, finite
from loradrop.report.look import MARKS, PLAIN_MARKS, as_percent, duration, layer_name

_SHADES, _PLAIN_SHADES = " ░▒▓█", " .:+#"
_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", ".:-=+*%#"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines of a table, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return ["   ".join(row).rstrip() for row in cells]


def plan_table(plan: Plan, encoding: str | None = None) -> str:
    """The plan for a terminal: a grid of layers and module types, its groups, and totals.

    encoding   of what it is written to, which may lack the marks; None is that of stdout
    """
    grid = Grid(plan)
    rich = _writes("".join(MARKS.values()) + _SHADES + _BARS, encoding or sys.stdout.encoding)
    marks, shades = (MARKS, _SHADES) if rich else (PLAIN_MARKS, _PLAIN_SHADES)
    bars = _BARS if rich else _PLAIN_BARS
    top = max((finite(value) for cell in grid for value in cell.directions), default=0.0)
    spectra = {at: _spectrum(cell.directions, top, bars) for at, cell in grid.cells.items()}
    wide = max(map(len, spectra.values()), default=0)

    def text(layer: int | None, column: str) -> str:
        if (cell := grid.cells.get((layer, column))) is None:
            return ""
        if grid.cut:
            return f"{spectra[layer, column]:<{wide}} {cell.percent:>4} r{cell.rank:<2}"
        shade = shades[math.ceil(4 * grid.shade(cell))]
        return f"{2 * shade} {cell.percent:>4} {marks[cell.state]}"

    heads = [head.split("\n") for head in grid.heads("\n")]
    tall = max(map(len, heads))
    stacked = zip(*([""] * (tall - len(head)) + head for head in heads), strict=True)
    rows = [["layer" if i == tall - 1 else "", *line] for i, line in enumerate(stacked)]
    rows += [[layer_name(n), *(text(n, column) for column in grid.labels)] for n in grid.layers]
    groups = [["group", *marks.values(), "score", f"held by {marks['own']}"]]
    for cells in [*grid.groups.values(), list(grid)]:
        name = "all" if len(groups) > len(grid.groups) else grid.name(cells)
        score, total = sum(finite(cell.score) for cell in cells), sum(c.weight for c in cells)
        held = as_percent(sum(c.weight for c in cells if c.state == "own") / (total or 1.0))
        scored = [f"{score:.4g}", f"{held} %"] if grid.scored else ["–", "–"]
        groups.append([name, *(str(count(cells, state)) for state in marks), *scored])
    topic = f"importance in % of {grid.whole}" if grid.scored else "importance not measured"
    topic += ", and the rank that is left" if grid.cut else ""
    lines = [f"{grid.model_name}: {topic}", "", *aligned(rows), ""]
    if grid.cut:
        ladder = "<".join(bars)
        lines += [f"what each direction was worth, each step three times as much: {ladder}", ""]
    lines += ["   ".join(f"{marks[s]} {grid.meanings[s]}" for s in marks), "", *aligned(groups), ""]
    return "\n".join([*lines, *(f"{key:<11} {value}" for key, value in grid.summary.items())])


def _spectrum(values: Sequence[float], top: float, bars: str) -> str:
    """A bar for each value; of more than eight for every second, or third, and so on."""
    text = ""
    for value in values[:: math.ceil(len(values) / len(bars)) or 1]:
        below = math.log(top / value, 3) if 0 < value <= top else math.inf
        text += bars[-1 - round(below)] if below < len(bars) - 0.5 else " "
    return text


def _writes(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def arms_table(arms: Sequence[Arm], metric: str) -> str:
    """The arms for a terminal: adapter parameters, `metric` on dev, time."""
    rows = [["", "adapter parameters", f"dev {metric}", "time"]]
    for arm in arms:
        value = f"{arm.metrics[metric]:.4f}" if metric in arm.metrics else "–"
        rows.append([arm.name, f"{arm.parameters:,}", value, duration(arm.seconds)])
    return "\n".join(aligned(rows))
