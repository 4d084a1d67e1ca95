"""AdaLoRA (Zhang et al., ICLR 2023, arXiv:2303.10512): an SVD form for each target, of which the
least important triplets are masked in training, over all targets together.

    ΔW_i = s · P_i · diag(λ_i) · Q_i              P, Q ~ N(0, 0.02²), λ = 0 at the start
    loss + γ · Σ_i (‖PᵀP − I‖² + ‖QQᵀ − I‖²)      its gradient is added before each step
    I = |w·∂w|   Ī <- β1·Ī + (1 − β1)·I   Ū <- β2·Ū + (1 − β2)·|I − Ī|   s(w) = Ī·Ū
    S_k = s(λ_k) + mean s(column k of P) + mean s(row k of Q)

Every `mask_every` steps the triplets with the largest S, b(t) of all targets together, keep their
λ; that of the others is set to zero, and may grow back until the last time.

    b(t) = b_T + (b_0 − b_T)·(1 − (t − t_i)/(T − t_i − t_f))³     b_0 up to t_i, b_T from T − t_f

From the paper: all of this. Our reading: I is of the loss with its penalty, and Ū is of an Ī that
has this step in it. Ours: t_i and t_f as parts of all steps, near those of the authors' scripts,
mask_every, r_start, and s = α/r with the `r` of `LoRAConfig`, which is the mean rank at the end;
the authors' code has α/r with the rank of the start. It also takes the norm of the penalty without
the square, as a mean over all matrices; ours is the paper's.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from loradrop.bank import AdapterBank, Pair
from loradrop.methods.base import Method
from loradrop.methods.orthogonality import add_gradient
from loradrop.options import check_whole
from loradrop.scores import Target, check_ranks

SIDES = ("P", "Lambda", "Q")


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """The options of AdaLoRA; `r` of `LoRAConfig` is the mean rank that is left.

    r_start            rank of the start; None is one and a half of `r`, rounded up, as far as a
                       target has so many directions
    t_initial, t_final the parts of all steps before the first mask, and after the last
    mask_every         steps between two masks
    gamma              γ of the orthogonality penalty, 0 for none
    beta1, beta2       of the moving averages

    Raises ValueError naming the field, its value and the remedy.
    """

    name: ClassVar[str] = "adalora"

    r_start: int | None = None
    t_initial: float = 0.15
    t_final: float = 0.5
    mask_every: int = 10
    gamma: float = 0.1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("r_start", self.r_start, 1, or_none=True)
        check_whole("mask_every", self.mask_every, 1)
        for name in ("t_initial", "t_final", "beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose a number in [0, 1)")
        if self.t_initial + self.t_final >= 1.0:
            raise ValueError(
                f"t_initial={self.t_initial} and t_final={self.t_final} leave no step in which the "
                "budget falls: choose parts whose sum is below 1"
            )
        if not 0.0 <= self.gamma < math.inf:
            raise ValueError(f"gamma={self.gamma!r}: choose a number from 0 up")

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """An `AdaLoRABank`, `r_start` wide. Raises ValueError for an `r` that a target cannot have,
        and for an `r_start` below it.
        """
        check_ranks(targets)
        for target in targets:
            if self.r_start is not None and self.r_start < target.r:
                raise ValueError(
                    f"r_start={self.r_start} is below the rank r={target.r} that {target.name} is "
                    "to have at the end: choose a larger r_start, None, or a smaller r"
                )
        wide = [
            t._replace(r=min(self.r_start or (3 * t.r + 1) // 2, t.in_features, t.out_features))
            for t in targets
        ]
        return AdaLoRABank(wide, scaling, likes, sum(target.r for target in targets))

    def ends(self, total: int) -> tuple[int, int]:
        """The step t_i up to which the budget is full, and T − t_f, from which on it is final."""
        return round(self.t_initial * total), max(1, total - round(self.t_final * total))

    def budget(self, step: int, total: int, full: int, final: int) -> int:
        """b(t): how many triplets of all targets keep their λ at this step."""
        first, last = self.ends(total)
        if step <= first or step >= last:
            return full if step < last else final
        return final + round((full - final) * (1 - (step - first) / (last - first)) ** 3)

    @torch.no_grad()
    def before_step(self, bank: AdapterBank, step: int, total: int) -> None:
        """Adds the gradient of the penalty, takes the step into Ī and Ū, and draws the mask."""
        assert isinstance(bank, AdaLoRABank)
        for i in range(len(bank.targets)):
            add_gradient(bank.P[i], self.gamma, columns=True)
            add_gradient(bank.Q[i], self.gamma)
            bank.measure(i, self.beta1, self.beta2)
        first, last = self.ends(total)
        if step == last or (first < step < last and step % self.mask_every == 0):
            bank.select(self.budget(step, total, bank.full, bank.final))
        elif step < last:
            bank.select(bank.full)

    @torch.no_grad()
    def on_step_end(
        self, bank: AdapterBank, step: int, statistics: Mapping[str, Sequence[Tensor | None]]
    ) -> None:
        """Sets λ to zero where the mask is zero."""
        assert isinstance(bank, AdaLoRABank)
        for i, values in enumerate(bank.Lambda):
            values.mul_(bank.mask(i))

    def facts(self, bank: AdapterBank) -> Mapping[str, float]:
        """How many triplets a target has left, in the mean."""
        assert isinstance(bank, AdaLoRABank)
        return {"mean rank": sum(bank.ranks) / len(bank.targets)}


class AdaLoRABank(AdapterBank):
    """Target i has P[i] (N, r), Lambda[i] (r,) and Q[i] (r, K); for each of them Ī and Ū of its
    shape, and a mask (r,) of ones and zeros.

    final   triplets of all targets at the end
    """

    def __init__(
        self,
        targets: Sequence[Target],
        scaling: Sequence[float],
        likes: Sequence[Tensor],
        final: int,
    ) -> None:
        super().__init__(targets, scaling)
        self.final = final
        pairs = list(zip(targets, likes, strict=True))
        self.P = nn.ParameterList(_normal(like, t.out_features, t.r) for t, like in pairs)
        self.Lambda = nn.ParameterList(nn.Parameter(like.new_zeros(t.r)) for t, like in pairs)
        self.Q = nn.ParameterList(_normal(like, t.r, t.in_features) for t, like in pairs)
        for i, (target, like) in enumerate(pairs):
            for side in SIDES:
                zeros = torch.zeros_like(getattr(self, side)[i], dtype=torch.float32)
                self.register_buffer(f"sensitivity_{side}_{i}", zeros.detach())
                self.register_buffer(f"uncertainty_{side}_{i}", zeros.detach().clone())
            ones = torch.ones(target.r, device=like.device, dtype=torch.float32)
            self.register_buffer(f"mask_{i}", ones)

    def factors(self, i: int) -> Pair:
        """(diag(λ)·Q (r, K), P (N, r))."""
        return self.Lambda[i].unsqueeze(1) * self.Q[i], self.P[i]

    @property
    def full(self) -> int:
        """Triplets of all targets at the start: as many as a file has that was loaded."""
        return sum(map(len, self.Lambda))

    def mask(self, i: int) -> Tensor:
        """(r,) of target i: 1 for the triplets that keep their λ, 0 for the others."""
        return self.get_buffer(f"mask_{i}")

    @property
    def ranks(self) -> list[int]:
        """How many triplets of each target have a λ other than zero."""
        return [int(values.count_nonzero()) for values in self.Lambda]

    def measure(self, i: int, beta1: float, beta2: float) -> None:
        """Ī and Ū of target i with the gradients that are there."""
        for side in SIDES:
            weight = getattr(self, side)[i]
            if weight.grad is None:
                continue
            found = (weight * weight.grad).abs().float()
            found.nan_to_num_(0.0, 0.0, 0.0)  # of a step that fp16 overflows in, and leaves out
            average = self.get_buffer(f"sensitivity_{side}_{i}").lerp_(found, 1.0 - beta1)
            doubt = self.get_buffer(f"uncertainty_{side}_{i}")
            doubt.lerp_((found - average).abs(), 1.0 - beta2)

    def importance(self, i: int) -> Tensor:
        """S (r,) of target i's triplets."""
        P, values, Q = (
            self.get_buffer(f"sensitivity_{side}_{i}") * self.get_buffer(f"uncertainty_{side}_{i}")
            for side in SIDES
        )
        return values + P.mean(0) + Q.mean(1)

    def select(self, count: int) -> None:
        """The `count` largest of all triplets get a mask of 1; ties go to the earlier target."""
        masks = [self.mask(i) for i in range(len(self.targets))]
        if count >= self.full:
            for mask in masks:
                mask.fill_(1.0)
            return
        found = torch.cat([self.importance(i).to(masks[0].device) for i in range(len(masks))])
        chosen = torch.zeros_like(found)
        chosen[found.argsort(descending=True, stable=True)[:count]] = 1.0
        ends = list(itertools.accumulate(map(len, masks)))[:-1]
        for mask, part in zip(masks, chosen.tensor_split(ends), strict=True):
            mask.copy_(part)


def _normal(like: Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(like.new_empty(shape).normal_(0.0, 0.02))
