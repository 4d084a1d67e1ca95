"""Spectral LoRA-drop: train LoRA wide, keep the directions that matter to the loss, train on.

The first stage trains LoRA with `r_start` directions for every target. At its end the Gram matrices
of both passes say what each direction is worth in units of the loss (`spectra`), one budget is
spent on the directions of all targets together, and the second stage trains what is left: plain
LoRA with a rank for each target, 0 included. What the optimiser knows is cut with the adapters.
All of it is ours; the score by which LoRA-drop (Zhou et al., COLING 2025) keeps whole layers is the
sum of this spectrum with metric="output".

Both stages train at one learning rate, and in a step of Adam, whose size is that of the rate, k
directions move the output k times as far as one. So s falls with the rank that a target has, as
LoRA's α/r does, about the rank that is left on average:

    s(k) = s · budget · r / k      for k directions

With s = α/r that is α · budget / k: LoRA of rank k with an α of α · budget. With rsLoRA's α/√r it
falls as 1/k all the same, and is what rsLoRA has at the average rank with an α of α · √budget.
The cut changes no output: where s grows by g, A and B shrink by √g.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loradrop.bank import AdapterBank
from loradrop.methods.base import Method, Warmup
from loradrop.options import check_choice, check_steps_or_part, check_whole
from loradrop.pairs import LoRABank, Narrowed, Update
from loradrop.scores import Assignment, Scores, Target, check_ranks
from loradrop.spectral.allocation import (
    SCOPES,
    allocate,
    below_one,
    check_steps,
    least_budget,
    time_in_vain,
)
from loradrop.spectral.cuts import Cut, decide
from loradrop.spectral.spectra import METRICS, Spectrum, spectrum


@dataclass(frozen=True, kw_only=True)
class Spectral(Method):
    """The options of spectral LoRA-drop.

    budget    what is left, as a part of the parameters of LoRA at the rank of `LoRAConfig`
    r_start   rank of the first stage, as far as a target has so many directions; None is twice
              the rank of `LoRAConfig`
    scale     "rank": s by the formula above, so that the learning rate is that of LoRA of the small
              size whose lora_alpha is `budget` times this one; "fixed": the s of `LoRAConfig` in
              both stages
    cut_at    when to cut: a part of all steps, or a number of steps
    source    "offline": at its end 1,024 rows of the training set are measured in eval mode, with
              labels drawn from the model, and what is left makes up for what goes; "online": its
              own passes are, at 3 % of a step
    measured  of those: the part, at the end of the first stage, that counts
    metric    what a direction is worth: "loss", "output" or "weight", of `spectrum`
    scope, multiple, budget_time   of `allocate`

    Raises ValueError naming the field, its value and the remedy.
    """

    name: ClassVar[str] = "spectral"
    composed_by: ClassVar[tuple[str, ...]] = ("budget", "scale")
    statistics: ClassVar[tuple[str, ...]] = ("sqnorm", "gram_in", "core")
    keeps_parameters: ClassVar[bool] = False

    budget: float = 0.25
    r_start: int | None = None
    scale: str = "rank"
    cut_at: float = 0.6
    source: str = "offline"
    measured: float = 0.2
    metric: str = "loss"
    scope: str = "joint"
    multiple: int = 1
    budget_time: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.budget < math.inf:
            raise ValueError(f"budget={self.budget}: choose a positive part of LoRA's parameters")
        check_whole("r_start", self.r_start, 1, or_none=True)
        check_steps_or_part("cut_at", self.cut_at)
        if not 0.0 < self.measured <= 1.0:
            raise ValueError(f"measured={self.measured}: choose a number in (0, 1]")
        for name, known in (
            ("source", ("online", "offline")), ("metric", METRICS), ("scope", SCOPES),
            ("scale", ("rank", "fixed")),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), known)
        check_steps(self.multiple, self.budget_time)

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """LoRA's pairs, `r_start` wide.

        Raises ValueError for an `r` that a target cannot have, and for a budget that leaves none.
        """
        check_ranks(targets)
        wide = [
            t._replace(r=min(self.r_start or 2 * t.r, t.in_features, t.out_features))
            for t in targets
        ]
        nominal = sum(target.parameters for target in targets)
        self._require_room(wide, nominal)
        if self.scale == "fixed":
            return SpectralBank(wide, scaling, likes, nominal)
        units = [s * self.budget * t.r for s, t in zip(scaling, targets, strict=True)]
        return SpectralBank(wide, scaling, likes, nominal, units)

    def _require_room(self, wide: Sequence[Target], nominal: int) -> None:
        """Raises ValueError for a budget, or a part of a step's time, that leaves nothing."""
        values = tuple((0.0,) * target.r for target in wide)
        blank = Spectrum(tuple(wide), tuple(range(len(wide))), values, self.metric)
        of_wide = least_budget(
            blank, scope=self.scope, multiple=self.multiple, budget_time=self.budget_time
        )
        least = of_wide * blank.full / max(nominal, 1)
        if self.budget < least * (1 - 1e-12):
            raise ValueError(below_one(self.budget, least, self.scope, self.multiple))

    def in_vain(self, targets: Sequence[str], parameters: Mapping[str, bool]) -> str | None:
        return time_in_vain(targets, parameters, self.budget_time)

    def warmup(self, total: int) -> Warmup:
        """Raises ValueError where a stage would have no step."""
        part = self.cut_at < 1
        steps = round(self.cut_at * total) if part else int(self.cut_at)
        steps = min(max(steps, 2), total - 1) if part else steps
        if not 2 <= steps < total:
            raise ValueError(
                f"cut_at={self.cut_at:g} cuts after {steps} of {total} steps: choose at least 2 "
                "(lora.method.cut_at), as B is zero at first, and fewer than all, or train longer"
            )
        return Warmup(steps=steps, source=self.source, measured=self.measured)

    def update(self, bank: AdapterBank, scores: Scores | None) -> Update:
        if scores is None:
            raise ValueError(
                "the cut needs scores: call loradrop.probe(model, batches, gram=True) after some "
                "training"
            )
        assert isinstance(bank, SpectralBank)
        found = spectrum(scores, self.metric)
        budget = min(1.0, self.budget * bank.nominal / found.full)
        ranks = allocate(
            found, budget=budget, scope=self.scope, multiple=self.multiple,
            budget_time=self.budget_time,
        )  # fmt: skip
        grams = bank.grams(scores.grams, self.metric)
        return bank.cut(decide(bank.targets, grams, ranks, self.metric))


