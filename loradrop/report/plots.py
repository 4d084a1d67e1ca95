"""Pictures of a plan and of a run."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loradrop.files import replacing
from loradrop.plan import Plan
from loradrop.report import look
from loradrop.report.grid import Arm, Grid
from loradrop.report.look import INK, MUTED, RAMP, RULE, SERIES, layer_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    room = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    return Figure(figsize=(width, height), layout=room, facecolor="white")


def _bare(axes: Any) -> None:
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=MUTED, labelsize=9)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=MUTED, fontsize=9, parse_math=False)


def _legend(figure: "Figure", side: str, handles: Mapping[str, Any], title: str = "") -> None:
    """Handles and their labels in a row or, with a title, the labels as lines of text below it."""
    options: dict[str, Any] = {"loc": f"outside {side} left", "frameon": False, "fontsize": 9}
    options |= {"handlelength": 0, "handletextpad": 0} if title else {"ncols": 3}
    legend = figure.legend(list(handles.values()), list(handles), alignment="left", **options)
    for text in legend.get_texts():
        text.set(color=MUTED if title else INK, parse_math=False)
    legend.set_title(title)
    legend.get_title().set(color=INK, fontsize=12, parse_math=False)


def _save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in ("", ".png"):
        raise ValueError(f"{path}: pictures are PNG files, so name one that ends in .png")
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=150, backend="agg")


def plot_importance(plan: Plan, path: str | os.PathLike[str]) -> None:
    """A PNG heat map: each target's part of its module type's importance, and its adapter."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Patch, Rectangle

    grid = Grid(plan)
    heads = grid.heads("\n")
    longest = max(len(line) for head in heads for line in head.split("\n"))
    width = 1.9 + max(0.95, 0.09 * longest) * len(heads)
    figure = _figure(max(6.6, width), 2.3 + 0.32 * len(grid.layers))
    axes, ramp = figure.subplots(), LinearSegmentedColormap.from_list("importance", RAMP)
    styles: dict[str, dict[str, Any]] = {
        "own": {"edgecolor": look.OWN, "linewidth": 1.5},
        "shared": {"edgecolor": f"{MUTED}3c", "linewidth": 0, "hatch": "////"},
        "none": {"facecolor": "none", "edgecolor": "#c9cfce", "linewidth": 1},
    }
    for (layer, column), cell in grid.cells.items():
        x, y = list(grid.labels).index(column), grid.layers.index(layer)
        part = grid.shade(cell)
        style = {"facecolor": ramp(part)} | (styles[cell.state] if grid.states else {})
        axes.add_patch(Rectangle((x + 0.03, y + 0.06), 0.94, 0.88, **style))
        if grid.scored:
            color = "white" if part > look.ON_HOT and cell.state != "none" else INK
            text = f"{cell.percent}  r{cell.rank}" if grid.cut else cell.percent
            axes.text(x + 0.5, y + 0.5, text, color=color, size=9, ha="center", va="center")
    axes.set(xlim=(0, len(heads)), ylim=(len(grid.layers), 0), ylabel="layer")
    axes.set_xticks([x + 0.5 for x in range(len(heads))], heads, parse_math=False)
    axes.set_yticks([y + 0.5 for y in range(len(grid.layers))], [*map(layer_name, grid.layers)])
    axes.xaxis.tick_top()
    _bare(axes)
    if grid.scored:
        scale = ScalarMappable(Normalize(0, 100 * grid.top), ramp)
        strip = axes.inset_axes((1.03, 0, 0.15 / figure.get_figwidth(), 1))
        figure.colorbar(scale, cax=strip, format="%g").set_label(f"% of {grid.whole}")
        _bare(strip)
    if grid.states:
        looks = {state: {"facecolor": RAMP[0]} | styles[state] for state in grid.states}
        used = {grid.meanings[state]: Patch(**look) for state, look in looks.items()}
        _legend(figure, "lower", used)
    notes = {f"{key}: {value}": Patch(alpha=0) for key, value in grid.summary.items()}
    _legend(figure, "upper", notes, title=grid.model_name)
    _save(figure, path)


def plot_spectra(plan: Plan, path: str | os.PathLike[str]) -> None:
    """A PNG of a plan that was cut: what each direction of each target was worth, and was kept."""
    _save(spectra(plan), path)


