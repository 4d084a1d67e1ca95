"""What a report shows: the arms of a run, and a plan as a grid of layers and module types."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loradrop.plan import Plan
from loradrop.report.look import COMPOSED, MARKS, MEANINGS, as_percent
from loradrop.scores import Target, layer_of, stem_of


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
    directions what each was worth when it was cut, in falling order; empty without a cut
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
    directions: tuple[float, ...] = ()

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
        directions = plan.cut["values"] if plan.cut is not None else {}
        full = plan.full_ranks
        joint = getattr(method, "scope", "per_module") == "joint" or self.cut
        power = 0.5 if getattr(method, "importance", "sqnorm") == "root" else 1.0
        weights = {t: finite(scores.get(t.name)) ** power for t in plan.targets}
        totals: dict[Any, float] = {}
        for target, weight in weights.items():
            totals[joint or target.group] = totals.get(joint or target.group, 0.0) + weight
        self.config, self.scored = plan.config, bool(scores)
        self.model_name = str(plan.base.get("id") or plan.base.get("class") or "the model")
        self.whole = "all targets" if joint else "its module type"
        self.cells: dict[tuple[int | None, str], Cell] = {}
        self.groups: dict[Any, list[Cell]] = {}
        stem = stem_of(target.name for target in plan.targets)
        for target, state in zip(plan.targets, plan.assignment.states, strict=True):
            group = target._replace(r=full[target.name]).group
            score, (layer, column) = scores.get(target.name), _place(target.name, stem)
            known = score is not None and math.isfinite(score)
            total = totals[joint or target.group] or 1.0
            cell = self.cells[layer, column] = Cell(
                target=target, layer=layer, column=column, state=state, score=score,
                weight=weights[target], fraction=weights[target] / total if known else None,
                frequency=frequency.get(target.name), rank=0 if state == "none" else target.r,
                group=group, directions=tuple(directions.get(target.name, ())),
            )  # fmt: skip
            self.groups.setdefault(group, []).append(cell)
        self.labels = _labels(list(dict.fromkeys(cell.column for cell in self)))
        self.layers = sorted({c.layer for c in self}, key=lambda n: math.inf if n is None else n)
        self.top = max((cell.fraction or 0.0 for cell in self), default=0.0) or 1.0
        self.states = [s for s in MARKS if plan.assignment.decided and count(list(self), s)]
        # Other banks than plain pairs do not have so many elements for each target.
        self.of_pairs = plan.assignment.parameters == plan.parameters
        self.meanings = MEANINGS if self.of_pairs else MEANINGS | COMPOSED
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


def _place(name: str, stem: str) -> tuple[int | None, str]:
    if not (layer := layer_of(name, stem)):
        return None, name
    stack, dot, number = layer.rpartition(".")
    return int(number), f"{stack}{dot}*{name[len(layer) :]}"


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


def finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0
