"""What a run came to, for people: tables for a terminal, pictures, and one self-contained page."""

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
# The light scheme of assets/report.html. Importance is lightness: it reads with any colour vision.
INK, MUTED, RULE, OWN = "#1f2a33", "#5f6b76", "#e1e4e3", "#d55e00"
RAMP, ON_HOT = ("#eaf2ee", "#6fb4bd", "#0a4a70"), 0.65  # light figures from that part on
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b5598f", "#b07d00", "#4a9bd1")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One trained variant. `history`: dicts with step, stage and what was logged at that step."""

    name: str
    parameters: int
    metrics: Mapping[str, float]
    seconds: float
    steps: int
    history: Sequence[Mapping[str, Any]]
    plan: Plan | None


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A target in the grid. `weight` is what selection ranks by, `share` its part of all ranked."""

    target: Target
    layer: int | None
    column: str
    state: str
    score: float | None
    weight: float
    share: float | None
    frequency: float | None

    @property
    def percent(self) -> str:
        if self.share is None:
            return "–" if self.score is None else str(self.score)
        return _percent(self.share)


class _Grid:
    """A plan by layer and column; a column is a module's name without the number of its layer."""

    def __init__(self, plan: Plan) -> None:
        method, frequency = plan.config.method, (plan.warmup or {}).get("frequency") or {}
        scores = (plan.scores or {}).get("values", {})
        joint = getattr(method, "scope", "per_module") == "joint"
        power = 0.5 if getattr(method, "importance", "sqnorm") == "norm" else 1.0
        weights = {t: _finite(scores.get(t.name)) ** power for t in plan.targets}
        totals: dict[Any, float] = {}
        for target, weight in weights.items():
            totals[joint or target.group] = totals.get(joint or target.group, 0.0) + weight
        self.plan, self.scored = plan, bool(scores)
        self.whole = "all targets" if joint else "its module type"
        self.cells: dict[tuple[int | None, str], _Cell] = {}
        self.groups: dict[Any, list[_Cell]] = {}
        for target, slot in zip(plan.targets, plan.slots, strict=True):
            score, (layer, column) = scores.get(target.name), _place(target.name)
            known = score is not None and math.isfinite(score)
            cell = self.cells[layer, column] = _Cell(
                target=target,
                layer=layer,
                column=column,
                state=_state(plan, target, slot),
                score=score,
                weight=weights[target],
                share=weights[target] / (totals[joint or target.group] or 1.0) if known else None,
                frequency=frequency.get(target.name),
            )
            self.groups.setdefault(target.group, []).append(cell)
        self.labels = _labels(list(dict.fromkeys(cell.column for cell in self)))
        self.layers = sorted({c.layer for c in self}, key=lambda n: math.inf if n is None else n)
        self.top = max((cell.share or 0.0 for cell in self), default=0.0) or 1.0
        decided = plan.kept is not None or any(cell.state != "own" for cell in self)
        self.states = [s for s in MARKS if decided and _count(list(self), s)]

    def __iter__(self) -> Iterator[_Cell]:
        return iter(self.cells.values())

    def name(self, group: Sequence[_Cell]) -> str:
        """The labels of the group's columns (its module type where they are many) and its shape."""
        target, labels = group[0].target, dict.fromkeys(self.labels[c.column] for c in group)
        name = target.kind if len(labels) > 2 else ", ".join(labels)
        return f"{name} {target.in_features}→{target.out_features} r{target.r}"

    def heads(self, gap: str) -> list[str]:
        """The labels of the columns, with `gap` where they may break."""
        return [re.sub(r"[.…]", rf"\g<0>{gap}", label) for label in self.labels.values()]

    def where(self, group: Sequence[_Cell], state: str) -> str:
        """The group's layers in `state`, as in "0, 3–5", by column where there are several."""
        columns, parts = dict.fromkeys(c.column for c in group), []
        for column in columns:
            found = [c for c in group if (c.state, c.column) == (state, column)]
            layers = _spans(sorted(c.layer for c in found if c.layer is not None))
            clear = layers and len(columns) == 1
            parts += [layers if clear else f"{self.labels[column]} {layers}".strip()] * bool(found)
        return "; ".join(parts)


def _place(name: str) -> tuple[int | None, str]:
    if (found := re.search(r"(?<![^.])\d+(?![^.])", name)) is None:
        return None, name
    return int(found[0]), f"{name[: found.start()]}*{name[found.end() :]}"