class SpectralBank(LoRABank):
    """LoRA's pairs at the rank of the first stage.

    nominal   elements of LoRA at the rank of `LoRAConfig`, which budgets are a part of
    units     s of each target with one direction, s/k with k of them; None: s does not change
    """

    def __init__(
        self,
        targets: Sequence[Target],
        scaling: Sequence[float],
        likes: Sequence[Tensor],
        nominal: int,
        units: Sequence[float] | None = None,
    ) -> None:
        super().__init__(targets, scaling, likes)
        self.nominal, self.units = nominal, units
        self._rescale()

    def cut(self, cut: Cut) -> Update:
        """As in the base; the output is that of the base too."""
        made = super().cut(cut)
        return made if self.units is None else made._replace(narrowed=[*map(_grown, made.narrowed)])

    def _use(self, assignment: Assignment) -> None:
        super()._use(assignment)
        self._rescale()

    def _rescale(self) -> None:
        """Each s by the rank that its target has now."""
        units = getattr(self, "units", None)  # there is none yet while the base begins
        if units is not None:
            for link, target, unit in zip(self.links, self.targets, units, strict=True):
                link.scaling = unit / target.r


@torch.no_grad()
def _grown(narrowed: Narrowed) -> Narrowed:
    """The cut adapter for the s of its new rank."""
    growth = len(narrowed.before[0]) / len(narrowed.after[0])
    for factor in narrowed.after:
        factor.div_(math.sqrt(growth))
    return narrowed._replace(growth=growth)