def spectra(plan: Plan) -> "Figure":
    """What each direction of each target was worth: faint, and solid as far as it was kept."""
    from matplotlib.lines import Line2D

    cut = plan.cut
    assert cut is not None
    figure = _figure(8.4, 4.4)
    axes = figure.subplots()
    handles: dict[str, Any] = {}
    for target in plan.targets:
        color = SERIES[list({t.kind: 0 for t in plan.targets}).index(target.kind) % len(SERIES)]
        handles[target.kind] = Line2D([], [], color=color, linewidth=1.8)
        values, rank = list(cut["values"][target.name]), cut["ranks"][target.name]
        places = list(range(1, len(values) + 1))
        axes.plot(places, values, color=color, alpha=0.2, linewidth=1)
        axes.plot(places[:rank], values[:rank], color=color, marker="o", markersize=3, linewidth=1)
    if any(value > 0 for values in cut["values"].values() for value in values):
        axes.set_yscale("log")
    worth = {"loss": "predicted rise of the loss without it", "output": "Σ‖s·B·A·x‖² of it"}
    axes.set(xlabel="direction", ylabel=worth.get(cut["metric"], "‖s·B·A‖² of it"))
    axes.grid(color=RULE, linewidth=0.8)
    _bare(axes)
    _legend(figure, "upper", handles)
    return figure


def plot_history(arms: Sequence[Arm], path: str | os.PathLike[str]) -> None:
    """A PNG of all arms' training loss, and below it the dev metric where it was followed."""
    _save(curves(arms), path)


def points_of(arm: Arm, key: str, stage: str | None = None) -> tuple[list[int], list[float]]:
    """Steps and finite values of `key`, the last one logged at each step."""
    found = {e["step"]: e[key] for e in arm.history if key in e and stage in (None, e.get("stage"))}
    kept = {step: value for step, value in sorted(found.items()) if math.isfinite(value)}
    return list(kept), list(kept.values())


def _smooth(values: Sequence[float]) -> Any:
    """The running mean over about a tenth of the points, over fewer at the ends."""
    import numpy as np

    n = len(values)
    window, ones = np.ones(1 + 2 * min(math.ceil(n / 20), n // 5)), np.ones(n)
    return np.convolve(values, window, "same") / np.convolve(ones, window, "same")


def is_reported(metric: str) -> bool:
    """Whether the metric is about the model, not about the time that it took."""
    return not metric.endswith(("runtime", "per_second", "duration", "epoch"))


def curves(arms: Sequence[Arm]) -> "Figure":
    """All arms' training loss by step, and the dev metric below it where it was followed."""
    from matplotlib.lines import Line2D

    keys = {key for arm in arms for entry in arm.history for key in entry}
    keys = {key for key in keys if key.startswith("eval_") and is_reported(key)}
    often = [key for key in keys if any(len(points_of(arm, key)[0]) > 1 for arm in arms)]
    dev = min(often, key=lambda key: (key == "eval_loss", key), default=None)
    figure, shown = _figure(8.4, 6.4 if dev else 4.2), ["loss", dev] if dev else ["loss"]
    ratios = [3, 2][: len(shown)]
    panels = figure.subplots(len(shown), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    handles, ends = dict[str, Line2D](), set[int]()
    for i, arm in enumerate(arms):
        line = "-" if i < len(SERIES) else "--"
        style: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "linestyle": line}
        handles[arm.name] = Line2D([], [], linewidth=1.8, **style)
        for stage in ("warmup", "main"):
            steps, losses = points_of(arm, "loss", stage)
            if losses:
                alone = {"marker": "o", "markersize": 4} if len(losses) == 1 else {}
                panels[0].plot(steps, losses, alpha=0.25, linewidth=1, **style)
                panels[0].plot(steps, _smooth(losses), linewidth=1.8, **style, **alone)
            if losses and stage == "warmup":
                ends.add(((arm.plan and arm.plan.warmup) or {}).get("steps", steps[-1]))
        if dev:
            panels[1].plot(*points_of(arm, dev), marker="o", markersize=4, linewidth=1.8, **style)
    for panel, key in zip(panels, shown, strict=True):
        panel.set_ylabel("training loss" if key == "loss" else f"dev {key[5:]}")
        panel.grid(color=RULE, linewidth=0.8)
        for step in ends:
            panel.axvline(step, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        _bare(panel)
    for step in ends:
        place = {"transform": panels[0].get_xaxis_transform(), "ha": "center", "va": "bottom"}
        panels[0].text(step, 1.01, "warm-up ends", color=MUTED, size=8, **place)
    panels[-1].set_xlabel("step")
    if handles:
        _legend(figure, "upper", handles)
    return figure
