"""LoRA's bank: plain pairs (A, B), and how targets come to share them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loradrop.bank import AdapterBank, Pair, empty, form, keep_width
from loradrop.options import check_choice
from loradrop.scores import Assignment, Grams, Scores, Target, members_of
from loradrop.selection import INTERVAL, assign
from loradrop.spectral.cuts import Cut
from loradrop.statistics.gram_sums import grams_of

SHARE_INITS = ("fresh", "mean", "top")
AFTER = ("reinit", "continue")


PROBE_AGAIN = (
    "the adapters changed since they were probed, by training or as others were loaded: probe again"
)


class Narrowed(NamedTuple):
    """An adapter that was cut: A' = down (k, r) A / √growth, and B' = B up (r, k) / √growth, where
    s grew by `growth`.
    """

    before: Pair
    after: Pair
    down: Tensor
    up: Tensor
    growth: float = 1.0


class Update(NamedTuple):
    """What a decision did to the adapters: those that were cut, parameters that begin anew, and
    what the plan says of a cut, None where there was none.
    """

    narrowed: Sequence[Narrowed] = ()
    fresh: Sequence[Tensor] = ()
    record: Mapping[str, Any] | None = None


class LoRAPair(nn.Module):
    """One adapter of LoRA: A (r, K) and B (N, r)."""

    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.A, self.B = _parameter(A), _parameter(B)

    def reset_parameters(self) -> None:
        """As `fresh` has it."""
        _begin(self.A, self.B)

    def factors(self) -> Pair:
        """The two Parameters themselves, or what pruning or a parametrisation makes of them."""
        own = self._parameters  # microseconds faster than the attributes
        A, B = own.get("A"), own.get("B")
        return (A, B) if A is not None and B is not None else self._made()

    def _made(self) -> Pair:
        for hook in self._forward_pre_hooks.values():  # torch.nn.utils.prune; nobody calls forward
            hook(self, ())
        return self.A, self.B


class NoPair:
    """In the place of an adapter, for a target without one."""

    def factors(self) -> None:
        """Nothing."""


NO_PAIR = NoPair()


class LoRABank(AdapterBank):
    """Plain pairs: target i uses pairs[slots[i]].

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
        self._use(self.assignment)

    def factors(self, i: int) -> Pair | None:
        """The Parameters of target i themselves; None where it has no adapter."""
        slot = self.slots[i]
        return None if slot is None else self._pair(slot).factors()

    @property
    def A(self) -> list[nn.Parameter]:  # noqa: N802 - the papers' name
        """A (r, K) of each adapter."""
        return [self._pair(slot).A for slot in range(len(self.pairs))]

    @property
    def B(self) -> list[nn.Parameter]:  # noqa: N802
        """B (N, r) of each adapter."""
        return [self._pair(slot).B for slot in range(len(self.pairs))]

    def _pair(self, slot: int) -> LoRAPair:
        pair = self.pairs[slot]
        assert isinstance(pair, LoRAPair)
        return pair

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
        self._fill(pairs)
        self._use(assignment)

    def share(
        self,
        kept: Sequence[str],
        scores: Scores | None,
        *,
        share: str,
        init: str,
        after_select: str,
        interval: int = INTERVAL,
    ) -> Update:
        """One pair for all targets of a group but `kept`: see `sharing.share`."""
        self.require_whole()
        check_choice("init", init, SHARE_INITS)
        check_choice("after_select", after_select, AFTER)
        if init == "top" and scores is None:
            raise ValueError("init='top' needs scores: call loradrop.probe(model, batches) first")
        assignment = assign(self.targets, kept, share, interval)
        members = members_of(assignment.slots)
        own, pairs, new = set(kept), [], []
        for slot in range(len(members)):
            first = self.targets[members[slot][0]]
            start = after_select if first.name in own else init
            pairs.append(self._start(members[slot], start, scores))
            if start != "continue":
                new.append(slot)
        held = [self.factors(members[slot][0]) for slot in range(len(members))]
        self.assign(assignment, _in_place(pairs, held))
        return Update(fresh=[p for slot in new for p in self._pair(slot).factors()])

    def in_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base; "pairs.0.A" is "A.0" there."""
        pair = re.compile(r"^pairs\.(\d+)\.([AB])$")
        return {pair.sub(r"\2.\1", key): value for key, value in tensors.items()}

    def restore(self, assignment: Assignment, tensors: Mapping[str, Tensor]) -> None:
        """As in the base, also by the names in a file."""
        short = re.compile(r"^([AB])\.(\d+)$")
        named = {short.sub(r"pairs.\2.\1", key): value for key, value in tensors.items()}
        super().restore(assignment, named)

    @torch.no_grad()
    def cut(self, cut: Cut) -> Update:
        """Every adapter as the cut says."""
        self.require_whole()
        numbers = {slot: n for n, slot in enumerate(s for s, k in cut.ranks.items() if k)}
        held = {slot: self._pair(slot).factors() for slot in numbers}
        pairs = [
            _narrowed(held[slot], *cut.maps[slot]) if slot in cut.maps else held[slot]
            for slot in numbers
        ]
        left = [0 if slot is None else cut.ranks[slot] for slot in self.slots]
        targets = tuple(t._replace(r=k or t.r) for t, k in zip(self.targets, left, strict=True))
        slots = tuple(None if slot is None else numbers.get(slot) for slot in self.slots)
        kept = tuple(t.name for t, k in zip(targets, left, strict=True) if k)
        self.assign(Assignment(targets, slots, kept), pairs)
        narrowed = [
            Narrowed(held[slot], self._pair(numbers[slot]).factors(), *maps)
            for slot, maps in cut.maps.items()
        ]
        return Update(narrowed, record=cut.record)

    def grams(self, probed: Grams | None, metric: str) -> Grams:
        """The Gram matrices of the factors as they are now, and of the passes as probed.

        Raises ValueError where the metric needs a probe, and for one of other adapters.
        """
        if probed is None:
            if metric == "weight":
                return grams_of(self)
            raise ValueError(
                f"metric={metric!r} needs what a probe measures: call loradrop.probe(model, "
                "batches, gram=True) first, or take metric='weight'"
            )
        if probed.slots != self.slots or any(
            gram is not None and len(gram) != target.r
            for target, gram in zip(self.targets, probed.inputs, strict=True)
        ):
            raise ValueError(PROBE_AGAIN)
        now = grams_of(self)
        pairs = zip((*probed.A, *probed.B), (*now.A, *now.B), strict=True)
        if not all(map(_alike, *zip(*pairs, strict=True))):
            raise ValueError(PROBE_AGAIN)
        return replace(probed, A=now.A, B=now.B)

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
        self.pairs = nn.ModuleList(LoRAPair(*pair) for pair in pairs)

    def _use(self, assignment: Assignment) -> None:
        targets = tuple(
            target if slot is None else target._replace(r=len(self._pair(slot).factors()[0]))
            for target, slot in zip(assignment.targets, assignment.slots, strict=True)
        )
        super()._use(Assignment(targets, assignment.slots, assignment.kept))
        if type(self).factors is not LoRABank.factors:
            return  # a subclass composes them itself, and each layer asks for its own
        for link, slot in zip(self.links, assignment.slots, strict=True):
            link.adapter = NO_PAIR if slot is None else self.pairs[slot]

    def _lists(self) -> tuple[str, ...]:
        return (*super()._lists(), "pairs.")

    def _take_forms(self, tensors: Mapping[str, Tensor]) -> None:
        """As in the base, for the pairs: as many as `tensors` has, in its shapes and dtypes."""
        super()._take_forms(tensors)
        count = sum(re.fullmatch(r"pairs\.\d+\.A", key) is not None for key in tensors)
        found = [[tensors[f"pairs.{k}.{side}"] for side in "AB"] for k in range(count)]
        if [[*map(form, pair)] for pair in found] != [
            [*map(form, pair.factors())] for pair in map(self._pair, range(len(self.pairs)))
        ]:
            self.require_whole()
            device, frozen = self.device, not any(p.requires_grad for p in self.parameters())
            self._fill([(empty(A, device), empty(B, device)) for A, B in found])
            if frozen:
                self.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRABank":
        super()._apply(fn, recurse)
        self.like = keep_width(fn, self.like)
        return self


@torch.no_grad()
def fresh(target: Target, like: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """LoRA's initial pair: A Kaiming-uniform, B zero, so that the model is unchanged."""
    A = like.new_empty(target.r, target.in_features)
    B = like.new_empty(target.out_features, target.r)
    _begin(A, B)
    return nn.Parameter(A), nn.Parameter(B)


def _begin(A: Tensor, B: Tensor) -> None:
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.zeros_(B)


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


def pair_tensors(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The tensors of a `LoRABank` with these pairs, by their names in its state dict."""
    return {
        f"pairs.{k}.{side}": factor.detach()
        for k, pair in enumerate(pairs)
        for side, factor in zip("AB", pair, strict=True)
    }


def _narrowed(pair: Pair, down: Tensor, up: Tensor) -> Pair:
    """(A' (k, K), B' (N, k)), made in float64, in the dtypes of A and B; frozen where these are."""
    A, B = pair
    new_A, new_B = down.to(A.device) @ A.double(), B.double() @ up.to(B.device)
    return (
        nn.Parameter(new_A.to(A.dtype), requires_grad=A.requires_grad),
        nn.Parameter(new_B.to(B.dtype), requires_grad=B.requires_grad),
    )


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two Gram matrices of a factor are of the same one, up to its rounding."""
    if one is None or other is None:
        return one is other
    return float((one - other).norm()) <= 1e-2 * float(one.norm())


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
