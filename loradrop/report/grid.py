"""A plan as a grid of layers and module types, and the tables for a terminal."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loradrop.plan import Plan
from loradrop.scores import Target

MARKS = {"own": "●", "shared": "○", "none": "·"}
MEANINGS = {"own": "own adapter", "shared": "shared adapter", "none": "no adapter"}
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
class Cell:
    """A target in the grid.

    weight     what selection ranks by;  fraction: its part of all that are ranked together
    frequency  how often the bootstrap kept it
    rank       what is left, 0 for no adapter;  group: of its shape, at the rank before any cut
    """

    target: Target
    layer: int | None
    column: str
    state: str
    score: float | None
    weight: float
    fraction: float | None
    frequency: float | None
    rank: int
    group: tuple[str, int, int, int]

    @property
    def percent(self) -> str:
        if self.fraction is None:
            return "–" if self.score is None else str(self.score)
        return as_percent(self.fraction)


class Grid:
    """A plan by layer and column; a column is a module's name without the number of its layer.

    Everything that a report says about a plan is read from it here, once.
    """

    def __init__(self, plan: Plan) -> None:
        method, warmup = plan.config.method, plan.warmup or {}
        frequency = warmup.get("frequency") or {}
        scores = (plan.scores or {}).get("values", {})
        if plan.cut is not None:  # what is compared then are directions
            shares = _members_at_cut(plan)  # each member has the values of the whole adapter
            scores = {name: sum(v) / shares[name] for name, v in plan.cut["values"].items()}
        self.cut = plan.cut is not None
        full = plan.full_ranks
        joint = getattr(method, "scope", "per_module") == "joint" or self.cut
        power = 0.5 if getattr(method, "importance", "sqnorm") == "root" else 1.0
        weights = {t: _finite(scores.get(t.name)) ** power for t in plan.targets}
        totals: dict[Any, float] = {}
        for target, weight in weights.items():
            totals[joint or target.group] = totals.get(joint or target.group, 0.0) + weight
        self.config, self.scored = plan.config, bool(scores)
        self.model_name = str(plan.base.get("id") or plan.base.get("class") or "the model")
        self.whole = "all targets" if joint else "its module type"
        self.cells: dict[tuple[int | None, str], Cell] = {}
        self.groups: dict[Any, list[Cell]] = {}
        for target, state in zip(plan.targets, plan.assignment.states, strict=True):
            group = target._replace(r=full[target.name]).group
            score, (layer, column) = scores.get(target.name), _place(target.name)
            known = score is not None and math.isfinite(score)
            total = totals[joint or target.group] or 1.0
            cell = self.cells[layer, column] = Cell(
                target=target, layer=layer, column=column, state=state, score=score,
                weight=weights[target], fraction=weights[target] / total if known else None,
                frequency=frequency.get(target.name), rank=0 if state == "none" else target.r,
                group=group,
            )  # fmt: skip
            self.groups.setdefault(group, []).append(cell)
        self.labels = _labels(list(dict.fromkeys(cell.column for cell in self)))
        self.layers = sorted({c.layer for c in self}, key=lambda n: math.inf if n is None else n)
        self.top = max((cell.fraction or 0.0 for cell in self), default=0.0) or 1.0
        decided = plan.kept is not None or any(cell.state != "own" for cell in self)
        self.states = [s for s in MARKS if decided and count(list(self), s)]
        # Other banks than plain pairs do not have so many elements for each target.
        self.of_pairs = plan.assignment.parameters == plan.parameters
        own = sum(cell.target.parameters for cell in self if cell.state == "own")
        self.summary = _summary(plan, own if self.of_pairs else None)

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells.values())

    def name(self, group: Sequence[Cell]) -> str:
        """The labels of the group's columns (its module type where they are many) and its shape."""
        target, labels = group[0].target, dict.fromkeys(self.labels[c.column] for c in group)
        name = target.kind if len(labels) > 2 else ", ".join(labels)
        return f"{name} {target.in_features}→{target.out_features} r{group[0].group[3]}"

    def shade(self, cell: Cell) -> float:
        """The cell's fraction over the largest one of the grid."""
        return (cell.fraction or 0.0) / self.top

    def heads(self, gap: str) -> list[str]:
        """The labels of the columns, with `gap` where they may break."""
        return [re.sub(r"[.…]", rf"\g<0>{gap}", label) for label in self.labels.values()]

    def where(self, group: Sequence[Cell], state: str) -> str:
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


