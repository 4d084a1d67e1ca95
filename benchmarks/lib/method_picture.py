"""The picture of `bench_methods.py`: each method's loss on dev against LoRA's of the same size."""

from pathlib import Path
from typing import Any

from lib.method_tables import RIVAL, by_method
from lib.size_tables import against, interval
from loradrop.files import replacing
from loradrop.report.grid import INK, MUTED, RULE, SERIES


def draw(results: Path, path: Path) -> None:
    """A PNG, a panel for each task: mean and 95 % interval over the seeds; colours are budgets."""
    from matplotlib.figure import Figure

    found = by_method(results)
    keys = {key for of_task in found.values() for key in of_task if key[0] != RIVAL}
    every = dict.fromkeys(name for of_task in found.values() for name, _ in of_task)
    names = [name for name in every if name != RIVAL]
    budgets = sorted({budget for _, budget in keys})
    size = (1.5 + 3.4 * len(found), 1.4 + 0.34 * len(names))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    handles: dict[str, Any] = {}
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (task, cells) in zip(panels, found.items(), strict=True):
        axes.axvline(0.0, color=MUTED, linewidth=1.2)
        for k, (budget, color) in enumerate(zip(budgets, SERIES, strict=False)):
            rival = cells.get((RIVAL, budget), [])
            for place, name in enumerate(names):
                pairs = against(cells.get((name, budget), []), rival)
                if pairs:
                    mean, half = interval(pairs)
                    handles[f"size of LoRA r={budget}"] = axes.errorbar(
                        mean, place + 0.22 * (k - (len(budgets) - 1) / 2), xerr=half or 0.0,
                        color=color, marker="o", markersize=4, capsize=2, linewidth=1.4,
                    )  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.set_title(task, color=INK, fontsize=11)
        axes.set_xlabel("dev loss against LoRA's, %", color=MUTED, fontsize=9)
        axes.grid(color=RULE, linewidth=0.8, axis="x")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=MUTED, labelsize=8)
    panels[0].invert_yaxis()
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=3, frameon=False)
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=150, backend="agg")
