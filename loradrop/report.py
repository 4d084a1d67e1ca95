"""What a run came to, for people: tables for the terminal, pictures, and a page that needs nothing else."""

import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any

from loradrop.bank import Target
from loradrop.files import replacing, write_text
from loradrop.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {"own": "●", "shared": "○", "dropped": "·"}
MEANINGS = {"own": "own adapter", "shared": "shared adapter", "dropped": "no adapter"}
# The light scheme of assets/report.html. Importance is lightness, so it reads with any colour vision.
INK, MUTED, RULE, COLD, HOT, OWN = "#1f2a33", "#5f6b76", "#e1e4e3", "#edf3f2", "#0b4a6f", "#d55e00"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b5598f", "#b07d00", "#4a9bd1")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One trained variant. `history`: dicts with step, stage ("warmup" or "main") and what was logged there."""

    name: str
    parameters: int
    metrics: Mapping[str, float]
    seconds: float
    steps: int
    history: Sequence[Mapping[str, Any]]
    plan: Plan | None


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A target in the grid of layers and columns.

    score     Σ‖s·B·A·x‖², None where it was not measured;  weight: what the selection ranks by, 0 without it
    share     the weight's part of all it is ranked with, None where it is no number
    """

    target: Target
    layer: int | None
    column: str
    state: str
    score: float | None
    weight: float
    share: float | None
    frequency: float | None

    @property
    def text(self) -> str:
        if self.share is None:
            return "–" if self.score is None else str(self.score)
        return _percent(self.share)


class _Grid:
    """A plan by layer and column: a module's name without the number of its layer."""

    def __init__(self, plan: Plan) -> None:
        method, warmup = plan.config.method, plan.warmup or {}
        joint = getattr(method, "scope", "per_module") == "joint"
        power = 0.5 if getattr(method, "importance", "sqnorm") == "norm" else 1.0
        self.plan, self.whole = plan, "all targets" if joint else "its module type"
        values, frequency = (plan.scores or {}).get("values", {}), warmup.get("frequency") or {}
        weights = {t.name: _finite(values.get(t.name)) ** power for t in plan.targets}
        totals: dict[Any, float] = {}
        for t in plan.targets:
            totals[joint or t.group] = totals.get(joint or t.group, 0.0) + weights[t.name]
        self.cells: dict[tuple[int | None, str], _Cell] = {}
        for t, slot in zip(plan.targets, plan.slots, strict=True):
            score, layer, column = values.get(t.name), *_place(t.name)
            known = score is not None and math.isfinite(score)
            self.cells[layer, column] = _Cell(
                target=t,
                layer=layer,
                column=column,
                state=_state(plan, t.name, slot),
                score=score,
                weight=weights[t.name],
                share=weights[t.name] / (totals[joint or t.group] or 1.0) if known else None,
                frequency=frequency.get(t.name),
            )
        self.labels = _labels(list(dict.fromkeys(column for _, column in self.cells)))
        self.layers = sorted({c.layer for c in self}, key=lambda n: math.inf if n is None else n)
        self.top = max((cell.share or 0.0 for cell in self), default=0.0) or 1.0
        self.decided = plan.kept is not None or any(cell.state != "own" for cell in self)
        self.states = [s for s in MARKS if self.decided and any(cell.state == s for cell in self)]
        self.groups: dict[Any, list[_Cell]] = {}
        for cell in self:
            self.groups.setdefault(cell.target.group, []).append(cell)

    def __iter__(self) -> Iterator[_Cell]:
        return iter(self.cells.values())

    def name(self, cells: Sequence[_Cell]) -> str:
        """What to call a group: the labels of its columns, or its module type where they are many."""
        labels = list(dict.fromkeys(self.labels[cell.column] for cell in cells))
        return ", ".join(labels) if len(labels) <= 2 else cells[0].target.kind

    def where(self, cells: Sequence[_Cell], state: str) -> str:
        """The layers of those cells of a group that are in `state`, as in "0, 3–5"."""
        chosen, parts = [cell for cell in cells if cell.state == state], []
        for column in dict.fromkeys(cell.column for cell in chosen):
            layers = sorted(c.layer for c in chosen if c.column == column and c.layer is not None)
            alone = layers and len({cell.column for cell in cells}) == 1
            parts.append(_spans(layers) if alone else f"{self.labels[column]} {_spans(layers)}".strip())
        return "; ".join(parts)


