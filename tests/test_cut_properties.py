"""What holds of spectrum, allocate and truncate whatever the shapes, ranks, scales and sharing."""

import itertools
import math
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import wake
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig
from loradrop.spectral.allocation import SCOPES, least_budget
from loradrop.spectral.spectra import METRICS, Spectrum, spectrum_of
from loradrop.statistics.gram_sums import grams_of

pytestmark = pytest.mark.numbers
property_test = settings(max_examples=80, deadline=None, derandomize=True)
budgets = st.sampled_from((0.15, 0.3, 0.5, 0.8, 1.0))


class Case(NamedTuple):
    """A chain of layers: their widths, the rank and α of each, the size of B, and who keeps an
    adapter of its own; None for all.
    """

    widths: list[int]
    ranks: list[int]
    alphas: list[float]
    size: float
    own: list[int] | None


@st.composite
def chains(draw: st.DrawFn) -> Case:
    """A model where many layers have one shape, so that they can share."""
    count, square = draw(st.integers(2, 4)), draw(st.booleans())
    sizes = [draw(st.sampled_from((2, 5, 8, 13))) for _ in range(count + 1)]
    widths = [8] * len(sizes) if square else sizes
    layers = range(count)
    ranks = [draw(st.integers(1, min(widths[i], widths[i + 1]))) for i in layers]
    if square:
        ranks = [ranks[0]] * count
    alphas = [draw(st.sampled_from((0.5, 1.0, 16.0))) for _ in layers]
    own = [i for i in layers if draw(st.booleans())] if square else None
    return Case(widths, ranks, alphas, draw(st.sampled_from((1e-3, 1.0, 1e3))), own)


def made(case: Case) -> Any:
    pairs = itertools.pairwise(case.widths)
    layers = [nn.Sequential(OrderedDict(q=nn.Linear(k, n))) for k, n in pairs]
    model = nn.Sequential(*layers).double()
    ranks = {f"^{i}.q": rank for i, rank in enumerate(case.ranks)}
    alphas = {f"^{i}.q": alpha for i, alpha in enumerate(case.alphas)}
    options: dict[str, Any] = {"rank_pattern": ranks, "alpha_pattern": alphas}
    loradrop.inject(model, LoRAConfig(target_modules=["q"], **options))
    if case.own is not None:
        loradrop.share(model, [f"{i}.q" for i in case.own], share="group")
    return wake(model.double(), case.size)


def found_in(model: Any, metric: str = "weight") -> Spectrum:
    bank = model.lora_bank
    if metric == "weight":
        return spectrum_of(bank.targets, grams_of(bank), metric)
    random = torch.Generator().manual_seed(1)
    wide = model[0].q.in_features
    batches = [torch.randn(3, wide, generator=random, dtype=torch.float64) for _ in range(4)]
    return loradrop.spectrum(loradrop.probe(model, batches, gram=True), metric)


def deltas(model: Any) -> list[Tensor]:
    """s·B·A of each layer, zero where there is none."""
    bank = model.lora_bank
    return [
        torch.zeros(t.out_features, t.in_features, dtype=torch.float64) if d is None else d.clone()
        for t, d in ((t, bank.delta(i)) for i, t in enumerate(bank.targets))
    ]


def enough(found: Spectrum, budget: float, **options: Any) -> float:
    """The budget, or the least that leaves anything where that is more."""
    return min(1.0, max(budget, least_budget(found, **options) * (1 + 1e-9)))


@pytest.mark.parametrize("metric", METRICS)
@property_test
@given(case=chains())
def test_at_full_rank_every_function_stays(case: Case, metric: str) -> None:
    model = made(case)
    before, found = deltas(model), found_in(model, metric)
    ranks = loradrop.allocate(found, budget=1.0)
    assert ranks == {name: len(found[name]) for name in found}
    loradrop.truncate(model, ranks, metric=metric)
    assert all(map(torch.equal, deltas(model), before))


@property_test
@given(chains(), budgets, st.sampled_from(SCOPES), st.integers(1, 4))
def test_no_budget_is_exceeded(case: Case, budget: float, scope: str, multiple: int) -> None:
    found = found_in(made(case))
    budget = enough(found, budget, scope=scope, multiple=multiple)
    ranks = loradrop.allocate(found, budget=budget, scope=scope, multiple=multiple)
    assert 0 < found.parameters(ranks) <= budget * found.full * (1 + 1e-9)
    for name, rank in ranks.items():
        assert rank % multiple == 0 or (rank == len(found[name]) < multiple)


@property_test
@given(chains(), budgets)
def test_what_is_kept_is_worth_most(case: Case, part: float) -> None:
    """By element; of a budget, what is worth more and went would not have fitted."""
    found = found_in(made(case))
    budget = enough(found, part)
    by_budget = loradrop.allocate(found, budget=budget), budget * found.full * (1 - 1e-9)
    for ranks, limit in (by_budget, (loradrop.allocate(found, threshold=part), math.inf)):
        firsts = [(i, found.targets[i].name) for i in found.adapters]
        least = min(found[name][k - 1] / found.cost(i) for i, name in firsts if (k := ranks[name]))
        for i, name in firsts:
            values, k = found[name], ranks[name]
            assert list(values) == sorted(values, reverse=True)
            if k < len(values) and found.parameters(ranks) + found.cost(i) <= limit:
                assert values[k] / found.cost(i) <= least * (1 + 1e-9)


@pytest.mark.parametrize("metric", METRICS)
@property_test
@given(case=chains(), budget=budgets)
def test_a_cut_has_its_ranks_and_costs_what_was_said(
    case: Case, budget: float, metric: str
) -> None:
    model = made(case)
    before, found = deltas(model), found_in(model, metric)
    budget = enough(found, budget)
    ranks = loradrop.allocate(found, budget=budget)
    loradrop.truncate(model, ranks, metric=metric)
    bank, after = model.lora_bank, deltas(model)
    for i, target in enumerate(bank.targets):
        k, pair = ranks[target.name], bank.factors(i)
        assert (0 if pair is None else len(pair[0])) == k
        assert int(torch.linalg.matrix_rank(after[i])) <= k
    assert bank.trainable == found.parameters(ranks)
    if metric != "weight":
        return
    lost = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    missing = (1.0 - found.kept(ranks)) * found.total
    assert lost == pytest.approx(missing, rel=1e-6, abs=1e-9 * found.total)
