"""The closed forms against brute force, and how a budget is spent: pure functions on plain data."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loradrop.scores import Grams, Scores, Target
from loradrop.spectral.allocation import allocate
from loradrop.spectral.spectra import METRICS, Spectrum, best_cores, spectrum

pytestmark = pytest.mark.numbers


def positive(r: int, rank: int, seed: int) -> Tensor:
    """A Gram matrix (r, r) of that rank, of sizes from 1 to 1e-4."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, r, generator=random, dtype=torch.float64)
    return (rows * torch.logspace(0, -2, rank).unsqueeze(1)).T @ rows


def cost(left: Tensor, right: Tensor, core: Tensor) -> float:
    missing = torch.eye(len(core), dtype=torch.float64) - core
    return float(torch.trace(left @ missing @ right @ missing.T))


CASES = [(r, k, seed) for r, k in ((1, 1), (2, 1), (3, 2), (5, 1), (8, 3)) for seed in range(3)]


@pytest.mark.parametrize(("r", "k", "seed"), CASES)
def test_no_core_of_its_rank_is_better(r: int, k: int, seed: int) -> None:
    """Than 1,000 random ones, each with the best right factor for its left one; and an optimiser
    that starts from random ones comes to its cost, which is what the values say.
    """
    left, right = positive(r, r, seed), positive(r, r, seed + 99)
    found = best_cores(left, right, 0.5, (positive(r, r, 5), positive(r, r, 6)))
    best = cost(left, right, found.left[:, :k] @ found.right[:k])
    assert best == pytest.approx(2 * float(found.values[k:].sum()), rel=1e-6, abs=1e-12)
    scale = cost(left, right, torch.zeros(r, r, dtype=torch.float64))
    random = torch.Generator().manual_seed(seed)
    for _ in range(1000):
        q = torch.randn(r, k, generator=random, dtype=torch.float64)
        p = torch.linalg.solve(q.T @ left @ q, q.T @ left)  # the minimum over p
        assert cost(left, right, q @ p) >= best - 1e-9 * scale
    reached = math.inf
    for _ in range(3):
        q = torch.randn(r, k, generator=random, dtype=torch.float64)
        for _ in range(400):  # alternating least squares
            p = torch.linalg.solve(q.T @ left @ q, q.T @ left)
            q = torch.linalg.solve(p @ right @ p.T, p @ right).T
        reached = min(reached, cost(left, right, q @ p))
    assert reached == pytest.approx(best, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize(("of_left", "of_right"), list(itertools.product((0, 1, 3, 6), repeat=2)))
def test_directions_without_weight(of_left: int, of_right: int) -> None:
    """Singular matrices: values end in zeros, nothing is NaN, and A' can go on learning."""
    r, factors = 6, (positive(6, 6, 1), positive(6, 6, 2))
    left, right = (positive(r, k, k) for k in (of_left, of_right))
    found = best_cores(left, right, 1.0, factors)
    used = min(of_left, of_right)
    assert int((found.values > 1e-9 * float(found.values[0])).sum()) == used
    assert all(part.isfinite().all() for part in found) and found.right.any(1).all()
    scale = float(left.trace() * right.trace())
    assert cost(left, right, found.left @ found.right) <= 1e-9 * scale + 1e-300


def test_new_factors_are_balanced() -> None:
    of_A, of_B = positive(4, 4, 1), positive(4, 4, 2)
    found = best_cores(positive(4, 4, 3), positive(4, 4, 4), 1.0, (of_A, of_B))
    lengths_A = (found.right @ of_A @ found.right.T).diagonal()
    lengths_B = (found.left.T @ of_B @ found.left).diagonal()
    assert_close(lengths_A, lengths_B)
    assert_close(found.left @ found.right, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-8)


# From scores to a spectrum


def drawn(
    slots: Sequence[int | None], ranks: Sequence[int], seed: int = 0
) -> tuple[Scores, list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Scores of adapters over random inputs h, with their factors and those h."""
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    targets = tuple(Target(f"layers.{i}.q", "q", 12, 10, r) for i, r in enumerate(ranks))
    owned = {slot: (normal(r, 12), normal(10, r)) for slot, r in zip(slots, ranks, strict=True)}
    pairs = [owned[slot] for slot in slots]
    tokens = [normal(40, 12) @ A.T for A, _ in pairs]
    grads = [normal(40, 10) @ B for _, B in pairs]
    there = [slot is not None for slot in slots]
    grams = Grams(
        scaling=(2.0,) * len(slots),
        slots=tuple(slots),
        A=tuple(A @ A.T if t else None for (A, _), t in zip(pairs, there, strict=True)),
        B=tuple(B.T @ B if t else None for (_, B), t in zip(pairs, there, strict=True)),
        inputs=tuple(h.T @ h if t else None for h, t in zip(tokens, there, strict=True)),
        left=tuple(u.T @ u if t else None for u, t in zip(grads, there, strict=True)),
        right=tuple(h.T @ h if t else None for h, t in zip(tokens, there, strict=True)),
        samples=8.0,
    )
    norms = [
        4 * (h @ B.T).square().sum() if t else torch.zeros((), dtype=torch.float64)
        for h, (_, B), t in zip(tokens, pairs, there, strict=True)
    ]
    return Scores(targets, torch.stack(norms)[None], 40, "offline", grams), pairs, tokens


def test_output_values_sum_to_the_scores() -> None:
    scores, _, _ = drawn((0, 1, None, 2), (4, 2, 3, 5))
    found = spectrum(scores, "output")
    assert [len(found[name]) for name in found] == [4, 2, 0, 5]
    for name in found:
        assert list(found[name]) == sorted(found[name], reverse=True)
        assert sum(found[name]) == pytest.approx(scores[name], rel=1e-12)


def test_weight_values_are_those_of_the_delta() -> None:
    scores, pairs, _ = drawn((0, 1), (4, 2))
    for name, (A, B) in zip(scores, pairs, strict=True):
        sigma = torch.linalg.svdvals(2.0 * B @ A)[: len(A)]
        assert_close(torch.tensor(spectrum(scores, "weight")[name]).double(), sigma.square())


def test_a_shared_adapter_is_one_for_all_its_members() -> None:
    scores, pairs, tokens = drawn((0, 1, 0), (4, 2, 4))
    found = spectrum(scores, "output")
    names = list(scores)
    assert found[names[0]] == found[names[2]] and found.full == (4 + 2) * 22
    assert sum(found[names[0]]) == pytest.approx(scores[names[0]] + scores[names[2]], rel=1e-12)
    both = torch.cat([tokens[0], tokens[2]])
    sigma = torch.linalg.svdvals(2.0 * both @ pairs[0][1].T)[:4]
    assert_close(torch.tensor(found[names[0]]).double(), sigma.square())
    ranks = allocate(found, budget=0.5)
    assert ranks[names[0]] == ranks[names[2]] and found.parameters(ranks) <= 66


def test_statistics_that_are_missing_or_broken_are_refused() -> None:
    scores, _, _ = drawn((0, 1), (4, 2))
    with pytest.raises(ValueError, match="gram=True"):
        spectrum(Scores(scores.targets, scores.rows, 40, "offline"))
    with pytest.raises(ValueError, match="'energy': choose one of loss, output, weight"):
        spectrum(scores, "energy")
    assert scores.grams is not None and scores.grams.inputs[0] is not None
    scores.grams.inputs[0][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layers\.0\.q is not finite"):
        spectrum(scores, "output")
    assert scores.grams.left[1] is not None
    scores.grams.left[1][0, 0] = math.inf
    with pytest.raises(ValueError, match=r"layers\.1\.q is not finite"):
        spectrum(scores, "loss")
    assert len(spectrum(scores, "weight")) == 2


# From a spectrum to ranks


def of(*values: Sequence[float], widths: Sequence[int] = (), metric: str = "loss") -> Spectrum:
    widths = widths or (10,) * len(values)
    targets = tuple(
        Target(f"layers.{i}.{'qv'[i % 2]}", "qv"[i % 2], width, width, max(1, len(v)))
        for i, (v, width) in enumerate(zip(values, widths, strict=True))
    )
    slots = tuple(i if v else None for i, v in enumerate(values))
    return Spectrum(targets, slots, tuple(map(tuple, values)), metric)


def ranks_of(found: Spectrum, **options: object) -> list[int]:
    return list(allocate(found, **options).values())  # type: ignore[arg-type]


FOUR = of((9.0, 4.0, 1.0, 0.5), (8.0, 0.1, 0.1, 0.0), (3.0, 2.0, 1.5, 1.0))


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"budget": 1.0}, [4, 4, 4]),
        ({"budget": 0.5}, [2, 1, 3]),
        ({"budget": 0.25}, [2, 1, 0]),
        ({"budget": 1 / 12}, [1, 0, 0]),
        ({"threshold": 0.5}, [1, 1, 0]),
        ({"threshold": 1.0}, [4, 3, 4]),
        ({"rank": 2}, [2, 2, 2]),
        ({"rank": 0}, [0, 0, 0]),
        ({"rank": 9}, [4, 4, 4]),
        ({"max_loss": 5.2}, [2, 1, 2]),
        ({"max_loss": 0.0}, [4, 3, 4]),
        ({"budget": 0.5, "scope": "per_target"}, [2, 2, 2]),
        ({"threshold": 0.9, "scope": "per_target"}, [3, 1, 4]),
        ({"budget": 0.5, "scope": "per_module"}, [2, 2, 2]),
        ({"budget": 0.5, "multiple": 2}, [2, 2, 2]),
        ({"budget": 0.5, "multiple": 3}, [3, 3, 0]),
        ({"budget": 0.4, "multiple": 4}, [4, 0, 0]),
    ],
)
def test_allocate(options: dict[str, object], want: list[int]) -> None:
    assert ranks_of(FOUR, **options) == want


def test_what_is_kept_and_lost() -> None:
    ranks = allocate(FOUR, budget=0.25)
    assert FOUR.full == 12 * 20 and FOUR.parameters(ranks) == 60
    lost = 1.5 + 0.2 + 7.5
    assert FOUR.loss(ranks) == pytest.approx(lost)
    assert FOUR.kept(ranks) == pytest.approx(1 - lost / 30.2)
    with pytest.raises(ValueError, match="does not predict a loss"):
        of((1.0,), metric="output").loss({"layers.0.q": 0})


@pytest.mark.parametrize("seed", range(20))
def test_no_other_ranks_keep_more_at_equal_widths(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values = [sorted(torch.rand(3, generator=random).tolist(), reverse=True) for _ in range(3)]
    found = of(*values)
    for budget in (0.2, 0.5, 0.8):
        ranks = allocate(found, budget=budget)
        others = itertools.product(range(4), repeat=3)
        fit = [dict(zip(found, o, strict=True)) for o in others if sum(o) <= 9 * budget + 1e-9]
        assert found.kept(ranks) == pytest.approx(max(map(found.kept, fit)))


def test_wide_targets_pay_for_their_width() -> None:
    found = of((5.0, 4.0), (4.0, 3.0), widths=(100, 10))
    assert ranks_of(found, budget=20 / 220) == [0, 2]
    assert ranks_of(found, budget=0.6) == [1, 2]


def test_a_number_above_the_layers_is_not_theirs() -> None:
    found = of((9.0,), (8.0,), (3.0,))
    targets = tuple(t._replace(name=f"1.{t.name}") for t in found.targets)
    assert ranks_of(replace(found, targets=targets), budget=1.0, budget_time=0.8) == [0, 0, 1]


def test_a_budget_of_time_clears_the_lowest_layers() -> None:
    found = of((9.0,), (8.0,), (3.0,), (2.0,), (1.0,))
    assert ranks_of(found, budget=0.4, budget_time=1.0) == [1, 1, 0, 0, 0]
    assert ranks_of(found, budget=0.4, budget_time=0.9) == [0, 1, 1, 0, 0]
    assert ranks_of(found, budget=1.0, budget_time=0.75) == [0, 0, 0, 1, 1]
    assert ranks_of(found, rank=1, budget_time=0.6) == [0, 0, 0, 0, 1]
    for wrong, message in ((0.5, r"\(0.5, 1\]"), (1.1, r"\(0.5, 1\]"), (0.55, "at least 0.6")):
        with pytest.raises(ValueError, match=message):
            allocate(found, budget=0.4, budget_time=wrong)


AMOUNTS = [{"budget": 0.9}, {"threshold": 0.9}, {"rank": 1}, {"max_loss": 10.0}]


@pytest.mark.parametrize("amount", AMOUNTS)
def test_a_budget_of_time_where_adapters_are_shared(amount: dict[str, object]) -> None:
    """One that a low layer uses goes from all of its members, and not all may go."""
    found = of((9.0,), (8.0,), (9.0,), (2.0,), (1.0,))
    ranks = ranks_of(replace(found, slots=(0, 1, 0, 2, 3)), budget_time=0.9, **amount)
    assert not ranks[0] and not ranks[2] and any(ranks)
    alike = replace(of(*5 * [(12.0,)]), slots=(0,) * 5)
    with pytest.raises(ValueError, match=r"budget_time=0\.9 leaves no adapter.* lowest 1 of 5"):
        ranks_of(alike, budget_time=0.9, **amount)
    assert ranks_of(alike, budget_time=1.0, rank=1) == [1] * 5


def test_without_layers_a_budget_of_time_has_nothing_to_clear() -> None:
    found = of((9.0,), (8.0,))
    heads = tuple(t._replace(name=f"head_{t.kind}") for t in found.targets)
    with pytest.raises(ValueError, match="needs targets in numbered layers"):
        allocate(replace(found, targets=heads), budget=0.5, budget_time=0.9)


def test_ties_go_to_the_earlier_target_and_targets_without_an_adapter_get_none() -> None:
    assert ranks_of(of((1.0, 1.0), (), (1.0, 1.0)), budget=0.5) == [2, 0, 0]


REFUSED = {
    "no option": ({}, "exactly one of budget, threshold, max_loss, rank; got none"),
    "two options": ({"budget": 0.5, "rank": 2}, "got budget=0.5, rank=2"),
    "a budget above 1": ({"budget": 1.5}, r"budget=1.5: choose a number in \(0, 1\]"),
    "no budget": ({"budget": 0.0}, r"budget=0: choose a number in \(0, 1\]"),
    "NaN": ({"threshold": math.nan}, "threshold=nan"),
    "half a rank": ({"rank": 2.5}, "rank=2.5: choose a whole number"),
    "a negative rank": ({"rank": -1}, "rank=-1"),
    "a negative loss": ({"max_loss": -0.1}, "max_loss=-0.1"),
    "an unknown scope": ({"budget": 0.5, "scope": "all"}, "scope='all': choose one of joint"),
    "no multiple": ({"budget": 0.5, "multiple": 0}, "multiple=0"),
    "below a direction": ({"budget": 0.05}, "below one direction: choose at least 0.0834"),
    "everything goes": ({"max_loss": 31.0}, "no adapter at all, which would cost 30: choose less"),
    "a word": ({"budget": "0.5"}, r"budget='0.5': choose a number in \(0, 1\]"),
    "a word for a loss": ({"max_loss": "1"}, "max_loss='1': choose a number from 0 up"),
    "a word for a time": ({"budget": 0.5, "budget_time": "1"}, "budget_time='1': choose a number"),
    "below eight": (
        {"budget": 0.2, "multiple": 8},
        "below one step of multiple=8 directions: choose at least 0.3334",
    ),
    "of its own": ({"budget": 0.2, "scope": "per_target"}, "choose at least 0.25"),
    "an odd rank": ({"rank": 3, "multiple": 2}, "rank=3 is not a multiple of multiple=2"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks_of(FOUR, **options)


@pytest.mark.parametrize("given", [{"a": (1.0, 2.0)}, None])
def test_only_a_spectrum_is_allocated(given: object) -> None:
    with pytest.raises(TypeError, match=r"give what loradrop.spectrum\(scores\) returns"):
        allocate(given, budget=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", ["joint", "per_module", "per_target"])
@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_the_budget_that_is_advised_is_enough(scope: str, multiple: int) -> None:
    found = of((9.0, 4.0, 1.0), (2.0, 1.0), (5.0,) * 6, widths=(7, 30, 11))
    with pytest.raises(ValueError, match="choose at least") as refused:
        allocate(found, budget=1e-3, scope=scope, multiple=multiple)
    advised = float(re.search(r"at least ([\d.]+)", str(refused.value))[1])
    assert any(ranks_of(found, budget=advised, scope=scope, multiple=multiple))
    with pytest.raises(ValueError, match="choose at least"):
        allocate(found, budget=0.99 * advised, scope=scope, multiple=multiple)


@pytest.mark.parametrize("count", [11, 13, 14])
def test_equal_directions_keep_to_the_budget(count: int) -> None:
    """A mean of three equal numbers may round above that of eight."""
    for value in torch.rand(200, generator=torch.Generator().manual_seed(count)).tolist():
        found = of((value,) * count, (value / 2,) * count)
        for budget in (0.15, 0.45, 0.7):
            try:
                ranks = allocate(found, budget=budget, multiple=8)
            except ValueError:
                assert 2 * count * budget < 8
                continue
            assert found.parameters(ranks) <= budget * found.full
            assert all(rank in (0, 8) for rank in ranks.values())


@pytest.mark.parametrize(
    "options",
    [{"budget": 0.9}, {"budget": 1.0}, {"threshold": 1.0}, {"max_loss": 2.0}, {"rank": 16}],
)
def test_ranks_are_multiples_where_the_start_is_none(options: dict[str, float]) -> None:
    """An adapter below the multiple keeps all or nothing."""
    found = of((1.0,) * 7 + (0.1,) * 5, (2.0,) * 16, (3.0,) * 4)
    assert ranks_of(found, multiple=8, **options) == [8, 16, 4]
    lowest = allocate(found, budget=0.9, multiple=8, budget_time=0.8)
    assert list(lowest.values()) == [0, 0, 4]
    with pytest.raises(ValueError, match=r"max_loss=0.1 cannot be kept .*multiple=8.* 0\.4"):
        allocate(found, max_loss=0.1, multiple=8)


def test_where_nothing_is_left_nothing_is_cut() -> None:
    assert allocate(of((), ()), budget=0.5) == {"layers.0.q": 0, "layers.1.v": 0}


@pytest.mark.parametrize("max_loss", [0.0, 0.1])
def test_an_untrained_adapter_has_nothing_to_lose(max_loss: float) -> None:
    with pytest.raises(ValueError, match=r"the adapter does nothing.* an adapter that was trained"):
        allocate(of((0.0, 0.0), (0.0,)), max_loss=max_loss)


def test_max_loss_needs_the_loss() -> None:
    for metric in METRICS[1:]:
        with pytest.raises(ValueError, match=f"max_loss needs metric='loss'.*{metric}"):
            allocate(of((1.0,), metric=metric), max_loss=0.1)
