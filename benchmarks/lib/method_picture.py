"""The picture of `bench_methods.py`: loss on dev over parameters, and each method beside LoRA."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lib.method_tables import RIVAL, Key, by_method
from lib.size_tables import Cell, against, interval
from loradrop.files import replacing
from loradrop.report.look import INK, MUTED, RULE, SERIES


class Point(NamedTuple):
    """One method at one size: mean and half of its 95 % interval over the seeds."""

    parameters: float
    loss: float
    half: float
    name: str


def points_of(cells: dict[Key, list[Cell]]) -> list[Point]:
    """Every method at every size that one task has, the smallest first."""
    found = []
    for (name, _), runs in cells.items():
        mean, half = interval([run["loss"] for run in runs])
        size = statistics.mean(run["parameters"] for run in runs)
        found.append(Point(size, mean, half or 0.0, name))
    return sorted(found)


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points to which no other has at most as many parameters and at most the loss."""
    best: list[Point] = []
    for point in sorted(points):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def draw(results: Path, path: Path) -> None:
    """A PNG with a column for each task: loss over parameters with the frontier, and below it the
    loss against LoRA's of the same size; mean and 95 % interval, colours are sizes.
    """
    from matplotlib.figure import Figure

    found = by_method(results)
    every = dict.fromkeys(name for of_task in found.values() for name, _ in of_task)
    names = [name for name in every if name != RIVAL]
    budgets = sorted({budget for of_task in found.values() for _, budget in of_task})
    size = (2.2 + 3.4 * len(found), 4.4 + 0.34 * len(names))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    rows = {"height_ratios": (3.0, 1.0 + 0.34 * len(names))}
    panels = figure.subplots(2, len(found), squeeze=False, gridspec_kw=rows)
    handles: dict[str, Any] = {}
    for above, below, (task, cells) in zip(*panels, found.items(), strict=True):
        above.set_title(task, color=INK, fontsize=11)
        _over_parameters(above, cells, handles)
        _beside_lora(below, cells, names, budgets, handles)
        for axes in (above, below):
            axes.grid(color=RULE, linewidth=0.8, axis="x" if axes is below else "both")
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0, colors=MUTED, labelsize=8)
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=3, frameon=False)
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=150, backend="agg")


def _over_parameters(axes: Any, cells: dict[Key, list[Cell]], handles: dict[str, Any]) -> None:
    points = points_of(cells)
    best = frontier(points)
    lora = [point for point in points if point.name == RIVAL]
    others = [point for point in points if point.name != RIVAL]
    (handles["a method"],) = axes.plot(
        [point.parameters for point in others], [point.loss for point in others],
        color=MUTED, linestyle="none", marker="o", markersize=4, alpha=0.5,
    )  # fmt: skip
    for some, color, line, label in ((lora, INK, "-", "LoRA"), (best, SERIES[3], "--", "frontier")):
        if some:
            sizes, losses, halves, _ = zip(*some, strict=True)
            handles[label] = axes.errorbar(
                sizes, losses, yerr=halves, color=color, linestyle=line, marker="o", markersize=4,
                capsize=2, linewidth=1.4,
            )  # fmt: skip
    for i, point in enumerate(best):  # names on three levels: some points are close
        place = {"xytext": (6, -9 - 10 * (i % 3)), "textcoords": "offset points"}
        axes.annotate(point.name, point[:2], **place, fontsize=8, color=INK)
    axes.set_xscale("log", base=2)
    sizes = sorted({round(point.parameters, -3) for point in lora or points})
    axes.set_xticks(sizes, [f"{size / 1000:.0f}k" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("trained parameters", color=MUTED, fontsize=9)
    axes.set_ylabel("dev loss", color=MUTED, fontsize=9)


def _beside_lora(
    axes: Any,
    cells: dict[Key, list[Cell]],
    names: list[str],
    budgets: list[int],
    handles: dict[str, Any],
) -> None:
    axes.axvline(0.0, color=MUTED, linewidth=1.2)
    for k, (budget, color) in enumerate(zip(budgets, SERIES, strict=False)):
        rival = cells.get((RIVAL, budget), [])
        for place, name in enumerate(names):
            pairs = [*against(cells.get((name, budget), []), rival).values()]
            if pairs:
                mean, half = interval(pairs)
                handles[f"size of LoRA r={budget}"] = axes.errorbar(
                    mean, place + 0.22 * (k - (len(budgets) - 1) / 2), xerr=half or 0.0,
                    color=color, marker="o", markersize=4, capsize=2, linewidth=1.4,
                )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("dev loss against LoRA's, %", color=MUTED, fontsize=9)
