"""Sharing: the kept targets keep an adapter of their own, all others of a group point to one."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from loradrop.bank import bank_of
from loradrop.injection import Injection, injection_of, plan_of, require_unmerged
from loradrop.methods import Method
from loradrop.pairs import LoRABank, Update
from loradrop.ranks import as_on_the_first
from loradrop.remarks import tell_in_vain
from loradrop.scores import Scores
from loradrop.selection import INTERVAL, keep_frequency
from loradrop.wrapped import of_inner

_log = logging.getLogger(__name__)


@of_inner
def share(
    model: nn.Module,
    kept: str | Sequence[str] | None = None,
    *,
    share: str = "group",
    init: str = "fresh",
    after_select: str = "reinit",
    interval: int = INTERVAL,
) -> None:
    """Point all targets but `kept` to one adapter per (module type, K, N, r).

    kept           one name or several, as from `select`; None decides by the last probe with the
                   method's own options, which the configuration has, all of them
    share          "group"; "shape": per (K, N, r), of whatever module type; "interval": also per
                   `interval` neighbouring layers; or "none": the others lose their adapter
    init           where a shared adapter starts: "fresh" (A Kaiming, B zero), "mean" of its
                   members, or "top", the member with the largest score
    after_select   "reinit": kept adapters start fresh; "continue": they keep what they learnt

    The plan has the scores of the last probe then. The parameters change, so an optimiser made
    before this does not fit any more. In a distributed run every rank calls it, and all get the
    first one's values. Raises ValueError for a name that is not a target, for unknown options, for
    a bank without pairs, for merged adapters, and where `kept` is None beside other options, or
    where nothing was probed.
    """
    require_unmerged(model)
    bank, injection = bank_of(model), injection_of(model)
    if kept is None:
        if (share, init, after_select, interval) != ("group", "fresh", "reinit", INTERVAL):
            raise ValueError(
                "kept=None decides and shares by the method's own options: give share_init= and "
                "the like to LoRADrop in the configuration, or pass kept= here"
            )
        _record(injection)
        plan = plan_of(model)
        made = injection.config.method.update(bank, injection.scores)
        as_on_the_first(bank.parameters())
        if made is not None:
            injection.plan = plan.after_cut(made.record)
        return _say(model)
    if not isinstance(bank, LoRABank):
        raise ValueError(
            f"the method {injection.config.method.name!r} has no pair (A, B) for each target, so "
            "its targets cannot be pointed to shared pairs: use the method lora or lora_drop"
        )
    _record(injection)
    how: dict[str, Any] = {"share": share, "init": init, "after_select": after_select}
    kept = [kept] if isinstance(kept, str) else kept
    bank.share(kept, injection.scores, **how, interval=interval)
    as_on_the_first(bank.parameters())
    _say(model)


def _record(injection: Injection) -> None:
    """The scores of the last probe into the plan of an earlier decision, in place of its own."""
    plan, scores = injection.plan, injection.scores
    if plan is not None and scores is not None and scores.to_dict() != plan.scores:
        injection.plan = replace(plan, scores=scores.to_dict(), warmup=None)


def conclude(model: nn.Module, scores: Scores, warmup: Mapping[str, Any]) -> Update:
    """The end of a warm-up: the method decides by `scores`, and both go into the plan.

    warmup   what the plan says of it: steps, planned, settled

    Returns what that did. Raises ValueError for scores that are all zero.
    """
    method = injection_of(model).config.method
    if "sqnorm" in (method.statistics or ("sqnorm",)) and not any(scores.values()):
        raise ValueError(
            f"the warm-up of {warmup['steps']} steps left B at zero, so nothing was measured: make "
            "it longer, by lora.method.probe_steps or, of spectral, lora.method.cut_at"
        )
    injection = injection_of(model)
    injection.scores = scores
    injection.plan = None  # not what an earlier run recorded
    plan = plan_of(model)
    tell_in_vain(model)
    made = method.update(bank_of(model), scores)
    if made is None:
        made = Update(fresh=[*bank_of(model).parameters()])
    found = dict(warmup) | {"frequency": _frequency(method, scores)}
    decided = replace(plan.after_cut(made.record), scores=scores.to_dict(), warmup=found)
    injection.plan = decided
    _say(model)
    return made


def _frequency(method: Method, scores: Scores) -> dict[str, float] | None:
    if method.decide(scores) is None or len(scores.rows) < 2:
        return None
    return keep_frequency(scores, lambda drawn: method.decide(drawn) or [])


def _say(model: nn.Module) -> None:
    """What the decision saves; loudly where that is nothing."""
    plan = plan_of(model)
    if plan.parameters < plan.lora_parameters:
        part = f"{plan.parameters:,} of LoRA's {plan.lora_parameters:,} parameters"
        _log.info(
            "%d adapters for %d targets: %s", plan.assignment.adapters, len(plan.targets), part
        )
    elif plan.kept is not None:
        _log.warning(
            "nothing is saved: all %d targets keep an adapter of their own (%s parameters). Choose "
            "budget=0.5 or a lower threshold", len(plan.targets), f"{plan.parameters:,}",
        )  # fmt: skip
