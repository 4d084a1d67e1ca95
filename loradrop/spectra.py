"""Spectral LoRA-drop: which directions of each adapter matter, and how a budget is spent on them.

One adapter: s·B·A with h = A x (r,) and u = Bᵀ ∂ℓ/∂y (r,). A core M (r, r) of rank k between its
factors gives the smaller adapter s·B·M·A. What that costs is unit·‖L (I − M) R‖² with roots of two
matrices, LᵀL and RRᵀ, of three kinds:

    metric    LᵀL          RRᵀ           the cost
    weight    BᵀB          A Aᵀ          of the weights; needs no data
    output    BᵀB          Σ w h hᵀ      of the target's outputs; LoRA-drop's score, by direction
    loss      Σ_b S Sᵀ     Σ_b SᵀS       of the loss: half the Fisher quadratic form of I − M

S = s·Σ_t u_t h_tᵀ over a batch is the gradient of its loss by M, which training passes make anyway:
BᵀdB. The Fisher matrix of M is Σ_b vec(S) vec(S)ᵀ, and L ⊗ R over the trace is the Kronecker
product next to it (Shampoo, Gupta et al., 2018; Morwani et al., 2024). Unlike K-FAC's Σ u uᵀ and
Σ h hᵀ it knows that the tokens of a sample err together.

With L R = U Σ Vᵀ the best core of every rank k is L⁺ U_k Σ_k V_kᵀ R⁺ (Eckart & Young), and the
squared singular values that it leaves out are the cost. In units of the loss they compare between
targets, so one budget serves all. Pure functions on plain data; docs/spectral.md derives them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loradrop.scores import Grams, Scores, Target, layer_of, members_of
from loradrop.selection import check_choice, check_part

METRICS = ("loss", "output", "weight")
SCOPES = ("joint", "per_module", "per_target")


class Cores(NamedTuple):
    """The best cores of all ranks of one adapter: M_k = left[:, :k] @ right[:k].

    values   (r,) what the k-th direction adds, falling; left (r, r); right (r, r)
    """

    values: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class Spectrum(Mapping[str, Sequence[float]]):
    """Name -> what each direction of the target's adapter is worth, in falling order.

    metric "loss": the predicted rise of the mean loss of a sample without it. "output": its part of
    Σ‖s·B·A·x‖², so that they sum to LoRA-drop's score. "weight": of ‖s·B·A‖². Targets that share an
    adapter have its values, which are of all its members together; a target without one has none.
    """

    targets: tuple[Target, ...]
    slots: tuple[int | None, ...]
    by_target: tuple[tuple[float, ...], ...]
    metric: str

    def __getitem__(self, name: str) -> tuple[float, ...]:
        return dict(zip(self, self.by_target, strict=True))[name]

    def __iter__(self) -> Iterator[str]:
        return (target.name for target in self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        directions = sum(len(self.by_target[i]) for i in self._first)
        return f"Spectrum({len(self)} targets, {directions} directions, {self.metric})"

    @property
    def _first(self) -> list[int]:
        """The first target of each adapter."""
        found = {slot: i for i, slot in reversed(list(enumerate(self.slots))) if slot is not None}
        return sorted(found.values())

    def cost(self, i: int) -> int:
        """Elements of one direction of target i: K + N."""
        return self.targets[i].in_features + self.targets[i].out_features

    @property
    def full(self) -> int:
        """Elements of all adapters as they are, each once."""
        return sum(len(self.by_target[i]) * self.cost(i) for i in self._first)

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Elements that are left with these ranks, each adapter once."""
        return sum(ranks[self.targets[i].name] * self.cost(i) for i in self._first)

    def kept(self, ranks: Mapping[str, int]) -> float:
        """The part of the sum of all values that these ranks keep, in [0, 1]."""
        whole = sum(sum(self.by_target[i]) for i in self._first)
        return 1.0 - self._lost(ranks) / whole if whole > 0 else 1.0

    def loss(self, ranks: Mapping[str, int]) -> float:
        """The predicted rise of the mean loss. Raises ValueError for another metric."""
        if self.metric != "loss":
            raise ValueError(f"metric={self.metric!r} does not predict a loss: take metric='loss'")
        return self._lost(ranks)

    def _lost(self, ranks: Mapping[str, int]) -> float:
        return sum(sum(self.by_target[i][ranks[self.targets[i].name] :]) for i in self._first)


def spectrum(scores: Scores, metric: str = "loss") -> Spectrum:
    """What each direction of each adapter is worth: see `Spectrum`.

    scores   of `probe(model, batches, gram=True)`, or of a training run that collected them

    Raises ValueError for an unknown metric, for scores without what it needs, and for NaN.
    """
    if scores.grams is None:
        raise ValueError(
            "the scores say nothing of directions: probe with loradrop.probe(model, batches, "
            "gram=True)"
        )
    return spectrum_of(scores.targets, scores.grams, metric)


