"""LoRA-drop (Zhou et al., COLING 2025, arXiv:2402.07721): keep LoRA where its output matters,
share one elsewhere.

    ΔW_i = s · B_i · A_i      for the fewest i of a group with Σ_i g_i ≥ threshold · Σ_j g_j
    ΔW_i = s · B · A          for all others of the group
    g_i  = Σ_t ‖s · B_i · A_i · x_t‖²      over the tokens t of the warm-up

The warm-up trains LoRA on every target, the squared norm of each target's output ranks them, those
that make up `threshold` of it keep an adapter of their own, and all others of a group share one.
From the paper: the squared norm, the threshold on the normalised sum, the one shared LoRA, the
stratified sample. Ours, because the paper's text leaves them open or we could not read it there:
the scope, the length of the warm-up, what follows it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loradrop.bank import AdapterBank
from loradrop.methods.base import Method, Warmup
from loradrop.options import (
    at_least,
    check_choice,
    check_part,
    check_steps_or_part,
    check_whole,
)
from loradrop.pairs import AFTER, SHARE_INITS, LoRABank, Update
from loradrop.scores import Scores, Target
from loradrop.selection import (
    CHOICES,
    INTERVAL,
    assign,
    check_keep,
    keep_frequency,
    reselect,
    select,
)

_log = logging.getLogger(__name__)
HALF = 0.5  # of LoRA's parameters, where no rule is given
_CHOICES = CHOICES | {
    "share_init": SHARE_INITS, "after_select": AFTER, "source": ("online", "offline"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoRADrop(Method):
    """The options of LoRA-drop; those of `select` and `share` mean the same as there.

    threshold, keep, keep_ratio, budget    at most one; none is budget=0.5, half of LoRA's
                     parameters; threshold is the paper's rule, with 0.9 as an example. A budget
                     below what sharing everything takes is refused before the warm-up; half is
                     raised to it, with a warning, in a model of few layers
    scope, importance                      of `select`
    selection, selection_seed              of `reselect`, for ablations: "importance" is the method
    share, interval, share_init, after_select   of `share`; with share="none" as many targets are
                     kept as with "group"
    probe_steps      length of the warm-up: optimiser steps, or below 1 a part of all steps, at
                     least 3
    sample_ratio     the part of the training set, drawn by class, that the warm-up trains on
    source           "online": norms of the warm-up's own passes, at 2 % of a step; "offline": a
                     pass in eval mode over that sample when the warm-up ends
    settle_margin    None, or end the warm-up early once a bootstrap over its steps keeps every
                     target in at most this part of the draws, or in all but it; checked every
                     `settle_every` steps

    Raises ValueError naming the field, its value and the remedy.
    """

    name: ClassVar[str] = "lora_drop"
    statistics: ClassVar[tuple[str, ...]] = ("sqnorm",)

    threshold: float | None = None
    keep: int | None = None
    keep_ratio: float | None = None
    budget: float | None = None
    scope: str = "per_module"
    importance: str = "sqnorm"
    selection: str = "importance"
    selection_seed: int = 0
    share: str = "group"
    interval: int = INTERVAL
    share_init: str = "fresh"
    after_select: str = "reinit"
    probe_steps: float = 0.1
    sample_ratio: float = 1.0
    source: str = "online"
    settle_margin: float | None = None
    settle_every: int = 10

    def __post_init__(self) -> None:
        check_whole("keep", self.keep, 0, or_none=True)
        check_whole("interval", self.interval, 1)
        super().__post_init__()
        names = ("threshold", "keep", "keep_ratio", "budget")
        given = [name for name in names if getattr(self, name) is not None]
        if not given:
            object.__setattr__(self, "budget", HALF)
        elif len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}, not both")
        for name in ("threshold", "keep_ratio", "budget"):
            check_part(name, getattr(self, name))
        for name, known in _CHOICES.items():
            check_choice(name, getattr(self, name), known)
        check_steps_or_part("probe_steps", self.probe_steps)
        if not 0.0 < self.sample_ratio <= 1.0:
            raise ValueError(f"sample_ratio={self.sample_ratio}: choose a number in (0, 1]")
        margin = self.settle_margin
        if margin is not None and not 0.0 <= margin < 0.5:
            raise ValueError(f"settle_margin={margin}: choose a number in [0, 0.5), or None")
        check_whole("settle_every", self.settle_every, 1)

    def check(self, targets: Sequence[Target]) -> None:
        """Raises ValueError for a `keep` or a budget that these targets cannot have."""
        if self.keep is not None:
            check_keep(self.keep, len(targets))
        if self.budget not in (None, HALF) and self.budget < self._least(targets):
            raise ValueError(
                f"{self._out_of_reach(targets)}. Choose at least that as the budget "
                "(lora.method.budget), adapt more layers, or share among more of them "
                f"(share={self.share!r})"
            )

    def warmup(self, total: int) -> Warmup:
        """Raises ValueError where it could not measure or would leave no step for the main run."""
        part = self.probe_steps < 1
        steps = round(self.probe_steps * total) if part else int(self.probe_steps)
        least = 2 if self.source == "online" else 1  # B is zero until the first step has ended
        if part:
            steps = max(3, steps) if total > 3 else total - 1
        if steps < least:
            raise ValueError(
                f"a warm-up of {steps} steps (probe_steps={self.probe_steps:g}, {total} steps in "
                f"all) measures nothing, since B is zero at its start: choose probe_steps "
                f"(lora.method.probe_steps) of at least {least}, and more than {least} steps in "
                "all (train.steps or train.epochs)"
            )
        if steps >= total:
            raise ValueError(
                f"probe_steps={self.probe_steps:g} leaves none of the {total} steps to train the "
                "shared adapters: choose fewer (lora.method.probe_steps), or train longer"
            )
        settle_every = 0 if self.settle_margin is None else self.settle_every
        return Warmup(
            steps=steps, sample_ratio=self.sample_ratio,
            source=self.source, settle_every=settle_every,
        )  # fmt: skip

    def settled(self, scores: Scores) -> bool:
        if self.settle_margin is None or not scores.rows.any():
            return False
        low, high = self.settle_margin, 1.0 - self.settle_margin
        return all(f <= low or f >= high for f in keep_frequency(scores, self.decide).values())

    def decide(self, scores: Scores) -> list[str]:
        keep, budget = self.keep, self.budget
        if budget is not None and budget < self._least(scores.targets):
            keep, budget = 0, None
        kept = select(
            scores, self.threshold, keep=keep, keep_ratio=self.keep_ratio, budget=budget,
            scope=self.scope, importance=self.importance, share=self.share, interval=self.interval,
        )  # fmt: skip
        if self.selection == "importance":
            return kept
        return reselect(scores, kept, self.selection, self.selection_seed)

    def update(self, bank: AdapterBank, scores: Scores | None) -> Update:
        if scores is None:
            raise ValueError(
                "sharing needs scores: call loradrop.probe(model, batches) after some training, "
                "or pass kept"
            )
        assert isinstance(bank, LoRABank)
        self.check(scores.targets)
        kept = self.decide(scores)
        if not kept and (why := self._why_none(scores)) is not None:
            _log.warning("%s, so no target keeps its own: raise it", why)
        return bank.share(
            kept, scores, share=self.share, init=self.share_init,
            after_select=self.after_select, interval=self.interval,
        )  # fmt: skip

    def _why_none(self, scores: Scores) -> str | None:
        """What leaves no target its own adapter, unless that was asked for."""
        if self.keep_ratio:
            return f"keep_ratio={self.keep_ratio:g} of {len(scores)} targets rounds to none"
        if self.budget is None:
            return None
        least = self._least(scores.targets)
        if self.budget < least:
            return self._out_of_reach(scores.targets)
        return (
            f"budget={self.budget:g}: beside one adapter per group, {least:.3g} of LoRA's "
            "parameters, there is no room for another"
        )

    def _out_of_reach(self, targets: Sequence[Target]) -> str:
        takes = f"one adapter per group takes {at_least(self._least(targets))} of LoRA's parameters"
        return f"budget={self.budget:g} is out of reach: {takes}"

    def _least(self, targets: Sequence[Target]) -> float:
        """The part of LoRA's parameters that is left where nothing is kept."""
        full = sum(target.parameters for target in targets)
        share = "group" if self.share == "none" else self.share
        return assign(targets, [], share, self.interval).parameters / full
