"""One self-contained page of what a run came to; its markup is in assets/report.html."""

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loradrop.files import rendered, write_text
from loradrop.report import grid as grids
from loradrop.report.grid import INK, MUTED, RULE, SERIES, Arm, Grid
from loradrop.report.plots import curves, is_reported, points_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLOSEST = 10  # targets that the bootstrap is least sure of


def _svg(figure: "Figure") -> str:
    """The figure for the page, whose scheme gives the colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    text = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    names = {INK: "ink", MUTED: "muted", RULE: "rule"} | {c: f"s{i}" for i, c in enumerate(SERIES)}
    for color, name in names.items():
        text = text.replace(color, f"var(--{name})")
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])


def _by_doubt(grid: Grid) -> list[grids.Cell]:
    cells = [cell for cell in grid if cell.frequency is not None]
    return sorted(cells, key=lambda cell: abs((cell.frequency or 0.0) - 0.5))


def write_report(
    path: str | os.PathLike[str], arms: Sequence[Arm], *, title: str, facts: Mapping[str, str]
) -> None:
    """One HTML page that needs nothing else: results, importance, decisions, losses, facts."""
    planned = {arm.name: Grid(arm.plan) for arm in arms if arm.plan is not None}
    decided = {name: grid for name, grid in planned.items() if grid.scored or grid.states}
    drawn = {name: _by_doubt(grid) for name, grid in planned.items()}
    metrics = dict.fromkeys(key for arm in arms for key in arm.metrics if is_reported(key))
    logged = any(points_of(arm, "loss")[0] for arm in arms)
    configs = {name: grid.config.to_dict() for name, grid in planned.items()}
    page = rendered(
        "report.html",
        title=title,
        arms=arms,
        metrics=metrics,
        heads=["", "adapter parameters", *(f"dev {key}" for key in metrics), "steps", "time"],
        most=max((arm.parameters for arm in arms), default=0) or 1,
        grids=decided or dict(list(planned.items())[:1]),
        drawn=drawn,
        closest=CLOSEST,
        curves=_svg(curves(arms)) if logged else None,
        facts=facts,
        options=json.dumps(configs, indent=2, ensure_ascii=False),
        words=grids,
    )
    write_text(path, page)