def _labels(columns: Sequence[str]) -> dict[str, str]:
    """Column -> its shortest suffix that no other has; only both ends of a long one."""
    parts, whole, ends = [["", *column.split(".")] for column in columns], {}, {}
    for column, own in zip(columns, parts, strict=True):
        n = next(n for n in range(1, 1 + len(own)) if [p[-n:] for p in parts].count(own[-n:]) == 1)
        whole[column] = ".".join(own[-n:]).removeprefix(".").removeprefix("*.")
        ends[column] = f"{own[-n]}…{own[-1]}" if n > 3 else whole[column]
    return ends if len(set(ends.values())) == len(ends) else whole


def _spans(numbers: Sequence[int]) -> str:
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(pairs) for _, pairs in runs)]
    return ", ".join(f"{first}–{last}" if first < last else f"{first}" for first, last in ends)


def _state(plan: Plan, target: Target, slot: int | None) -> str:
    if slot is None:
        return "dropped"
    own = plan.slots.count(slot) == 1 if plan.kept is None else target.name in plan.kept
    return "own" if own else "shared"


def _count(cells: Sequence[_Cell], state: str) -> int:
    return sum(cell.state == state for cell in cells)


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _percent(part: float) -> str:
    return f"{100 * part:.1f}" if 0 < part < 0.0995 else f"{100 * part:.0f}"


def _layer(layer: int | None) -> str:
    return "–" if layer is None else str(layer)


def _time(seconds: float) -> str:
    (minutes, rest), hours = divmod(round(seconds), 60), round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _subject(plan: Plan) -> str:
    return str(plan.base.get("id") or plan.base.get("class") or "the model")


def _summary(plan: Plan) -> dict[str, str]:
    """The parameters, the scores and the warm-up in words."""
    own = sum(cell.target.parameters for cell in _Grid(plan) if cell.state == "own")
    size = f"{own:,} own + {plan.parameters - own:,} shared = {plan.parameters:,}"
    part = _percent(plan.parameters / plan.full_parameters)
    found = {"parameters": f"{size}, {part} % of LoRA's {plan.full_parameters:,}"}
    if scores := plan.scores:
        rows = f"{scores['rows']:,} {'steps' if scores['source'] == 'online' else 'batches'}"
        found["scores"] = f"{scores['source']}, {scores['tokens']:,} tokens in {rows}"
    if warmup := plan.warmup:
        asked = getattr(plan.config.method, "settle_margin", None) is not None
        end = "settled" if warmup["settled"] else "not settled" if asked else "no early end"
        found["warm-up"] = f"{warmup['steps']:,} of {warmup['planned']:,} steps, {end}"
    return found


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return ["   ".join(row).rstrip() for row in cells]


def plan_table(plan: Plan) -> str:
    """The plan for a terminal: a grid of layers and module types, its groups, and totals."""
    grid = _Grid(plan)

    def text(layer: int | None, column: str) -> str:
        if (cell := grid.cells.get((layer, column))) is None:
            return ""
        shade = " ░▒▓█"[math.ceil(4 * (cell.share or 0.0) / grid.top)]
        return f"{2 * shade} {cell.percent:>4} {MARKS[cell.state]}"

    heads = [head.split("\n") for head in grid.heads("\n")]
    tall = max(map(len, heads))
    stacked = zip(*([""] * (tall - len(head)) + head for head in heads), strict=True)
    rows = [["layer" if i == tall - 1 else "", *line] for i, line in enumerate(stacked)]
    rows += [[_layer(n), *(text(n, column) for column in grid.labels)] for n in grid.layers]
    groups = [["group", *MARKS.values(), "score", "held by ●"]]
    for cells in [*grid.groups.values(), list(grid)]:
        name = "all" if len(groups) > len(grid.groups) else grid.name(cells)
        score, total = sum(_finite(cell.score) for cell in cells), sum(c.weight for c in cells)
        held = _percent(sum(c.weight for c in cells if c.state == "own") / (total or 1.0))
        scored = [f"{score:.4g}", f"{held} %"] if grid.scored else ["–", "–"]
        groups.append([name, *(str(_count(cells, state)) for state in MARKS), *scored])
    topic = f"importance in % of {grid.whole}" if grid.scored else "importance not measured"
    lines = [f"{_subject(plan)}: {topic}", "", *_aligned(rows), ""]
    lines += ["   ".join(f"{MARKS[s]} {MEANINGS[s]}" for s in MARKS), "", *_aligned(groups), ""]
    return "\n".join([*lines, *(f"{key:<11} {value}" for key, value in _summary(plan).items())])


def arms_table(arms: Sequence[Arm], metric: str) -> str:
    """The arms for a terminal: adapter parameters, `metric` on dev, time."""
    rows = [["", "adapter parameters", f"dev {metric}", "time"]]
    for arm in arms:
        value = f"{arm.metrics[metric]:.4f}" if metric in arm.metrics else "–"
        rows.append([arm.name, f"{arm.parameters:,}", value, _time(arm.seconds)])
    return "\n".join(_aligned(rows))


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
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=150, backend="agg")


