"""What other thresholds and budgets would have kept: many decisions from the scores of one plan."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from loradrop.methods import LoRADrop
from loradrop.plan import Plan
from loradrop.report.look import as_percent
from loradrop.report.terminal import aligned
from loradrop.scores import Assignment, Scores
from loradrop.selection import assign

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Decision(NamedTuple):
    """What a threshold or budget would have decided.

    option, value   as in threshold, 0.9;  part: its parameters as a part of LoRA's
    """

    option: str
    value: float
    assignment: Assignment
    part: float


def sweep(
    plan: Plan, thresholds: Sequence[float] = (), budgets: Sequence[float] = ()
) -> list[Decision]:
    """A decision for each threshold and each budget, with the plan's own options otherwise.

    Those of a plan by another method than LoRA-drop are its defaults, at the ranks before any cut.
    Raises ValueError for a plan without scores, and for values out of range.
    """
    scores = scores_of(plan)
    method = plan.config.method if isinstance(plan.config.method, LoRADrop) else LoRADrop()
    nothing: dict[str, Any] = dict.fromkeys(("threshold", "keep", "keep_ratio", "budget"))
    full = sum(target.parameters for target in scores.targets)
    asked = [("threshold", t) for t in thresholds] + [("budget", b) for b in budgets]
    found = []
    for option, value in asked:
        kept = replace(method, **nothing | {option: value}).decide(scores)
        assignment = assign(scores.targets, kept, method.share, method.interval)
        found.append(Decision(option, value, assignment, assignment.parameters / full))
    return found


def scores_of(plan: Plan) -> Scores:
    """The scores by which the plan was decided: their sums, as one row.

    Raises ValueError where there are none.
    """
    if plan.scores is None:
        raise ValueError(
            f"the plan has no scores to decide by, as its method {plan.config.method.name!r} made "
            "none: run loradrop probe or train with lora.method.name=lora_drop, and sweep its plan"
        )
    ranks, values = plan.full_ranks, plan.scores["values"]
    missing = [target.name for target in plan.targets if target.name not in values]
    if missing:
        raise ValueError(f"the plan has no score of {missing[0]}: it is damaged, so probe again")
    targets = tuple(target._replace(r=ranks[target.name]) for target in plan.targets)
    row = [math.nan if values[t.name] is None else float(values[t.name]) for t in targets]
    rows = torch.tensor([row], dtype=torch.float64)
    return Scores(targets, rows, plan.scores["tokens"], plan.scores["source"])


def sweep_table(plan: Plan, thresholds: Sequence[float] = (), budgets: Sequence[float] = ()) -> str:
    """`sweep` for a terminal; some thresholds where nothing is asked for."""
    if not thresholds and not budgets:
        thresholds = THRESHOLDS
    rows = [["", "kept", "adapters", "parameters", "of LoRA's"]]
    for option, value, assignment, part in sweep(plan, thresholds, budgets):
        kept = f"{len(assignment.kept or ())} of {len(assignment.targets)}"
        size = f"{assignment.parameters:,}"
        of_lora = f"{as_percent(part)} %"
        rows.append([f"{option} {value:g}", kept, str(assignment.adapters), size, of_lora])
    return "\n".join(aligned(rows))


def parts(option: str, text: str | None) -> list[float]:
    """The numbers in "0.5,0.7"; none for None. Raises ValueError for anything else."""
    if text is None:
        return []
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text}: give numbers like 0.5,0.7,0.9") from error