def spectrum_of(targets: Sequence[Target], grams: Grams, metric: str) -> Spectrum:
    """`spectrum` of the Gram matrices themselves."""
    check_choice("metric", metric, METRICS)
    members = members_of(grams.slots)
    of_slot = {slot: cores(grams, of, metric, _names(targets, of)) for slot, of in members.items()}
    values: list[tuple[float, ...]] = [
        () if slot is None else tuple(of_slot[slot].values.tolist()) for slot in grams.slots
    ]
    return Spectrum(tuple(targets), tuple(grams.slots), tuple(values), metric)


def _names(targets: Sequence[Target], members: Sequence[int]) -> str:
    return ", ".join(targets[i].name for i in members)


def cores(grams: Grams, members: Sequence[int], metric: str, name: str) -> Cores:
    """The cores of the adapter that `members` use; their statistics add up.

    Raises ValueError for statistics that the metric needs and that are not there, or not finite.
    """
    i = members[0]
    left, right, unit = grams.B[i], grams.A[i], grams.scaling[i] ** 2
    assert left is not None and right is not None
    if metric == "output":
        right = _sum(grams.inputs, members)
    elif metric == "loss":
        left, right = grams.left[i], grams.right[i]
        trace = 0.0 if left is None else float(left.trace())
        unit = 1.0 / (2.0 * max(grams.samples, 1.0) * (trace or 1.0))
    if left is None or right is None:
        need = "outputs and the loss" if metric == "loss" else "outputs"
        raise ValueError(
            f"metric={metric!r} needs statistics of the {need}, and there are none of {name}: "
            "probe with gram=True, and labels= for the loss"
        )
    for gram in (left, right):
        if not gram.isfinite().all():
            raise ValueError(
                f"a Gram matrix of {name} is not finite: its LoRA outputs or gradients overflowed "
                "or met NaN. Lower the learning rate, or measure in float32"
            )
    return best_cores(left, right, unit, (grams.A[i], grams.B[i]))


def _sum(matrices: Sequence[Tensor | None], members: Sequence[int]) -> Tensor | None:
    found = [matrix for i in members if (matrix := matrices[i]) is not None]
    return torch.stack(found).sum(0) if found else None