def _place(name: str) -> tuple[int | None, str]:
    found = re.search(r"(?<![^.])\d+(?![^.])", name)
    return (int(found[0]), f"{name[: found.start()]}*{name[found.end() :]}") if found else (None, name)


def _labels(columns: Sequence[str]) -> dict[str, str]:
    """Column -> its shortest suffix that no other has; of a long one that is still clear, both ends."""
    parts = {column: ["", *column.split(".")] for column in columns}
    lengths = {c: next(n for n in range(1, len(p) + 1) if sum(q[-n:] == p[-n:] for q in parts.values()) == 1) for c, p in parts.items()}
    whole = {c: ".".join(p[-lengths[c] :]).lstrip(".").removeprefix("*.") for c, p in parts.items()}
    ends = {c: f"{p[-lengths[c]]}…{p[-1]}" if lengths[c] > 3 else whole[c] for c, p in parts.items()}
    return ends if len(set(ends.values())) == len(columns) else whole


def _spans(numbers: Sequence[int]) -> str:
    runs = [list(run) for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0][1]}–{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def _state(plan: Plan, name: str, slot: int | None) -> str:
    if slot is None:
        return "dropped"
    own = plan.slots.count(slot) == 1 if plan.kept is None else name in plan.kept
    return "own" if own else "shared"


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _percent(part: float) -> str:
    return f"{100 * part:.1f}" if 0 < part < 0.0995 else f"{100 * part:.0f}"


def _held(cells: Sequence[_Cell]) -> str:
    """The part of the importance that lies in targets with an adapter of their own."""
    total = sum(cell.weight for cell in cells)
    return f"{_percent(sum(c.weight for c in cells if c.state == 'own') / total)} %" if total else "–"


def _count(cells: Sequence[_Cell], state: str) -> int:
    return sum(cell.state == state for cell in cells)


def _subject(plan: Plan) -> str:
    return str(plan.base.get("id") or plan.base.get("class") or "the model")


def _size(plan: Plan) -> str:
    own = sum(cell.target.parameters for cell in _Grid(plan) if cell.state == "own")
    parts = f"{own:,} own + {plan.parameters - own:,} shared = {plan.parameters:,}"
    return f"{parts}, {_percent(plan.parameters / plan.full_parameters)} % of LoRA's {plan.full_parameters:,}"


def _source(plan: Plan) -> str:
    if not plan.scores:
        return "none"
    rows = "steps" if plan.scores.get("source") == "online" else "batches"
    return f"{plan.scores.get('source')}, {plan.scores.get('tokens', 0):,} tokens in {plan.scores.get('rows', 0):,} {rows}"


def _warmup(plan: Plan) -> str:
    if not plan.warmup:
        return "none"
    asked = getattr(plan.config.method, "settle_margin", None) is not None
    ending = "settled" if plan.warmup.get("settled") else "not settled" if asked else "no early stop"
    return f"{plan.warmup.get('steps')} of {plan.warmup.get('planned')} steps, {ending}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return ["   ".join(row).rstrip() for row in cells]


def plan_table(plan: Plan) -> str:
    """The plan for a terminal: a grid of layers and module types, what each group came to, and totals."""
    grid = _Grid(plan)

    def cell(layer: int | None, column: str) -> str:
        if (found := grid.cells.get((layer, column))) is None:
            return ""
        shade = " ░▒▓█"[math.ceil(4 * (found.share or 0.0) / grid.top)]
        return f"{2 * shade} {found.text:>4} {MARKS[found.state]}"

    heads = [label.replace(".", ".\n").split("\n") for label in grid.labels.values()]
    tall = max(map(len, heads))
    stacked = zip(*([""] * (tall - len(head)) + head for head in heads), strict=True)
    rows = [["layer" if i == tall - 1 else "", *line] for i, line in enumerate(stacked)]
    rows += [[_layer(n), *(cell(n, column) for column in grid.labels)] for n in grid.layers]
    groups = [["group", *MARKS.values(), "score", "held by ●"]]
    for name, cells in [*((grid.shape(c), c) for c in grid.groups.values()), ("all", list(grid))]:
        score = f"{sum(_finite(c.score) for c in cells):.4g}" if plan.scores else "–"
        groups.append([name, *(str(_count(cells, s)) for s in MARKS), score, _held(cells)])
    facts = {"adapters": _size(plan), "scores": _source(plan), "warm-up": _warmup(plan)}
    lines = [f"{_subject(plan)}: importance in % of {grid.whole}", "", *_aligned(rows), ""]
    lines += ["   ".join(f"{MARKS[s]} {MEANINGS[s]}" for s in MARKS), "", *_aligned(groups), ""]
    return "\n".join([*lines, *(f"{key:<10} {value}" for key, value in facts.items())])


def arms_table(arms: Sequence[Arm], metric: str) -> str:
    """The variants for a terminal: adapter parameters, `metric` on dev, and the time that training took."""
    rows = [["", "adapter parameters", f"dev {metric}", "time"]]
    for arm in arms:
        value = f"{arm.metrics[metric]:.4f}" if metric in arm.metrics else "–"
        rows.append([arm.name, f"{arm.parameters:,}", value, _time(arm.seconds)])
    return "\n".join(_aligned(rows))


def plot_importance(plan: Plan, path: str | os.PathLike[str]) -> None:
    """A PNG heat map: what part of its module type's importance each target has, and which adapter it uses."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    grid, columns = _Grid(plan), {}
    ramp = LinearSegmentedColormap.from_list("importance", [COLD, HOT])
    size = (max(6.4, 1.9 + 0.95 * len(grid.labels)), 1.8 + 0.32 * len(grid.layers))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots()
    styles: dict[str, dict[str, Any]] = {
        "own": {"edgecolor": OWN, "linewidth": 1.8},
        "shared": {"edgecolor": "#5f6b7666", "linewidth": 0, "hatch": "////"},
        "dropped": {"edgecolor": RULE, "linewidth": 1, "facecolor": "none"},
        "": {"linewidth": 0},
    }
    columns = {column: x for x, column in enumerate(grid.labels)}
    for cell in grid:
        x, y, v = columns[cell.column], grid.layers.index(cell.layer), (cell.share or 0.0) / grid.top
        style = {"facecolor": ramp(v)} | styles[cell.state if grid.decided else ""]
        axes.add_patch(Rectangle((x + 0.03, y + 0.06), 0.94, 0.88, **style))
        color = "white" if v > 0.5 and cell.state != "dropped" else INK
        if plan.scores:
            axes.text(x + 0.5, y + 0.5, cell.text, color=color, size=9, ha="center", va="center")
    axes.set(xlim=(0, len(columns)), ylim=(len(grid.layers), 0), ylabel="layer")
    labels = [label.replace(".", ".\n").replace("…", "…\n") for label in grid.labels.values()]
    axes.set_xticks([x + 0.5 for x in columns.values()], labels, size=9)
    axes.set_yticks([y + 0.5 for y in range(len(grid.layers))], map(_layer, grid.layers), size=9)
    axes.xaxis.tick_top()
    _bare(axes)
    if plan.scores:
        scale = ScalarMappable(Normalize(0, 100 * grid.top), ramp)
        bar = figure.colorbar(scale, ax=axes, fraction=0.04, pad=0.02, aspect=30)
        bar.set_label(f"% of {grid.whole}", color=MUTED)
        bar.ax.tick_params(length=0, colors=MUTED)
        bar.outline.set_visible(False)
