"""The picture of `bench_sizes.py`: dev loss over trained parameters, at the study's own α."""

import re
import statistics
from pathlib import Path
from typing import Any

from lib.size_tables import SUMMARY, final_cells, interval
from loradrop.files import replacing
from loradrop.report.look import INK, MUTED, RULE, SERIES

SEEDS = 5
FAMILIES = {  # what the names of arms are like
    r"LoRA r=\d+": "LoRA",
    r"LoRA-drop, 1/\d+": "LoRA-drop",
    r"spectral, 1/\d+": "spectral LoRA-drop",
    r"LoRA r=8, cut to 1/\d+": "LoRA r=8, cut after training",
}


def draw(results: Path, path: Path) -> None:
    """A PNG with a panel for each task of at least `SEEDS` seeds: mean and 95 % interval of every
    arm of a family.
    """
    from matplotlib.figure import Figure

    final = final_cells(results)
    drawn = re.compile("|".join(FAMILIES))
    several = (of for of, cells in final.items() if len(cells) >= SEEDS)
    tasks = list(dict.fromkeys(task for task, arm in several if drawn.fullmatch(arm)))
    figure = Figure(figsize=(4.4 * len(tasks), 3.4), layout="constrained", facecolor="white")
    handles: dict[str, Any] = {}
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for i, (color, (names, family)) in enumerate(zip(SERIES, FAMILIES.items(), strict=False)):
            points, aside = [], 1.03 ** (i - 1.5)  # arms of one size stand side by side
            for (of, arm), cells in final.items():
                if of == task and re.fullmatch(names, arm):
                    mean, half = interval([cell["loss"] for cell in cells])
                    size = statistics.mean(cell["parameters"] for cell in cells)
                    points.append((aside * size, mean, half or 0.0))
            if points:
                handles[family] = axes.errorbar(
                    *zip(*sorted(points), strict=True), color=color, marker="o", markersize=4,
                    capsize=3, linewidth=1.4,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        here = [cells for (of, arm), cells in final.items() if of == task and drawn.fullmatch(arm)]
        sizes: list[float] = []
        for size in sorted({round(c["parameters"], -3) for cells in here for c in cells}):
            if not sizes or size > 1.2 * sizes[-1]:  # nearer ones would be written over each other
                sizes.append(size)
        axes.set_xticks(sizes, [f"{size / 1000:.0f}k" for size in sizes], rotation=45)
        axes.minorticks_off()
        axes.set_title(SUMMARY.get(task, task), color=INK, fontsize=11)
        axes.set_xlabel("trained parameters", color=MUTED, fontsize=9)
        axes.set_ylabel("dev loss", color=MUTED, fontsize=9)
        axes.grid(color=RULE, linewidth=0.8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=MUTED, labelsize=8)
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=4, frameon=False)
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=150, backend="agg")
