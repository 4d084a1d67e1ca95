"""PRILoRA (Benedek & Wolf, Findings of EACL 2024, arXiv:2401.11316): ranks that grow with depth,
and A pruned throughout training by its size and the size of its input.

    r_l = round(r_start + (r_end − r_start)·l / (L − 1))      for the layers l = 0 .. L − 1
    S_ij = |A_ij| · X̄_j       X̄ <- β·X̄ + (1 − β)·‖x_j‖₂     the norm over one step's tokens

Every `prune_every` steps and after the last one the smallest `prune_ratio` of A, by S, is set to
zero: of each row, of each target, or of all targets together. Entries may regrow until the next
time, or not at all; the bank's state says which ones were pruned. From the paper: the linear
growth, the pruning of A alone, throughout training, by |A| and a moving average of the input. Ours,
because we could not read them there: the formula of S, its norm and β, the cadence and the last
pruning, the ratio and its scope, the ends of the ranks, one s for all layers.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loradrop.bank import AdapterBank, Pair
from loradrop.methods.base import Method
from loradrop.options import check_choice, check_whole
from loradrop.pairs import LoRABank
from loradrop.scores import Assignment, Target, check_ranks, layers_of, members_of

PRUNE_SCOPES = ("row", "target", "all")
_TOO_WIDE = "Choose r_start and r_end <= {most}, or leave it out with exclude_modules"


@dataclass(frozen=True, kw_only=True)
class PRILoRA(Method):
    """The options of PRILoRA.

    r_start, r_end   rank of the first and the last layer; None is half and one and a half of the
                     `r` of `LoRAConfig`, at least 1, so that the mean of all layers is `r` but for
                     rounding; with both None a model of one layer keeps `r`
    prune_every      steps between two prunings of A; the last step that is planned prunes too, so
                     what is trained to its end is pruned. A run that ends early, or whose loop
                     does not call `before_step`, is as the last multiple of it left it
    prune_ratio      the part of A that a pruning sets to zero, rounded down
    prune_scope      of what: "row", each row of A; "target", each A; "all", all of them together
    regrow           whether pruned entries may grow until the next pruning; False keeps them zero
    beta             β of the moving average of the input's norm

    Targets without a layer number keep the rank of `LoRAConfig`. With both r_start and r_end, those
    of a layer take nothing from its `rank_pattern`, so one that names them is refused. Raises
    ValueError naming the field, its value and the remedy.
    """

    name: ClassVar[str] = "prilora"
    statistics: ClassVar[tuple[str, ...]] = ("moment",)

    r_start: int | None = None
    r_end: int | None = None
    prune_every: int = 40
    prune_ratio: float = 0.5
    prune_scope: str = "row"
    regrow: bool = True
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rank in (("r_start", self.r_start), ("r_end", self.r_end)):
            check_whole(name, rank, 1, or_none=True)
        check_whole("prune_every", self.prune_every, 1)
        for name, part in (("prune_ratio", self.prune_ratio), ("beta", self.beta)):
            if not 0.0 <= part < 1.0:
                raise ValueError(f"{name}={part!r}: choose a number in [0, 1)")
        check_choice("prune_scope", self.prune_scope, PRUNE_SCOPES)

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        """A `PRILoRABank` whose ranks grow with depth; s is the one that `LoRAConfig` gives."""
        return PRILoRABank(self.ranked(targets), scaling, likes)

    def ranked(self, targets: Sequence[Target]) -> list[Target]:
        """The targets with their ranks by depth, layers in the order in which they come.

        Raises ValueError for a rank that a target cannot have, and where both ends are given and
        the ranks of the configuration differ.
        """
        of_target = layers_of([target.name for target in targets])
        layers = list(dict.fromkeys(filter(None, of_target)))
        grows = len(layers) > 1 or self.r_start is not None or self.r_end is not None
        last = max(1, len(layers) - 1)
        self._check_patterns([t for t, layer in zip(targets, of_target, strict=True) if layer])
        ranked = []
        for target, layer in zip(targets, of_target, strict=True):
            if layer and grows:
                half = max(1, round(target.r / 2))
                first, end = self.r_start or half, self.r_end or 2 * target.r - half
                depth = layers.index(layer) / last
                target = target._replace(r=int(first + (end - first) * depth + 0.5))
                check_ranks([target], _TOO_WIDE)
            ranked.append(target)
        return ranked

    def _check_patterns(self, layered: Sequence[Target]) -> None:
        """Raises ValueError where both ends are given and a pattern gave these targets ranks."""
        if self.r_start is None or self.r_end is None or len({target.r for target in layered}) < 2:
            return
        first = layered[0]
        other = next(target for target in layered if target.r != first.r)
        raise ValueError(
            f"rank_pattern gives {first.name} the rank {first.r} and {other.name} the rank "
            f"{other.r}, and r_start={self.r_start} with r_end={self.r_end} gives all layers "
            "theirs: leave it out for them and set alpha_pattern for another s, or leave out "
            "r_start or r_end"
        )

    def before_step(self, bank: AdapterBank, step: int, total: int) -> None:
        """Notes which step is the last; the gradients stay as they are."""
        assert isinstance(bank, PRILoRABank)
        bank.last_step = total

    @torch.no_grad()
    def on_step_end(
        self, bank: AdapterBank, step: int, statistics: Mapping[str, Sequence[Tensor | None]]
    ) -> None:
        """Takes the step's inputs into X̄ and, every `prune_every` steps and at the last one, prunes
        every A.
        """
        assert isinstance(bank, PRILoRABank)
        for i, moment in enumerate(statistics["moment"]):
            if moment is not None:
                average = bank.input_norm(i)
                average.lerp_(moment.sqrt().to(average), 1.0 - self.beta)
        if not self.regrow:
            bank.zero_pruned()  # before S, in which they are the smallest then
        if step % self.prune_every == 0 or step == bank.last_step:
            scores = [A.abs() * bank.common_norm(users) for users, A in bank.each_A()]
            chosen = smallest(scores, self.prune_ratio, self.prune_scope)
            for (users, _), mask in zip(bank.each_A(), chosen, strict=True):
                for i in users:
                    bank.pruned(i).copy_(mask)
            bank.zero_pruned()

    def facts(self, bank: AdapterBank) -> Mapping[str, float]:
        """The part of A that is zero now, and the rank of LoRA with as many parameters."""
        assert isinstance(bank, PRILoRABank)
        size = sum(t.in_features + t.out_features for t in bank.targets)
        return {"zeros of A": bank.sparsity, "equal rank": bank.trainable / size}


def smallest(scores: Sequence[Tensor], ratio: float, scope: str) -> list[Tensor]:
    """Masks of the shapes of `scores` (r, K), true for the smallest `ratio` of each row, of each
    tensor ("target"), or of all tensors together, rounded down.
    """
    if scope == "all" and scores:
        flat = torch.cat([score.flatten().to(scores[0].device) for score in scores])
        ends = list(itertools.accumulate(score.numel() for score in scores))[:-1]
        parts = _smallest(flat.unsqueeze(0), ratio).squeeze(0).tensor_split(ends)
        return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]
    if scope == "target":
        return [_smallest(score.view(1, -1), ratio).view(score.shape) for score in scores]
    return [_smallest(score, ratio) for score in scores]


def _smallest(scores: Tensor, ratio: float) -> Tensor:
    """A mask of the smallest `ratio` of each row."""
    count = int(ratio * scores.shape[1] + 1e-9)  # 0.29 · 100 is a little below 29
    found = scores.topk(count, dim=1, largest=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, found, True)


class PRILoRABank(LoRABank):
    """LoRA's pairs, and for target i the moving average X̄ (K,) of its input's norm, and a mask
    (r, K) of what the last pruning took.

    Targets that share an A have one mask, by the inputs of all of them.
    """

    last_step: int | None = None  # of the run; each step is told anew, so no state holds it

    def __init__(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> None:
        super().__init__(targets, scaling, likes)
        for i, (target, like) in enumerate(zip(targets, likes, strict=True)):
            average = torch.zeros(target.in_features, device=like.device, dtype=torch.float32)
            self.register_buffer(f"input_norm_{i}", average)
            mask = torch.zeros(target.r, target.in_features, dtype=torch.bool, device=like.device)
            self.register_buffer(f"pruned_{i}", mask)

    def input_norm(self, i: int) -> Tensor:
        """X̄ (K,) of target i, float32."""
        return self.get_buffer(f"input_norm_{i}")

    def common_norm(self, users: Sequence[int]) -> Tensor:
        """X̄ (K,) of the inputs of these targets together."""
        found = [self.input_norm(i) for i in users]
        return found[0] if len(found) == 1 else torch.stack(found).norm(dim=0)

    def pruned(self, i: int) -> Tensor:
        """(r, K) bool of target i: the entries of A that the last pruning set to zero."""
        return self.get_buffer(f"pruned_{i}")

    def each_A(self) -> Iterator[tuple[list[int], Tensor]]:  # noqa: N802 - the papers' name
        """(the targets that use it, A (r, K)) of every adapter."""
        for slot, users in members_of(self.slots).items():
            yield users, self._pair(slot).A

    def assign(self, assignment: Assignment, pairs: Sequence[Pair]) -> None:
        """As in the base; from then on what is zero in A counts as pruned."""
        super().assign(assignment, pairs)
        for users, A in self.each_A():
            for i in users:
                self.register_buffer(f"pruned_{i}", A.detach() == 0)

    def zero_pruned(self) -> None:
        """Sets to zero what the last pruning took."""
        for users, A in self.each_A():
            A.masked_fill_(self.pruned(users[0]), 0.0)

    @property
    def sparsity(self) -> float:
        """The part of the entries of all A that is zero."""
        every = [A for _, A in self.each_A()]
        size = sum(A.numel() for A in every)
        return sum(A.numel() - int(A.count_nonzero()) for A in every) / max(1, size)