def plot_importance(plan: Plan, path: str | os.PathLike[str]) -> None:
    """A PNG heat map: each target's part of its module type's importance, and its adapter."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Patch, Rectangle

    grid = _Grid(plan)
    heads = grid.heads("\n")
    longest = max(len(line) for head in heads for line in head.split("\n"))
    width = 1.9 + max(0.95, 0.09 * longest) * len(heads)
    figure = _figure(max(6.6, width), 2.3 + 0.32 * len(grid.layers))
    axes, ramp = figure.subplots(), LinearSegmentedColormap.from_list("importance", RAMP)
    styles: dict[str, dict[str, Any]] = {
        "own": {"edgecolor": OWN, "linewidth": 1.5},
        "shared": {"edgecolor": f"{MUTED}3c", "linewidth": 0, "hatch": "////"},
        "dropped": {"facecolor": "none", "edgecolor": "#c9cfce", "linewidth": 1},
    }
    for (layer, column), cell in grid.cells.items():
        x, y = list(grid.labels).index(column), grid.layers.index(layer)
        part = (cell.share or 0.0) / grid.top
        style = {"facecolor": ramp(part)} | (styles[cell.state] if grid.states else {})
        axes.add_patch(Rectangle((x + 0.03, y + 0.06), 0.94, 0.88, **style))
        if grid.scored:
            color = "white" if part > ON_HOT and cell.state != "dropped" else INK
            axes.text(x + 0.5, y + 0.5, cell.percent, color=color, size=9, ha="center", va="center")
    axes.set(xlim=(0, len(heads)), ylim=(len(grid.layers), 0), ylabel="layer")
    axes.set_xticks([x + 0.5 for x in range(len(heads))], heads, parse_math=False)
    axes.set_yticks([y + 0.5 for y in range(len(grid.layers))], [_layer(n) for n in grid.layers])
    axes.xaxis.tick_top()
    _bare(axes)
    if grid.scored:
        scale = ScalarMappable(Normalize(0, 100 * grid.top), ramp)
        strip = axes.inset_axes((1.03, 0, 0.15 / figure.get_figwidth(), 1))
        figure.colorbar(scale, cax=strip, format="%g").set_label(f"% of {grid.whole}")
        _bare(strip)
    if grid.states:
        swatch = {"facecolor": RAMP[0]}
        used = {MEANINGS[s]: Patch(**(swatch | styles[s])) for s in grid.states}
        _legend(figure, "lower", used)
    notes = {f"{key}: {value}": Patch(alpha=0) for key, value in _summary(plan).items()}
    _legend(figure, "upper", notes, title=_subject(plan))
    _save(figure, path)


def plot_history(arms: Sequence[Arm], path: str | os.PathLike[str]) -> None:
    """A PNG of all arms' training loss, and below it the dev metric where it was followed."""
    _save(_curves(arms), path)


def _points(arm: Arm, key: str, stage: str | None = None) -> tuple[list[int], list[float]]:
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


def _told(metric: str) -> bool:
    return not metric.endswith(("runtime", "per_second", "_time", "epoch"))


