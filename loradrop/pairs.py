"""LoRA's bank: plain pairs (A, B), and how targets come to share them."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from loradrop.bank import AdapterBank, Pair, keep_width
from loradrop.scores import Assignment, Scores, Target
from loradrop.selection import assign, check_choice

INITS = ("fresh", "mean", "top")
AFTER = ("reinit", "continue")


class LoRABank(AdapterBank):
    """Plain pairs: target i uses (A[slots[i]], B[slots[i]]).

    `likes`: for each target, an empty tensor of the dtype and on the device of its adapter.
    """

    def __init__(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> None:
        super().__init__(targets, scaling)
        pairs = [fresh(target, like) for target, like in zip(targets, likes, strict=True)]
        # What a fresh adapter is like, also once every adapter was dropped; it moves with the bank.
        self.like = (likes[0] if likes else torch.empty(0)).detach().new_empty(0)
        self._fill(pairs)

    def factors(self, i: int) -> Pair | None:
        """The Parameters of target i themselves; None where it has no adapter."""
        slot = self.assignment.slots[i]
        if slot is None:
            return None
        key, lists = str(slot), self._modules  # indexing a ParameterList takes microseconds
        A, B = lists["A"]._parameters[key], lists["B"]._parameters[key]  # type: ignore[union-attr]
        assert A is not None and B is not None
        return A, B

    def assign(self, assignment: Assignment, pairs: Sequence[Pair]) -> None:
        """Point target i at pairs[assignment.slots[i]].

        Raises ValueError where a pair does not fit a target.
        """
        for target, slot in zip(assignment.targets, assignment.slots, strict=True):
            if slot is None:
                continue
            A, B = pairs[slot]
            if A.shape[1] != target.in_features or B.shape[0] != target.out_features:
                shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
                raise ValueError(f"slot {slot} holds {shapes}, which do not fit {target}")
        self.assignment = assignment
        self._fill(pairs)

    def share(
        self,
        kept: Sequence[str],
        scores: Scores | None,
        *,
        share: str,
        init: str,
        after_select: str,
    ) -> None:
        """One pair per (module type, K, N, r) for all targets but `kept`: see `sharing.share`."""
        check_choice("init", init, INITS)
        check_choice("after_select", after_select, AFTER)
        if init == "top" and scores is None:
            raise ValueError("init='top' needs scores: call loradrop.probe(model, batches) first")
        assignment = assign(self.targets, kept, share)
        members: dict[int, list[int]] = {}
        for i, slot in enumerate(assignment.slots):
            if slot is not None:
                members.setdefault(slot, []).append(i)
        own, pairs = set(kept), []
        for slot in range(len(members)):
            first = self.targets[members[slot][0]]
            start = after_select if first.name in own else init
            pairs.append(self._start(members[slot], start, scores))
        held = [self.factors(members[slot][0]) for slot in range(len(members))]
        self.assign(assignment, _in_place(pairs, held))

    @torch.no_grad()
    def _start(self, members: list[int], start: str, scores: Scores | None) -> Pair:
        """(A (r, K), B (N, r)) of the adapter that `members` will use."""
        pairs = [pair for i in members if (pair := self.factors(i)) is not None]
        if start in ("reinit", "fresh") or not pairs:
            return fresh(self.targets[members[0]], self.like)
        chosen = pairs
        if start == "continue":
            chosen = pairs[:1]
        elif start == "top":
            assert scores is not None
            values = scores.values_by_target
            best = self.factors(max(members, key=lambda i: values[i]))
            chosen = pairs[:1] if best is None else [best]
        # The mean is also the copy: what continues from one adapter never shares its storage.
        A, B = (torch.stack(factors).mean(0) for factors in zip(*chosen, strict=True))
        return A, B

    @property
    def device(self) -> torch.device:
        return self.like.device

    def _fill(self, pairs: Sequence[Pair]) -> None:
        self.A = nn.ParameterList(_parameter(A) for A, _ in pairs)
        self.B = nn.ParameterList(_parameter(B) for _, B in pairs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRABank":
        super()._apply(fn, recurse)
        self.like = keep_width(fn, self.like)
        return self


@torch.no_grad()
def fresh(target: Target, like: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """LoRA's initial pair: A Kaiming-uniform, B zero, so that the model is unchanged."""
    A = like.new_empty(target.r, target.in_features)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return nn.Parameter(A), nn.Parameter(like.new_zeros(target.out_features, target.r))


@torch.no_grad()
def _in_place(pairs: Sequence[Pair], held: Sequence[Pair | None]) -> list[Pair]:
    """The values of `pairs` in the Parameters that are `held`, each used once.

    An optimiser, or the DDP that knows these Parameters, goes on with them.
    """
    found, used = [], set[int]()
    for pair, own in zip(pairs, held, strict=True):
        if own is not None and id(own[0]) not in used:
            used.add(id(own[0]))
            for parameter, value in zip(own, pair, strict=True):
                parameter.copy_(value)
                parameter.grad = None
            pair = own
        found.append(pair)
    return found


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
