"""PRILoRA (Benedek & Wolf, Findings of EACL 2024, arXiv:2401.11316): ranks that grow with depth,
and A pruned throughout training by its size and the size of its input.

    r_l = round(r_start + (r_end − r_start)·l / (L − 1))      for the layers l = 0 .. L − 1
    S_ij = |A_ij| · X̄_j       X̄ <- β·X̄ + (1 − β)·‖x_j‖₂     the norm over one step's tokens

Every `prune_every` steps the smallest `prune_ratio` of each row of A, by S, is set to zero; entries
may regrow until the next time. From the paper: the linear growth, the pruning of A alone,
throughout training, by |A| and a moving average of the input. Ours, because we could not read them
there: the formula of S, its norm and β, the cadence, the ratio and its scope, the ends of the
ranks, one s for all layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loradrop.bank import AdapterBank
from loradrop.methods.base import Method
from loradrop.pairs import LoRABank
from loradrop.scores import Target, layer_of


@dataclass(frozen=True, kw_only=True)
class PRILoRA(Method):
    """The options of PRILoRA.

    r_start, r_end   rank of the first and the last layer; None is half and one and a half of the
                     `r` of `LoRAConfig`, so that the mean is `r`
    prune_every      steps between two prunings of A
    prune_ratio      the part of each row of A that a pruning sets to zero, rounded down
    beta             β of the moving average of the input's norm

    Targets without a layer number keep the rank of `LoRAConfig`. Raises ValueError naming the
    field, its value and the remedy.
    """

    name: ClassVar[str] = "prilora"
    statistics: ClassVar[tuple[str, ...]] = ("moment",)

    r_start: int | None = None
    r_end: int | None = None
    prune_every: int = 40
    prune_ratio: float = 0.5
    beta: float = 0.9

    def __post_init__(self) -> None:
        for name, rank in (("r_start", self.r_start), ("r_end", self.r_end)):
            if rank is not None and (not isinstance(rank, int) or rank < 1):
                raise ValueError(f"{name}={rank!r}: choose a whole number from 1 up, or None")
        if not isinstance(self.prune_every, int) or self.prune_every < 1:
            raise ValueError(f"prune_every={self.prune_every!r}: choose a whole number from 1 up")
        for name, part in (("prune_ratio", self.prune_ratio), ("beta", self.beta)):
            if not 0.0 <= part < 1.0:
                raise ValueError(f"{name}={part!r}: choose a number in [0, 1)")

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """A `PRILoRABank` whose ranks grow with depth; s is the one that `LoRAConfig` gives."""
        return PRILoRABank(self.ranked(targets), scaling, likes)

    def ranked(self, targets: Sequence[Target]) -> list[Target]:
        """The targets with their ranks by depth, layers in the order in which they come."""
        layers = list(dict.fromkeys(layer for t in targets if (layer := layer_of(t.name))))
        last = max(1, len(layers) - 1)
        ranked = []
        for target in targets:
            if layer := layer_of(target.name):
                first = self.r_start or max(1, round(target.r / 2))
                end = self.r_end or max(1, round(3 * target.r / 2))
                depth = layers.index(layer) / last
                target = target._replace(r=int(first + (end - first) * depth + 0.5))
            ranked.append(target)
        return ranked

    @torch.no_grad()
    def on_step_end(
        self, bank: AdapterBank, step: int, statistics: Mapping[str, Sequence[Tensor | None]]
    ) -> None:
        """Takes the step's inputs into X̄ and, every `prune_every` steps, prunes every A."""
        assert isinstance(bank, PRILoRABank)
        for i, moment in enumerate(statistics["moment"]):
            average = bank.input_norm(i)
            if moment is not None:
                average.lerp_(moment.sqrt().to(average), 1.0 - self.beta)
            pair = bank.factors(i)
            if pair is None or step % self.prune_every:
                continue
            A = pair[0]
            count = int(self.prune_ratio * A.shape[1])
            smallest = (A.abs() * average).topk(count, dim=1, largest=False).indices
            A.scatter_(1, smallest, 0.0)


class PRILoRABank(LoRABank):
    """LoRA's pairs, and for target i the moving average X̄ (K,) of its input's norm."""

    def __init__(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> None:
        super().__init__(targets, scaling, likes)
        for i, (target, like) in enumerate(zip(targets, likes, strict=True)):
            average = torch.zeros(target.in_features, device=like.device)
            self.register_buffer(f"input_norm_{i}", average)

    def input_norm(self, i: int) -> Tensor:
        """X̄ (K,) of target i, float32."""
        return self.get_buffer(f"input_norm_{i}")