def _curves(arms: Sequence[Arm]) -> "Figure":
    from matplotlib.lines import Line2D

    keys = {k for arm in arms for e in arm.history for k in e if k.startswith("eval_") and _told(k)}
    often = [key for key in keys if any(len(_points(arm, key)[0]) > 1 for arm in arms)]
    dev = min(often, key=lambda key: (key == "eval_loss", key), default=None)
    figure, shown = _figure(8.4, 6.4 if dev else 4.2), ["loss", dev] if dev else ["loss"]
    ratios = [3, 2][: len(shown)]
    panels = figure.subplots(len(shown), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    handles, ends = dict[str, Line2D](), set[int]()
    for i, arm in enumerate(arms):
        style: dict[str, Any] = {
            "color": SERIES[i % len(SERIES)],
            "linestyle": "-" if i < len(SERIES) else "--",
        }
        handles[arm.name] = Line2D([], [], linewidth=1.8, **style)
        for stage in ("warmup", "main"):
            steps, losses = _points(arm, "loss", stage)
            if losses:
                panels[0].plot(steps, losses, alpha=0.25, linewidth=1, **style)
                panels[0].plot(steps, _smooth(losses), linewidth=1.8, **style)
            if losses and stage == "warmup":
                ends.add(((arm.plan and arm.plan.warmup) or {}).get("steps", steps[-1]))
        if dev:
            panels[1].plot(*_points(arm, dev), marker="o", markersize=4, linewidth=1.8, **style)
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
    metrics = list(dict.fromkeys(key for arm in arms for key in arm.metrics if _told(key)))
    most, rows = max((arm.parameters for arm in arms), default=0) or 1, []
    for i, arm in enumerate(arms):
        size = f"{_meter(arm.parameters / most)}{arm.parameters:,}"
        values = [f"{arm.metrics[key]:.4f}" if key in arm.metrics else "–" for key in metrics]
        name = f'<i style="--c:var(--s{i % len(SERIES)})"></i>{escape(arm.name)}'
        cells = [size, *values, f"{arm.steps:,}", _time(arm.seconds)]
        rows.append([f"<th>{name}</th>", *(f"<td>{cell}</td>" for cell in cells)])
    heads = ["", "adapter parameters", *(f"dev {key}" for key in metrics), "steps", "time"]
    return _table("results", heads, rows)


def _square(grid: _Grid, cell: _Cell, right: bool) -> str:
    """A cell of the heat map, with all that is known about its target where one points at it."""
    group, target = grid.groups[cell.target.group], cell.target
    lines = [f"{MEANINGS[cell.state]}, {target.parameters:,} parameters", grid.name(group)]
    if cell.score is not None:
        rank = 1 + sum(other.weight > cell.weight for other in group)
        lines.append(f"score {cell.score:.4g}: {cell.percent} % of {grid.whole}")
        lines.append(f"rank {rank} of {len(group)} in its group")
    if cell.frequency is not None:
        lines.append(f"kept in {_percent(cell.frequency)} % of the bootstrap's draws")
    tip = f"<b>{escape(target.name)}</b>{'<br>'.join(map(escape, lines))}"
    part = (cell.share or 0.0) / grid.top
    state = cell.state if grid.states else ""
    kind = f"cell {state}{' high' * (part > ON_HOT)}{' right' * right}"
    text = cell.percent if grid.scored else ""
    return (
        f'<td class="{kind}" style="--v:{100 * part:.1f}">{text}<span class="tip">{tip}</span></td>'
    )


def _map(grid: _Grid) -> str:
    rows = []
    for layer in grid.layers:
        rows.append([f"<th>{_layer(layer)}</th>"])
        for x, column in enumerate(grid.labels):
            cell, right = grid.cells.get((layer, column)), x > 3 and 2 * x >= len(grid.labels)
            rows[-1].append(_square(grid, cell, right) if cell else "<td></td>")
    return _table("map", ["layer", *grid.heads("\u200b")], rows)


def _groups(grid: _Grid) -> str:
    items = []
    for group in grid.groups.values():
        lines = ""
        for state, meaning in MEANINGS.items():
            if count := _count(group, state):
                where = escape(grid.where(group, state))
                lines += f"<dt>{meaning}: {count} of {len(group)}</dt><dd>{where}</dd>"
        items.append(f"<div><h3>{escape(grid.name(group))}</h3><dl>{lines}</dl></div>")
    return "\n".join(items)


def _stability(grid: _Grid) -> str:
    """Where the draws of the bootstrap agree, and the targets where they do least."""
    drawn = [(cell, cell.frequency) for cell in grid if cell.frequency is not None]
    unsure = sorted((p for p in drawn if 0 < p[1] < 1), key=lambda p: abs(p[1] - 0.5))
    if not drawn:
        return "<p>No bootstrap was made of this selection.</p>"
    rows = []
    for cell, part in unsure[:10]:
        values = [
            f"{_meter(part)}{_percent(part)} %",
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
    grids = [(arm, _Grid(arm.plan)) for arm in arms if arm.plan is not None]
    for arm, grid in [pair for pair in grids if pair[1].scored or pair[1].states] or grids[:1]:
        shown = [*grid.states, *(["scored"] if grid.scored else [])]
        values = {"name": escape(arm.name), "whole": grid.whole, "top": _percent(grid.top)}
        values |= {"shown": " ".join(shown), "summary": _facts(_summary(grid.plan))}
        values |= {"map": _map(grid), "groups": _groups(grid), "stability": _stability(grid)}
        parts.append(section.substitute(values))
    logged = any(_points(arm, "loss")[0] for arm in arms)
    curves = _svg(_curves(arms)) if logged else "No loss was logged."
    configs = {arm.name: grid.plan.config.to_dict() for arm, grid in grids}
    options = escape(json.dumps(configs, indent=2, ensure_ascii=False))
    parts.append(tail.substitute(curves=curves, facts=_facts(facts), options=options))
    write_text(path, "".join(parts))