def best_cores(
    left: Tensor, right: Tensor, unit: float, factors: tuple[Tensor | None, Tensor | None]
) -> Cores:
    """The cores for the cost unit·tr(left (I − M) right (I − M)ᵀ).

    left, right   (r, r), symmetric and not negative
    factors       A Aᵀ and BᵀB: the directions of the new A and B get the same length
    """
    L, undo_L = _root(left)
    R, undo_R = _root(right)
    U, sigma, Vt = torch.linalg.svd(L @ R.T)
    q, p = undo_L @ U, Vt @ undo_R.T  # (r, r) columns, (r, r) rows
    of_A, of_B = factors
    assert of_A is not None and of_B is not None
    long_p = (p @ of_A @ p.T).diagonal().clamp_min(0.0).sqrt()
    long_q = (q.T @ of_B @ q).diagonal().clamp_min(0.0).sqrt()
    used = (sigma > 0) & (long_p > 0) & (long_q > 0)
    # ‖A' row‖ = ‖B' column‖ where there is anything; elsewhere B' is zero and A' can still learn.
    ratio = torch.where(used, (sigma * long_q / long_p).sqrt(), 0.0)
    p = torch.where(used[:, None], p * ratio[:, None], Vt)
    q = torch.where(used, q * torch.where(used, sigma / ratio, 0.0), 0.0)
    return Cores(unit * sigma.square(), q, p)


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """L (r, r) with LᵀL = gram, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    least = values[-1].clamp_min(0.0) * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(values > least, values, 0.0).sqrt()
    inverse = torch.where(values > least, 1.0 / roots, 0.0)
    return roots[:, None] * vectors.T, vectors * inverse


def allocate(
    spectrum: Spectrum,
    *,
    budget: float | None = None,
    threshold: float | None = None,
    max_loss: float | None = None,
    rank: int | None = None,
    scope: str = "joint",
    multiple: int = 1,
    budget_time: float | None = None,
) -> dict[str, int]:
    """Name -> the rank that is left, 0 included: the directions worth most per element.

    Exactly one of
      budget      in (0, 1]: at most that part of the elements of the adapters as they are
      threshold   in (0, 1]: the fewest elements that keep that part of the sum of the values
      max_loss    the fewest elements whose predicted rise of the loss is at most this
      rank        this rank for every target, where it has as many directions
    scope      "joint": one pool of all targets; "per_module": a pool for each module type and
               shape; "per_target": every target the same part
    multiple   ranks are multiples of it, as far as an adapter has directions (8 for some engines)
    budget_time   in (0.5, 1]: also, no adapter in so many of the lowest layers that a step of
               training takes about that part of its time, since the backward pass ends above them:
               1 − k / 2L for k of L equal layers

    Ties go to the earlier target. Raises ValueError for options out of range, for a budget below
    one step of the smallest target, and for a max_loss that leaves nothing.
    """
    check_choice("scope", scope, SCOPES)
    given = {"budget": budget, "threshold": threshold, "max_loss": max_loss, "rank": rank}
    _check(spectrum, given, multiple)
    low = _lowest(spectrum, budget_time)
    if rank is not None:
        return {name: 0 if name in low else min(rank, len(spectrum[name])) for name in spectrum}
    ranks = dict.fromkeys(spectrum, 0)
    for pool in _pools(spectrum, scope):
        whole = sum(sum(spectrum.by_target[i]) for i in pool)
        full = sum(len(spectrum.by_target[i]) * spectrum.cost(i) for i in pool)
        limit = math.inf if budget is None else budget * full * (1 + 1e-12)
        wanted = math.inf  # what has to be kept of the values
        if threshold is not None:
            wanted = threshold * whole * (1 - 1e-12)
        elif max_loss is not None:
            wanted = whole - max_loss * (1.0 if scope == "joint" else whole / _total(spectrum))
        upper = [
            i for i in pool if not low & {spectrum.targets[j].name for j in _users(spectrum, i)}
        ]
        for i, k in _spend(spectrum, upper, limit, wanted, multiple).items():
            for j in _users(spectrum, i):
                ranks[spectrum.targets[j].name] = k
    if budget is not None and not any(ranks.values()):
        first = [(i, len(spectrum.by_target[i])) for i in spectrum._first]
        least = min(min(multiple, r) * spectrum.cost(i) for i, r in first) / spectrum.full
        raise ValueError(
            f"budget={budget:g} is below one direction: choose at least {least:.3g}, or a scope "
            "that pools more targets"
        )
    if max_loss is not None and spectrum.full and not any(ranks.values()):
        raise ValueError(
            f"max_loss={max_loss:g} leaves no adapter at all, which would cost "
            f"{_total(spectrum):.2g}: choose less"
        )
    return ranks


def _spend(
    spectrum: Spectrum, pool: Sequence[int], limit: float, wanted: float, step: int
) -> dict[int, int]:
    """First target of an adapter -> rank, by falling value per element."""
    offers = []
    for order, i in enumerate(pool):
        values = spectrum.by_target[i]
        for start in range(0, len(values), step):
            part = values[start : start + step]
            offers.append((-sum(part) / len(part) / spectrum.cost(i), order, start, i, part))
    ranks, closed, spent, kept = dict.fromkeys(pool, 0), set[int](), 0, 0.0
    for *_, start, i, part in sorted(offers):
        size = len(part) * spectrum.cost(i)
        if kept >= wanted:
            break
        if i in closed or spent + size > limit:
            closed.add(i)
            continue
        ranks[i], spent, kept = start + len(part), spent + size, kept + sum(part)
    return ranks


def _users(spectrum: Spectrum, i: int) -> list[int]:
    """The targets that use the adapter of target i."""
    return [j for j, slot in enumerate(spectrum.slots) if slot == spectrum.slots[i]]


def _lowest(spectrum: Spectrum, budget_time: float | None) -> set[str]:
    """The targets in the lowest layers, which must go for this part of a step's time."""
    if budget_time is None:
        return set()
    if not 0.5 < budget_time <= 1.0:
        raise ValueError(
            f"budget_time={budget_time}: choose a number in (0.5, 1], as the forward pass stays"
        )
    of_layer = {name: layer_of(name) for name in spectrum}
    layers = list(dict.fromkeys(layer for layer in of_layer.values() if layer))
    count = math.ceil(2 * len(layers) * (1 - budget_time) - 1e-9)
    if count >= len(layers):
        raise ValueError(
            f"budget_time={budget_time} leaves none of the {len(layers)} layers an adapter: choose "
            f"at least {1 - (len(layers) - 1) / (2 * max(len(layers), 1)):.3g}"
        )
    return {name for name, layer in of_layer.items() if layer in layers[:count]}


def _pools(spectrum: Spectrum, scope: str) -> list[list[int]]:
    pools: dict[Any, list[int]] = {}
    for i in spectrum._first:
        target = spectrum.targets[i]
        key = {"joint": None, "per_target": i, "per_module": target.group[:3]}[scope]
        pools.setdefault(key, []).append(i)
    return list(pools.values())


def _total(spectrum: Spectrum) -> float:
    return sum(sum(spectrum.by_target[i]) for i in spectrum._first) or 1.0


def _check(spectrum: Spectrum, given: Mapping[str, Any], multiple: int) -> None:
    named = [f"{name}={value}" for name, value in given.items() if value is not None]
    if len(named) != 1:
        got = ", ".join(named) or "none"
        raise ValueError(f"give exactly one of {', '.join(given)}; got {got}")
    for name in ("budget", "threshold"):
        check_part(name, given[name])
        if given[name] == 0.0:
            raise ValueError(f"{name}=0: choose a number in (0, 1]")
    rank, max_loss = given["rank"], given["max_loss"]
    if rank is not None and (not isinstance(rank, int) or rank < 0):
        raise ValueError(f"rank={rank!r}: choose a whole number from 0 up")
    if max_loss is not None:
        if not 0.0 <= max_loss < math.inf:
            raise ValueError(f"max_loss={max_loss}: choose a number from 0 up")
        if spectrum.metric != "loss":
            raise ValueError(
                f"max_loss needs metric='loss', and the spectrum has {spectrum.metric!r}"
            )
    if not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple={multiple!r}: choose a whole number from 1 up")
