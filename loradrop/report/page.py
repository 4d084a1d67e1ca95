"""One self-contained page of what a run came to."""

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from loradrop.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from loradrop.report.grid import (
    INK,
    MARKS,
    MEANINGS,
    MUTED,
    ON_HOT,
    RULE,
    SERIES,
    Arm,
    Cell,
    Grid,
    as_percent,
    count_of,
    duration,
    layer_name,
    summary_of,
)
from loradrop.report.plots import curves, is_told, points_of


def _svg(figure: "Figure") -> str:
    """The figure for the page, whose scheme gives the colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    text = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    names = {INK: "ink", MUTED: "muted", RULE: "rule"} | {c: f"s{i}" for i, c in enumerate(SERIES)}
    for color, name in names.items():
        text = text.replace(color, f"var(--{name})")
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])


def _table(kind: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells with their tags."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    table = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table class="{kind}">{table}</table></div>'


def _meter(part: float) -> str:
    return f'<span class="meter" style="--w:{100 * part:.1f}%"></span>'


def _results(arms: Sequence[Arm]) -> str:
    metrics = list(dict.fromkeys(key for arm in arms for key in arm.metrics if is_told(key)))
    most, rows = max((arm.parameters for arm in arms), default=0) or 1, []
    for i, arm in enumerate(arms):
        size = f"{_meter(arm.parameters / most)}{arm.parameters:,}"
        values = [f"{arm.metrics[key]:.4f}" if key in arm.metrics else "–" for key in metrics]
        name = f'<i style="--c:var(--s{i % len(SERIES)})"></i>{escape(arm.name)}'
        cells = [size, *values, f"{arm.steps:,}", duration(arm.seconds)]
        rows.append([f"<th>{name}</th>", *(f"<td>{cell}</td>" for cell in cells)])
    heads = ["", "adapter parameters", *(f"dev {key}" for key in metrics), "steps", "time"]
    return _table("results", heads, rows)


def _square(grid: Grid, cell: Cell, right: bool) -> str:
    """A cell of the heat map, with all that is known about its target where one points at it."""
    group, target = grid.groups[cell.target.group], cell.target
    lines = [f"{MEANINGS[cell.state]}, {target.parameters:,} parameters", grid.name(group)]
    if cell.score is not None:
        rank = 1 + sum(other.weight > cell.weight for other in group)
        lines.append(f"score {cell.score:.4g}: {cell.percent} % of {grid.whole}")
        lines.append(f"rank {rank} of {len(group)} in its group")
    if cell.frequency is not None:
        lines.append(f"kept in {as_percent(cell.frequency)} % of the bootstrap's draws")
    tip = f"<b>{escape(target.name)}</b>{'<br>'.join(map(escape, lines))}"
    part = (cell.share or 0.0) / grid.top
    state = cell.state if grid.states else ""
    kind = f"cell {state}{' high' * (part > ON_HOT)}{' right' * right}"
    text = cell.percent if grid.scored else ""
    return (
        f'<td class="{kind}" style="--v:{100 * part:.1f}">{text}<span class="tip">{tip}</span></td>'
    )


def _map(grid: Grid) -> str:
    rows = []
    for layer in grid.layers:
        rows.append([f"<th>{layer_name(layer)}</th>"])
        for x, column in enumerate(grid.labels):
            cell, right = grid.cells.get((layer, column)), x > 3 and 2 * x >= len(grid.labels)
            rows[-1].append(_square(grid, cell, right) if cell else "<td></td>")
    return _table("map", ["layer", *grid.heads("\u200b")], rows)


def _groups(grid: Grid) -> str:
    items = []
    for group in grid.groups.values():
        lines = ""
        for state, meaning in MEANINGS.items():
            if count := count_of(group, state):
                where = escape(grid.where(group, state))
                lines += f"<dt>{meaning}: {count} of {len(group)}</dt><dd>{where}</dd>"
        items.append(f"<div><h3>{escape(grid.name(group))}</h3><dl>{lines}</dl></div>")
    return "\n".join(items)


def _stability(grid: Grid) -> str:
    """Where the draws of the bootstrap agree, and the targets where they do least."""
    drawn = [(cell, cell.frequency) for cell in grid if cell.frequency is not None]
    unsure = sorted((p for p in drawn if 0 < p[1] < 1), key=lambda p: abs(p[1] - 0.5))
    if not drawn:
        return "<p>No bootstrap was made of this selection.</p>"
    rows = []
    for cell, part in unsure[:10]:
        values = [
            f"{_meter(part)}{as_percent(part)} %",
            f"{MARKS[cell.state]} {MEANINGS[cell.state]}",
        ]
        name = f"<th>{escape(cell.target.name)}</th>"
        rows.append([name, *(f"<td>{value}</td>" for value in values)])
    sure = f"{len(drawn) - len(unsure)} of {len(drawn)} targets"
    calls = _table("calls", ["the closest calls", "kept in", "decision"], rows) if rows else ""
    return f"<p>A bootstrap of the scores decides {sure} alike in every draw.</p>\n{calls}"


def _facts(facts: Mapping[str, str]) -> str:
    items = (f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f'<dl class="facts">{"".join(items)}</dl>'


def write_report(
    path: str | os.PathLike[str], arms: Sequence[Arm], *, title: str, facts: Mapping[str, str]
) -> None:
    """One HTML page that needs nothing else: results, importance, decisions, losses, facts."""
    template = resources.files("loradrop").joinpath("assets", "report.html").read_text("utf-8")
    head, section, tail = map(Template, template.split("<!-- for each plan -->\n"))
    parts = [head.substitute(title=escape(title), results=_results(arms))]
    grids = [(arm, Grid(arm.plan)) for arm in arms if arm.plan is not None]
    for arm, grid in [pair for pair in grids if pair[1].scored or pair[1].states] or grids[:1]:
        shown = [*grid.states, *(["scored"] if grid.scored else [])]
        values = {"name": escape(arm.name), "whole": grid.whole, "top": as_percent(grid.top)}
        values |= {"shown": " ".join(shown), "summary": _facts(summary_of(grid.plan))}
        values |= {"map": _map(grid), "groups": _groups(grid), "stability": _stability(grid)}
        parts.append(section.substitute(values))
    logged = any(points_of(arm, "loss")[0] for arm in arms)
    drawn = _svg(curves(arms)) if logged else "No loss was logged."
    configs = {arm.name: grid.plan.config.to_dict() for arm, grid in grids}
    options = escape(json.dumps(configs, indent=2, ensure_ascii=False))
    parts.append(tail.substitute(curves=drawn, facts=_facts(facts), options=options))
    write_text(path, "".join(parts))
