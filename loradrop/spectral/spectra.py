"""Spectral LoRA-drop: what each direction of an adapter is worth, and the best smaller adapters.

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

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from loradrop.options import check_choice
from loradrop.scores import Grams, Scores, Target, members_of, require_scores
from loradrop.spectral.compensation import Compensation, compensate, lost, rise

METRICS = ("loss", "output", "weight")
ENOUGH = 64  # batches, for a prediction of the loss
_log = logging.getLogger(__name__)


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

    gradients   slot -> (n, r, r), with metric "loss" and where the probe kept them: the gradient of
                each batch's loss by a core between the best left and right factors
    samples     how many losses the n batches sum
    """

    targets: tuple[Target, ...]
    slots: tuple[int | None, ...]
    by_target: tuple[tuple[float, ...], ...]
    metric: str
    gradients: Mapping[int, Tensor] = field(default_factory=dict)
    samples: float = 0.0

    def __getitem__(self, name: str) -> tuple[float, ...]:
        return dict(zip(self, self.by_target, strict=True))[name]

    def __iter__(self) -> Iterator[str]:
        return (target.name for target in self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        directions = sum(len(self.by_target[i]) for i in self.adapters)
        return f"Spectrum({len(self)} targets, {directions} directions, {self.metric})"

    @property
    def adapters(self) -> list[int]:
        """The first target of each adapter."""
        return [members[0] for members in members_of(self.slots).values()]

    def cost(self, i: int) -> int:
        """Elements of one direction of target i: K + N."""
        return self.targets[i].in_features + self.targets[i].out_features

    @property
    def full(self) -> int:
        """Elements of all adapters as they are, each once."""
        return sum(len(self.by_target[i]) * self.cost(i) for i in self.adapters)

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Elements that are left with these ranks, each adapter once."""
        return sum(ranks[self.targets[i].name] * self.cost(i) for i in self.adapters)

    def kept(self, ranks: Mapping[str, int]) -> float:
        """The part of the sum of all values that these ranks keep, in [0, 1]."""
        return 1.0 - self._lost(ranks) / self.total if self.total > 0 else 1.0

    @property
    def total(self) -> float:
        """The sum of all values, each adapter once."""
        return sum(sum(self.by_target[i]) for i in self.adapters)

    def loss(self, ranks: Mapping[str, int]) -> float:
        """The predicted rise of the mean loss: of all that is cut together where the probe kept
        batches, else the sum of the values. Raises ValueError for another metric.
        """
        if self.metric != "loss":
            raise ValueError(f"metric={self.metric!r} does not predict a loss: take metric='loss'")
        if not self.gradients:
            return self._lost(ranks)
        return rise(lost([*self.gradients.values()], self._of_adapters(ranks)), self.samples)

    def made_up(self, ranks: Mapping[str, int]) -> Compensation | None:
        """How what is left makes up for what goes; None where the probe kept no batches."""
        if not self.gradients:
            return None
        return compensate([*self.gradients.values()], self._of_adapters(ranks), self.samples)

    def _of_adapters(self, ranks: Mapping[str, int]) -> list[int]:
        return [ranks[self.targets[i].name] for i in self.adapters]

    def _lost(self, ranks: Mapping[str, int]) -> float:
        return sum(sum(self.by_target[i][ranks[self.targets[i].name] :]) for i in self.adapters)


def spectrum(scores: Scores, metric: str = "loss") -> Spectrum:
    """What each direction of each adapter is worth: see `Spectrum`.

    scores   of `probe(model, batches, gram=True)`, or of a training run that collected them

    It warns where the batches are too few to predict the loss. Raises ValueError for an unknown
    metric, for scores without what it needs, and for NaN.
    """
    require_scores(scores)
    if scores.grams is None:
        raise ValueError(
            "the scores say nothing of directions: probe with loradrop.probe(model, batches, "
            "gram=True)"
        )
    found = spectrum_of(scores.targets, scores.grams, metric)
    count = len(next(iter(found.gradients.values()), ()))
    if 0 < count < ENOUGH:
        _log.warning(
            "%d batches were measured, and below %d the predicted rise of the loss says little: "
            "measure more rows (loradrop compress --measured, more batches for probe), or give "
            "more data whose rows differ", count, ENOUGH,
        )  # fmt: skip
    return found


def spectrum_of(targets: Sequence[Target], grams: Grams, metric: str) -> Spectrum:
    """`spectrum` of the Gram matrices themselves."""
    return decompose(targets, grams, metric)[0]


def decompose(
    targets: Sequence[Target], grams: Grams, metric: str
) -> tuple[Spectrum, dict[int, Cores]]:
    """The spectrum, and the cores of each adapter by its slot."""
    check_choice("metric", metric, METRICS)
    members = members_of(grams.slots)
    grams = _measured(grams)
    of_slot = {slot: cores(grams, of, metric, _names(targets, of)) for slot, of in members.items()}
    values: list[tuple[float, ...]] = [
        () if slot is None else tuple(of_slot[slot].values.tolist()) for slot in grams.slots
    ]
    given = _between(grams, of_slot) if metric == "loss" else {}
    found = Spectrum(
        tuple(targets), tuple(grams.slots), tuple(values), metric, given, grams.samples
    )
    return found, of_slot


def _between(grams: Grams, of_slot: Mapping[int, Cores]) -> dict[int, Tensor]:
    """`Spectrum.gradients`."""
    first = {slot: members[0] for slot, members in members_of(grams.slots).items()}
    if not grams.cores or any(grams.cores[i] is None for i in first.values()):
        return {}
    found = {}
    for slot, i in first.items():
        kept, (_, left, right) = grams.cores[i], of_slot[slot]
        assert kept is not None
        found[slot] = (left.T @ kept.double() @ right.T).float()
    return found


def _measured(grams: Grams) -> Grams:
    """With zeros for an adapter that no input reached, where inputs reached others."""
    firsts = {of[0] for of in members_of(grams.slots).values()}

    def filled(found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        if all(matrix is None for matrix in found):
            return tuple(found)
        given = zip(found, grams.A, strict=True)
        return tuple(
            torch.zeros_like(A) if matrix is None and A is not None and i in firsts else matrix
            for i, (matrix, A) in enumerate(given)
        )

    return replace(
        grams, inputs=filled(grams.inputs), left=filled(grams.left), right=filled(grams.right)
    )


def _names(targets: Sequence[Target], members: Sequence[int]) -> str:
    return ", ".join(targets[i].name for i in members)


def cores(grams: Grams, members: Sequence[int], metric: str, name: str) -> Cores:
    """The cores of the adapter that `members` use; their statistics add up.

    Raises ValueError for statistics that the metric needs and that are not there, or not finite.
    """
    i = members[0]
    squares = [grams.scaling[member] ** 2 for member in members]
    left, right, unit = grams.B[i], grams.A[i], sum(squares)
    assert left is not None and right is not None
    if metric == "output":
        right, unit = _sum([grams.inputs[member] for member in members], squares), 1.0
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


def _sum(matrices: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    weighted = zip(matrices, weights, strict=True)
    found = [weight * matrix for matrix, weight in weighted if matrix is not None]
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
    long_p, long_q = _lengths(p, q, factors)
    used = (sigma > 0) & (long_p > 0) & (long_q > 0)
    # ‖A' row‖ = ‖B' column‖ where there is anything; elsewhere B' is zero and A' can still learn.
    ratio = torch.where(used, (sigma * long_q / long_p).sqrt(), 0.0)
    p = torch.where(used[:, None], p * ratio[:, None], Vt)
    q = torch.where(used, q * torch.where(used, sigma / ratio, 0.0), 0.0)
    return Cores(unit * sigma.square(), q, p)


def narrowed(
    best: Cores, k: int, rows: Tensor | None, factors: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """P (k, r) and Q (r, k) of the adapter with A' = P A and B' = B Q: the first k directions, with
    `rows` (k, r) of all of them added to their right factor.

    factors   A Aᵀ and BᵀB: what got rows has directions of the same length on both sides again
    """
    left, right = best.left[:, :k], best.right[:k]
    if rows is None:
        return right, left
    added = rows @ best.right
    if k == len(best.right):  # what no batch reached stays
        whole = torch.eye(k, dtype=added.dtype)
        return whole + left @ added, whole
    right = right + added
    long_p, long_q = _lengths(right, left, factors)
    ratio = (long_q / long_p).sqrt()
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
    return right * ratio[:, None], left / ratio


def _lengths(
    rows: Tensor, columns: Tensor, factors: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Those of the rows of P A and of the columns of B Q, for P (k, r) and Q (r, k)."""
    of_A, of_B = factors
    assert of_A is not None and of_B is not None
    squares = (rows @ of_A @ rows.T).diagonal(), (columns.T @ of_B @ columns).diagonal()
    return squares[0].clamp_min(0.0).sqrt(), squares[1].clamp_min(0.0).sqrt()


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """L (r, r) with LᵀL = gram, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    least = values[-1].clamp_min(0.0) * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(values > least, values, 0.0).sqrt()
    inverse = torch.where(values > least, 1.0 / roots, 0.0)
    return roots[:, None] * vectors.T, vectors * inverse
