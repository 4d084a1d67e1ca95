"""ShareLoRA (Song et al., arXiv:2406.10785): the targets of a module type share A, or B, or both.

    ΔW_i = s · B_i · A      share="A": one A for all targets of a type, and a B for each
    ΔW_i = s · B · A_i      share="B"
    ΔW_i = s · B · A        share="AB": one pair, which is LoRA-drop that keeps no target

Shared and own factors are trained together, from LoRA's start. From the paper: the three ways, the
sharing within a module type, the start; the authors' code ships with A shared. Ours: targets of one
type share only where their shapes and ranks are equal too, so that every model has a way to share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from loradrop.bank import AdapterBank, Pair
from loradrop.methods.base import Method
from loradrop.options import check_choice
from loradrop.pairs import fresh
from loradrop.scores import Target, group_numbers

SHARES = ("A", "B", "AB")


@dataclass(frozen=True, kw_only=True)
class ShareLoRA(Method):
    """The option of ShareLoRA; the rank, alpha and dropout are fields of `LoRAConfig`.

    share   the factors that the targets of a type, a shape and a rank have in common: "A", "B" or
            "AB"

    Raises ValueError naming the field, its value and the remedy.
    """

    name: ClassVar[str] = "share_lora"
    composed_by: ClassVar[tuple[str, ...]] = ("share",)

    share: str = "A"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("share", self.share, SHARES)

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """A `ShareLoRABank`."""
        return ShareLoRABank(targets, scaling, likes, self.share)


class ShareLoRABank(AdapterBank):
    """A (r, K) and B (N, r), as many of each as there are: one for each group, or for each target.

    which_A, which_B   the number of each target's A and of its B
    """

    def __init__(
        self,
        targets: Sequence[Target],
        scaling: Sequence[float],
        likes: Sequence[Tensor],
        share: str,
    ) -> None:
        super().__init__(targets, scaling)
        groups, own = group_numbers(targets), list(range(len(targets)))
        self.which_A = groups if "A" in share else own
        self.which_B = groups if "B" in share else own
        if share == "AB":
            self._use(replace(self.assignment, slots=tuple(groups)))
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for i, (target, like) in enumerate(zip(targets, likes, strict=True)):
            if self.which_A[i] == len(self.A):
                self.A.append(fresh(target, like)[0])
            if self.which_B[i] == len(self.B):
                self.B.append(nn.Parameter(like.new_zeros(target.out_features, target.r)))

    def factors(self, i: int) -> Pair:
        """(A (r, K), B (N, r)), the Parameters themselves."""
        return self.A[self.which_A[i]], self.B[self.which_B[i]]
