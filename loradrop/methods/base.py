"""The seam: a method makes the bank, which says what A and B are, and says when that changes.

Ops, layers, files and exports never know which method there is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loradrop.bank import AdapterBank
from loradrop.options import check_choice, check_kinds, check_sizes, check_whole
from loradrop.pairs import LoRABank, Update
from loradrop.scores import Scores, Target


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """The stage before `update`.

    steps         optimiser steps, at least 1
    sample_ratio  the part of the training set, drawn by class, that it trains on
    source        "online": scores of its own passes; "offline": of a pass in eval mode at its end
    settle_every  ask `settled` every so many steps; 0 never
    measured      the part of it, at its end, whose statistics count

    The main run goes on with what it trained: with the rows that come next, in one schedule of the
    learning rate, and with what the optimiser knows of all that `update` leaves as it was.
    """

    steps: int
    sample_ratio: float = 1.0
    source: str = "online"
    settle_every: int = 0
    measured: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for a value that has no meaning."""
        check_kinds(self)
        check_whole("Warmup.steps", self.steps, 1)
        check_whole("Warmup.settle_every", self.settle_every, 0)
        check_choice("Warmup.source", self.source, ("online", "offline"))
        for name in ("sample_ratio", "measured"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"Warmup.{name}={getattr(self, name)}: choose a number in (0, 1]")

    @property
    def measured_from(self) -> int:
        """The step after which statistics count."""
        return self.steps - max(1, round(self.measured * self.steps))


@dataclass(frozen=True, kw_only=True)
class Method:
    """Which bank composes (A_i, B_i), and when it changes. Its fields are its options.

    Subclasses give a `name` and override what they need. A module in `loradrop/methods/` is found
    by itself, another package's through the entry-point group `loradrop.methods`. State that
    changes belongs to the bank: parameters and buffers there move, save and resume with the model.

    statistics   what training collects for the method, for each target:
                   "sqnorm"   Σ_t w_t ‖s·B·h_t‖², what the warm-up's `Scores` are made of
                   "moment"   Σ_t w_t x_tk², (K,) float64 for the inputs x of one optimiser step
                   "gram_in", "core"   Σ_t w_t h_t h_tᵀ and Σ_t u_t h_tᵀ, (r, r) float64, for the
                                       matrices of `Scores.grams`
                 during the warm-up where there is one, else during all of training
    """

    name: ClassVar[str] = ""
    composed_by: ClassVar[tuple[str, ...]] = ()  # see `composition`
    statistics: ClassVar[tuple[str, ...]] = ()
    keeps_parameters: ClassVar[bool] = True  # `update` makes none that was not there before
    rank_limited: ClassVar[bool] = True  # a rank beyond min(in_features, out_features) adds nothing

    def __post_init__(self) -> None:
        """Raises ValueError for an option whose value is not of the kind that its annotation names,
        and for a whole number beyond 64 bits.

        A subclass with checks of its own calls it, too.
        """
        check_kinds(self)
        check_sizes(self)

    def stage(self, total: int) -> Warmup | None:
        """`warmup`. Raises ValueError for one that leaves no step of the `total` for what follows.
        """
        found = self.warmup(total)
        if found is not None and found.steps >= total:
            raise ValueError(
                f"the warm-up of {self.name!r} takes {found.steps} steps, and the run has {total}: "
                "train more steps, or let it warm up for fewer"
            )
        return found

    @property
    def warms_up(self) -> bool:
        """Whether it has a stage before `update`."""
        return self.warmup(1 << 30) is not None

    @property
    def composition(self) -> dict[str, object]:
        """The options by which tensors become factors and scales; another's adapter has the same
        ones, or computes something else.
        """
        return {name: getattr(self, name) for name in self.composed_by}

    @property
    def acts(self) -> bool:
        """Whether training has to call it at every step."""
        names = "before_step", "on_step_end"
        return any(getattr(type(self), name) is not getattr(Method, name) for name in names)

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """The bank for these targets, in the order of the model's layers.

        Each target has the rank and the s that `LoRAConfig` gives it, and an empty tensor of the
        dtype and device of its adapter; a method may choose others. The default is LoRA's pairs.
        """
        return LoRABank(targets, scaling, likes)

    def in_vain(self, targets: Sequence[str], parameters: Mapping[str, bool]) -> str | None:
        """Why an option saves nothing in a model; None where that is not so. Said before `update`.

        parameters   name -> whether it is trained whole, in the order in which the model lists them
        """
        return None

    def check(self, targets: Sequence[Target]) -> None:
        """Raises ValueError for options that no decision over these targets can meet. Called before
        the warm-up.
        """

    def warmup(self, total: int) -> Warmup | None:
        """The stage before `update`, of `total` steps in all; None for a method of one stage."""
        return None

    def settled(self, scores: Scores) -> bool:
        """Whether the warm-up may end now."""
        return False

    def decide(self, scores: Scores) -> list[str] | None:
        """The names of the targets that keep their own adapter; None where nothing is decided."""
        return None

    def update(self, bank: AdapterBank, scores: Scores | None) -> Update | None:
        """Between the stages: change what the bank owns.

        Returns what `LoRABank.share` and `LoRABank.cut` return; None where an optimiser has to
        begin anew with all adapters. Raises ValueError for a method that decides nothing.
        """
        raise ValueError(f"the method {self.name!r} selects nothing: pass kept, or use LoRADrop()")

    def before_step(self, bank: AdapterBank, step: int, total: int) -> None:
        """Before optimiser step number `step` (from 1) of `total`, when its gradients are there:
        summed over micro-batches and ranks, clipped, without a loss scale. It may add to those of
        the bank's parameters, for a penalty, or mask them.
        """

    def on_step_end(
        self, bank: AdapterBank, step: int, statistics: Mapping[str, Sequence[Tensor | None]]
    ) -> None:
        """After optimiser step number `step` (from 1), with what that step collected.

        statistics   name -> a tensor for each target, None where its forward was not called;
                     summed over ranks, on the device of the target
        """

    def facts(self, bank: AdapterBank) -> Mapping[str, float]:
        """Numbers by name that the plan and its report say of the bank as it is now."""
        return {}