def _summary(plan: Plan, own: int | None) -> dict[str, str]:
    """The parameters, the scores and the warm-up in words; `own` parameters are not shared, None
    where nobody can tell them apart.
    """
    size = f"{plan.parameters:,}"
    if own is not None:
        size = f"{own:,} own + {plan.parameters - own:,} shared = {size}"
    part = as_percent(plan.parameters / plan.lora_parameters)
    found = {"parameters": f"{size}, {part} % of LoRA's {plan.lora_parameters:,}"}
    whole = plan.parameters >= plan.full_parameters
    if plan.kept is not None and plan.cut is None and whole:
        found["nothing is saved"] = (
            f"all {len(plan.targets)} targets keep their own adapter; to keep fewer, give the "
            "method a smaller budget, keep_ratio or threshold"
        )
    found |= {name: f"{value:.4g}" for name, value in plan.facts.items()}
    if scores := plan.scores:
        rows = f"{scores['rows']:,} {'steps' if scores['source'] == 'online' else 'batches'}"
        found["scores"] = f"{scores['source']}, {scores['tokens']:,} tokens in {rows}"
    if cut := plan.cut:
        shares = _members_at_cut(plan)
        left = sum(rank / shares[name] for name, rank in cut["ranks"].items())
        held = sum(len(values) / shares[name] for name, values in cut["values"].items())
        last = "the last of several, " * bool(cut.get("earlier"))
        found["cut"] = f"{last}by {cut['metric']}; {left:.0f} of {held:.0f} directions"
        if cut["loss"] is not None:
            found["cut"] += f", predicted rise of the loss {cut['loss']:.2g}"
            if cut["compensated"] is not None:
                found["cut"] += f", {cut['compensated']:.2g} as made up for"
    if warmup := plan.warmup:
        asked = getattr(plan.config.method, "settle_margin", None) is not None
        end = "settled" if warmup["settled"] else "not settled" if asked else "no early end"
        found["warm-up"] = f"{warmup['steps']:,} of {warmup['planned']:,} steps, {end}"
    return found


def _members_at_cut(plan: Plan) -> dict[str, int]:
    """Name -> how many targets had its adapter when it was cut."""
    slots = (plan.cut or {}).get("slots", plan.slots)  # plans of before do not say who shared
    users = Counter(slots)
    pairs = zip(plan.targets, slots, strict=True)
    return {target.name: 1 if slot is None else users[slot] for target, slot in pairs}


def count(cells: Sequence[Cell], state: str) -> int:
    """How many of the cells are in `state`."""
    return sum(cell.state == state for cell in cells)


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def as_percent(part: float) -> str:
    return f"{100 * part:.1f}" if 0 < part < 0.0995 else f"{100 * part:.0f}"


def layer_name(layer: int | None) -> str:
    return "–" if layer is None else str(layer)


def duration(seconds: float) -> str:
    (minutes, rest), hours = divmod(round(seconds), 60), round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines of a table, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return ["   ".join(row).rstrip() for row in cells]


def plan_table(plan: Plan) -> str:
    """The plan for a terminal: a grid of layers and module types, its groups, and totals."""
    grid = Grid(plan)

    def text(layer: int | None, column: str) -> str:
        if (cell := grid.cells.get((layer, column))) is None:
            return ""
        shade = " ░▒▓█"[math.ceil(4 * grid.shade(cell))]
        mark = f"r{cell.rank:<2}" if grid.cut else MARKS[cell.state]
        return f"{2 * shade} {cell.percent:>4} {mark}"

    heads = [head.split("\n") for head in grid.heads("\n")]
    tall = max(map(len, heads))
    stacked = zip(*([""] * (tall - len(head)) + head for head in heads), strict=True)
    rows = [["layer" if i == tall - 1 else "", *line] for i, line in enumerate(stacked)]
    rows += [[layer_name(n), *(text(n, column) for column in grid.labels)] for n in grid.layers]
    groups = [["group", *MARKS.values(), "score", "held by ●"]]
    for cells in [*grid.groups.values(), list(grid)]:
        name = "all" if len(groups) > len(grid.groups) else grid.name(cells)
        score, total = sum(_finite(cell.score) for cell in cells), sum(c.weight for c in cells)
        held = as_percent(sum(c.weight for c in cells if c.state == "own") / (total or 1.0))
        scored = [f"{score:.4g}", f"{held} %"] if grid.scored else ["–", "–"]
        groups.append([name, *(str(count(cells, state)) for state in MARKS), *scored])
    topic = f"importance in % of {grid.whole}" if grid.scored else "importance not measured"
    topic += ", and the rank that is left" if grid.cut else ""
    lines = [f"{grid.model_name}: {topic}", "", *aligned(rows), ""]
    lines += ["   ".join(f"{MARKS[s]} {MEANINGS[s]}" for s in MARKS), "", *aligned(groups), ""]
    return "\n".join([*lines, *(f"{key:<11} {value}" for key, value in grid.summary.items())])


def arms_table(arms: Sequence[Arm], metric: str) -> str:
    """The arms for a terminal: adapter parameters, `metric` on dev, time."""
    rows = [["", "adapter parameters", f"dev {metric}", "time"]]
    for arm in arms:
        value = f"{arm.metrics[metric]:.4f}" if metric in arm.metrics else "–"
        rows.append([arm.name, f"{arm.parameters:,}", value, duration(arm.seconds)])
    return "\n".join(aligned(rows))
