"""One self-contained page of what a run came to; its markup is in assets/report.html."""

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loradrop.files import rendered, write_text
from loradrop.formats.card import of_head
from loradrop.native import TENSORS, read
from loradrop.plan import Plan
from loradrop.report import look
from loradrop.report.grid import Arm, Cell, Grid, count
from loradrop.report.look import INK, MUTED, RULE, SERIES
from loradrop.report.plots import curves, is_reported, points_of, spectra

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


def _by_doubt(grid: Grid) -> list[Cell]:
    cells = [cell for cell in grid if cell.frequency is not None]
    return sorted(cells, key=lambda cell: abs((cell.frequency or 0.0) - 0.5))


def how_to_load(plan: Plan, folder: str | os.PathLike[str], num_labels: int | None = None) -> str:
    """Python that loads the base model of transformers and the native adapter in `folder`.

    num_labels   of a model with a head for classes; None for any other
    """
    base, cls = plan.base, str(plan.base.get("class") or "AutoModel")
    lines = ["import loradrop", f"from transformers import {cls}", ""]
    head = "" if num_labels is None else of_head(num_labels, base.get("labels"))
    where = base.get("id") or "path/to/the/base/model"
    if base.get("id") and base.get("revision"):
        head = f", revision={base['revision']!r}{head}"
    lines += [f"model = {cls}.from_pretrained({where!r}{head})"]
    return "\n".join([*lines, f"loradrop.load(model, {os.fspath(folder)!r})"])


def file_size(plan: Plan, folder: str | os.PathLike[str]) -> str:
    """The bytes of the native adapter in `folder`, and of LoRA's own on all targets."""
    size = os.path.getsize(os.path.join(folder, TENSORS))
    bank = sum(tensor.nbytes for tensor in read(folder).bank.values())
    all_targets = size + bank * (plan.lora_parameters / (plan.parameters or 1) - 1)
    return f"{size:,} bytes; LoRA on all targets: about {all_targets:,.0f}"


def write_report(
    path: str | os.PathLike[str], arms: Sequence[Arm], *, title: str, facts: Mapping[str, str]
) -> None:
    """One HTML page that needs nothing else: results, importance, decisions, losses, facts.

    A fact of several lines is shown as code.
    """
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
        spectra={arm.name: _svg(spectra(arm.plan)) for arm in arms if arm.plan and arm.plan.cut},
        facts=facts,
        options=json.dumps(configs, indent=2, ensure_ascii=False),
        words=look,
        count=count,
    )
    write_text(path, page)
