"""The seam: a method says what A and B are, and when that changes. The op and the layers never
know.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from loradrop.bank import AdapterBank
    from loradrop.selection import Scores


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to compose (A_i, B_i) from what the bank owns. Its fields are its options.

    Subclasses give a `name` and override what they need; a module in `loradrop/methods/` is found
    by itself, another package's through the entry-point group `loradrop.methods`. State that
    changes belongs to the bank: parameters and buffers there move and save with the model.
    """

    name: ClassVar[str] = ""
    statistic: ClassVar[str | None] = None  # "sqnorm": collect it during the warm-up

    def build(self, bank: "AdapterBank") -> None:
        """Shape the bank, which holds one fresh (A, B) per target. LoRA leaves it as it is."""

    def factors(self, bank: "AdapterBank", i: int) -> tuple[Tensor, Tensor]:
        """(A_i (r, K), B_i (N, r)), differentiable in what the bank owns."""
        slot = bank.slots[i]
        assert slot is not None
        return bank.pair(slot)

    def warmup_steps(self, total: int) -> int:
        """Optimiser steps of `total` that come before `update`; 0 for a method of one stage."""
        return 0

    def sample_ratio_of_warmup(self) -> float:
        """The part of the training set, drawn by class, that the warm-up trains on."""
        return 1.0

    def settle_interval(self) -> int:
        """Ask `settled` every so many steps of the warm-up; 0 never."""
        return 0

    def settled(self, scores: "Scores") -> bool:
        """Whether the warm-up may end now."""
        return False

    def measures_offline(self) -> bool:
        """Whether the deciding scores come from a pass in eval mode after the warm-up."""
        return False

    def decide(self, scores: "Scores") -> "list[str] | None":
        """The names of the targets that keep their own adapter; None where nothing is decided."""
        return None

    def update(self, bank: "AdapterBank", scores: "Scores | None") -> "list[str] | None":
        """Between the stages: change what the bank owns.

        The names of the targets that keep their own adapter.
        """
        return None

    def on_backward_end(self, bank: "AdapterBank", step: int) -> None:
        """After the last backward pass of a step, before the optimiser's.

        Gradients are complete.
        """

    def on_step_end(self, bank: "AdapterBank", step: int) -> None:
        """After the optimiser's step."""

    def penalty(self, bank: "AdapterBank") -> Tensor | None:
        """A differentiable 0-dim term that is added to the loss."""
        return None

    def state_dict(self, bank: "AdapterBank") -> dict[str, Any]:
        """Plain data (JSON) beyond the bank's tensors that a resume needs."""
        return {}

    def load_state_dict(self, bank: "AdapterBank", state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
