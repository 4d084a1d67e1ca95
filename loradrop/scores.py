"""Plain data on the ground: what is adapted, how much it matters, and who uses which adapter."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor


class Target(NamedTuple):
    """A linear map that is adapted: module path, last part of it, K, N and rank."""

    name: str
    kind: str
    in_features: int
    out_features: int
    r: int

    @property
    def group(self) -> tuple[str, int, int, int]:
        """Targets of the same group can share an adapter."""
        return (self.kind, self.in_features, self.out_features, self.r)

    @property
    def parameters(self) -> int:
        """Elements of an adapter of its own."""
        return self.r * (self.in_features + self.out_features)


def layer_of(name: str, stem: str = "") -> str:
    """A module's path up to its first number below `stem`, the layer; "" where it has none."""
    above = len(stem) if name == stem or name.startswith(f"{stem}.") else 0
    found = re.compile(r"(^|\.)\d+(?=\.|$)").search(name, above)
    return name[: found.end()] if found else ""


def stem_of(names: Iterable[str]) -> str:
    """The path of what holds all layers where a number is in it, as "1" of 1.layers.0 and
    1.layers.1; "" where the first number is that of the layer, as in most models.

    It is what all names with a number have in common before the first number at which they differ.
    """
    names, stem = list(names), ""
    while len(layers := {layer for name in names if (layer := layer_of(name, stem))}) == 1:
        stem = layers.pop()
    return stem if layers else ""


def layers_of(names: Sequence[str]) -> list[str]:
    """The layer of each of these modules of one model; "" for one that is in none."""
    stem = stem_of(names)
    return [layer_of(name, stem) for name in names]


@dataclass(frozen=True, eq=False)
class Grams:
    """What passes say of the directions of each adapter: float64, on the CPU, one entry a target.

    With A (r, K), B (N, r), h = A x, u = Bᵀ ∂ℓ/∂y, and ℓ_b the sum of the losses of one batch:

    scaling       s;  slots   who shares, as in `Assignment`
    A, B          A Aᵀ and BᵀB (r, r); None for a target without an adapter
    inputs        Σ_t w_t h_t h_tᵀ (r, r) over all tokens
    left, right   Σ_b S_b S_bᵀ and Σ_b S_bᵀS_b (r, r) of S_b = s·Σ_t u_t h_tᵀ over the tokens of a
                  batch: the gradient of ℓ_b by a core between B and A. Of a shared adapter at its
                  first member alone. None where nothing was collected
    cores         S_b itself (n, r, r) float32, where a probe kept it; its n rows are batches, or
                  sums of a few neighbours each
    samples       how many losses all ℓ_b together sum
    """

    scaling: tuple[float, ...]
    slots: tuple[int | None, ...]
    A: tuple[Tensor | None, ...]
    B: tuple[Tensor | None, ...]
    inputs: tuple[Tensor | None, ...]
    left: tuple[Tensor | None, ...]
    right: tuple[Tensor | None, ...]
    samples: float
    cores: tuple[Tensor | None, ...] = ()


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, float]):
    """Name -> Σ over real tokens of ‖s·B·A·x‖², in float64, and where it came from.

    rows    (batches or steps, targets) float64 on the CPU: the score is the sum of its column
    source  "offline": fixed weights in eval mode; "online": the passes of training itself
    tokens  real tokens of the model's input; where that is neither text nor embeddings, samples
    grams   of the directions, where they were collected
    """

    targets: tuple[Target, ...]
    rows: Tensor
    tokens: int
    source: str
    grams: Grams | None = None

    @property
    def values_by_target(self) -> list[float]:
        """The scores in the order of `targets`."""
        return [float(v) for v in self.rows.sum(0)]

    def __getitem__(self, name: str) -> float:
        return dict(zip(self, self.values_by_target, strict=True))[name]

    def __iter__(self) -> Iterator[str]:
        return (target.name for target in self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        rows = f"{len(self.rows)} rows, {self.tokens} tokens"
        return f"Scores({len(self)} targets, {rows}, {self.source})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the plan: the sums, not the rows."""
        return {
            "source": self.source,
            "tokens": self.tokens,
            "rows": len(self.rows),
            "values": dict(zip(self, self.values_by_target, strict=True)),
        }


def require_scores(scores: Any) -> None:
    """Raises TypeError for anything else than `Scores`."""
    if not isinstance(scores, Scores):
        raise TypeError(
            f"scores is a {type(scores).__name__}: give the Scores that loradrop.probe returns, or "
            "those that a plan was decided by (loradrop.report.sweep.scores_of(plan))"
        )


def check_ranks(
    targets: Iterable[Target], remedy: str = "Choose r <= {most}, or a rank_pattern"
) -> None:
    """Raises ValueError for a rank beyond `most` = min(in_features, out_features), with a remedy
    that may name it.
    """
    for target in targets:
        most = min(target.in_features, target.out_features)
        if target.r > most:
            raise ValueError(
                f"r={target.r} for {target.name} ({target.in_features} -> {target.out_features}): "
                f"a rank beyond {most} adds nothing. {remedy.format(most=most)}"
            )


def spread(ranks: Sequence[int]) -> str:
    """From the least to the most."""
    return f"{min(ranks)}–{max(ranks)}" if len(set(ranks)) > 1 else str(ranks[0])


def group_numbers(targets: Iterable[Target]) -> list[int]:
    """The number of each target's group, which are counted as they appear."""
    numbers: dict[tuple[str, int, int, int], int] = {}
    return [numbers.setdefault(target.group, len(numbers)) for target in targets]


def members_of(slots: Sequence[int | None]) -> dict[int, list[int]]:
    """Slot -> the indices of the targets that use it."""
    members: dict[int, list[int]] = {}
    for i, slot in enumerate(slots):
        if slot is not None:
            members.setdefault(slot, []).append(i)
    return members


@dataclass(frozen=True)
class Assignment:
    """Which adapter each target uses.

    slots   an adapter's number for each target, None for no adapter; equal numbers share
    kept    the names that a decision gave an adapter of their own; None before any decision
    """

    targets: tuple[Target, ...]
    slots: tuple[int | None, ...]
    kept: tuple[str, ...] | None = None

    @cached_property
    def states(self) -> tuple[str, ...]:
        """ "own", "shared" or "none" for each target. Shared: another target uses it too."""
        users = Counter(self.slots)
        return tuple(
            "none" if slot is None else "own" if users[slot] == 1 else "shared"
            for slot in self.slots
        )

    @property
    def shares(self) -> bool:
        """Whether any target shares its adapter or has none."""
        return any(state != "own" for state in self.states)

    @property
    def decided(self) -> bool:
        """Whether a decision was made: targets share, or are known to keep their own."""
        return self.kept is not None or self.shares

    @property
    def adapters(self) -> int:
        """How many adapters there are."""
        return len({slot for slot in self.slots if slot is not None})

    @property
    def parameters(self) -> int:
        """Elements of all adapters, each once, where each is a plain pair (A, B)."""
        sizes = dict(zip(self.slots, (t.parameters for t in self.targets), strict=True))
        return sum(size for slot, size in sizes.items() if slot is not None)
