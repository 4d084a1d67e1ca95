"""What is left makes up for what was cut: the regression itself, and what a model gains by it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import adapt, bert, llama, wake
from torch import Tensor, distributed
from torch.testing import assert_close
from torchrun import in_ranks, leave

import loradrop
from loradrop.injection import plan_of
from loradrop.scores import Grams, Scores, Target
from loradrop.spectral.allocation import allocate
from loradrop.spectral.compensation import RIDGES, compensate, rise
from loradrop.spectral.spectra import ENOUGH, Spectrum, spectrum
from loradrop.statistics import kept_cores
from loradrop.statistics.collector import Collector
from loradrop.statistics.kept_cores import KeptCores

RANKS = (2, 0, 4, 1)
WORLD = 2


def gradients(n: int = 30, common: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Of four adapters of rank 4, with a part that all directions have in common."""
    random = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 1, 1, generator=random, dtype=torch.float64)
    return [
        torch.randn(n, 4, 4, generator=random, dtype=torch.float64) + common * shared for _ in RANKS
    ]


def least_squares(given: list[Tensor], ridge: float, rows: Tensor) -> tuple[list[Tensor], Tensor]:
    """The entries that minimise the form over these batches, one by one, and what is left of the
    loss of every batch.
    """
    lost = -sum(g[:, j, j] for g, k in zip(given, RANKS, strict=True) for j in range(k, 4))
    assert isinstance(lost, Tensor)
    free = torch.cat([g[:, :k].flatten(1) for g, k in zip(given, RANKS, strict=True)], 1)
    unit = ridge * float(free.square().sum(1).mean())
    some = free[rows]
    square = some.T @ some + unit * torch.eye(free.shape[1], dtype=torch.float64)
    w = torch.linalg.solve(square, -some.T @ lost[rows])
    found = [
        part.view(k, 4) for k, part in zip(RANKS, w.split([4 * k for k in RANKS]), strict=True)
    ]
    return found, lost + free @ w


def test_it_is_the_ridge_regression_that_leave_one_out_chooses() -> None:
    given, every = gradients(), torch.arange(30)
    found = compensate(given, RANKS, samples=60)
    rises = {}
    for ridge in RIDGES:
        left_out = [least_squares(given, ridge, every[every != b])[1][b] for b in every.tolist()]
        rises[ridge] = rise(torch.stack(left_out), 60)
    best = min(rises, key=lambda ridge: rises[ridge])
    # The unit of the ridge is the mean over 30 batches, not over the 29 that are left.
    assert found.ridge == best and found.rise == pytest.approx(rises[best], rel=0.05)
    want, lost = least_squares(given, best, every)
    assert_close(found.rows, want)
    assert rise(lost, 60) < found.rise < found.before


def test_nothing_is_added_where_nothing_goes_and_where_nothing_is_left() -> None:
    given = gradients()
    whole = compensate(given, (4, 4, 4, 4), 60)
    assert whole.ridge is None and whole.rise == whole.before == 0.0
    assert all(not rows.any() for rows in whole.rows)
    none = compensate(given, (0, 0, 0, 0), 60)
    assert none.ridge is None and none.rise == none.before > 0
    assert [rows.shape for rows in none.rows] == [(0, 4)] * 4


def test_nothing_is_added_where_the_batches_say_nothing() -> None:
    """Directions that have nothing in common: what fits one batch harms the next."""
    for seed in range(5):
        given = gradients(12, common=0.0, seed=seed)
        found = compensate(given, RANKS, 60)
        assert found.rise <= found.before
        if found.ridge is None:
            assert not any(rows.any() for rows in found.rows)
    assert found.before == pytest.approx(found.rise, rel=0.2)


def probed(model: Any, count: int = 48) -> Scores:
    random = torch.Generator().manual_seed(3)
    batches = [{"input_ids": torch.randint(1, 30, (2, 6), generator=random)} for _ in range(count)]
    return loradrop.probe(model, batches, gram=True)


def predictions(model: Any) -> Tensor:
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        logits = model(input_ids=torch.randint(1, 30, (64, 6), generator=random)).logits
    found: Tensor = logits.double().log_softmax(-1)
    return found


def classifier() -> Any:
    return wake(adapt(bert(2), r=4)).eval()


def test_a_cut_model_is_nearer_to_the_whole_one() -> None:
    near = {}
    for made_up in (True, False):
        model = classifier()
        before = predictions(model)
        found = spectrum(probed(model))
        ranks = allocate(found, budget=0.25)
        loradrop.truncate(model, ranks, compensate=made_up)
        after = predictions(model)
        near[made_up] = float((before.exp() * (before - after)).sum(1).mean())
        cut = plan_of(model).cut
        assert cut is not None and cut["loss"] == pytest.approx(found.loss(ranks))
        assert (cut["compensated"] is not None) == made_up
        if made_up:
            assert cut["compensated"] < cut["loss"]
        for i, target in enumerate(model.lora_bank.targets):
            pair = model.lora_bank.factors(i)
            assert (0 if pair is None else len(pair[0])) == ranks[target.name]
            if pair is not None and ranks[target.name] < 4:
                assert_close(pair[0].square().sum(1), pair[1].square().sum(0))
    assert near[True] < 0.7 * near[False]


def test_few_batches_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = classifier()
    loradrop.spectrum(probed(model, ENOUGH))
    loradrop.spectrum(probed(model, 3), "output")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    loradrop.spectrum(probed(model, 3))
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("3 batches were measured, and below 64 the predicted rise")
    assert "--measured" in warning


def test_the_whole_model_stays_as_it_is() -> None:
    model = classifier()
    probed(model)
    before = [pair for i in range(4) for pair in model.lora_bank.factors(i)]
    loradrop.truncate(model, {})
    assert all(
        a is b
        for a, b in zip(
            before, sum(map(tuple, map(model.lora_bank.factors, range(4))), ()), strict=True
        )
    )


# The loss of a cut


def test_a_spectrum_predicts_the_loss_of_all_that_goes_together() -> None:
    scores = probed(classifier())
    grams = scores.grams
    assert grams is not None and len(grams.cores) == 4
    found = spectrum(scores)
    ranks = dict(zip(found, (3, 1, 0, 4), strict=True))
    lost = sum(
        found.gradients[slot].diagonal(dim1=1, dim2=2)[:, ranks[name] :].sum(1)
        for slot, name in enumerate(found)
    )
    assert isinstance(lost, Tensor) and len(lost) == 48
    want = float(lost.square().sum()) / 2 / grams.samples
    assert found.loss(ranks) == pytest.approx(want, rel=1e-4)
    everything = sum(
        torch.einsum("nii->n", core.double()) for core in grams.cores if core is not None
    )
    assert isinstance(everything, Tensor)
    want = float(everything.square().sum()) / 2 / grams.samples
    assert found.loss(dict.fromkeys(found, 0)) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("part", [0.02, 0.2, 0.7])
def test_max_loss_keeps_the_fewest_directions_that_cost_no_more(part: float) -> None:
    found = spectrum(probed(classifier()))
    most = part * found.loss(dict.fromkeys(found, 0))
    ranks = allocate(found, max_loss=most)
    assert found.loss(ranks) <= most
    last = min(
        (found[name][k - 1] / found.cost(i), name) for i, (name, k) in enumerate(ranks.items()) if k
    )[1]
    assert found.loss({**ranks, last: ranks[last] - 1}) > most


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_unit_of_the_prediction_is_that_of_the_loss(family: str) -> None:
    """What a cut costs, against the divergence of the predictions from those of before."""
    model = wake(adapt(bert(2) if family == "bert" else llama(), r=4), 0.03).double().eval()
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 45, (400, 2, 8), generator=random)

    def predicted() -> Tensor:
        return model(input_ids=ids.flatten(0, 1)).logits.detach().log_softmax(-1)

    before = predicted()
    found = loradrop.spectrum(loradrop.probe(model, [{"input_ids": i} for i in ids], gram=True))
    ranks = loradrop.allocate(found, budget=0.1)
    loradrop.truncate(model, ranks, compensate=False)
    divergence = float((before.exp() * (before - predicted())).sum(-1).mean())
    assert divergence / 1.5 < found.loss(ranks) < divergence * 1.5


def test_max_loss_without_the_lowest_layers_may_not_be_possible() -> None:
    found = spectrum(probed(classifier()))
    most = found.loss(dict.fromkeys(found, 0))
    for part in (0.9, 0.75):
        ranks = allocate(found, max_loss=0.8 * most, budget_time=part)
        assert found.loss(ranks) <= 0.8 * most and not ranks[next(iter(found))]
        with pytest.raises(ValueError, match=r"lowest layers, which costs .*: choose more"):
            allocate(found, max_loss=1e-6 * most, budget_time=part)


def test_members_of_a_shared_adapter_count_once() -> None:
    targets = tuple(Target(f"{i}.q", "q", 5, 5, 2) for i in range(3))
    core = torch.randn(6, 2, 2)
    eye = torch.eye(2, dtype=torch.float64)
    second = (core.double().transpose(1, 2) @ core.double()).sum(0)
    grams = Grams(
        scaling=(1.0,) * 3, slots=(0, 0, None), A=(eye, eye, None), B=(eye, eye, None),
        inputs=(None,) * 3, left=(second, None, None), right=(second, None, None),
        samples=6.0, cores=(core, None, None),
    )  # fmt: skip
    rows = torch.ones(1, 3, dtype=torch.float64)
    found = spectrum(Scores(targets, rows, 1, "offline", grams))
    assert isinstance(found, Spectrum) and list(found.gradients) == [0]
    assert found.loss({"0.q": 2, "1.q": 2, "2.q": 0}) == 0.0
    assert found.loss({"0.q": 1, "1.q": 1, "2.q": 0}) > 0.0


# What a probe keeps


class Bank:
    """Two adapters, the first of them shared."""

    targets = tuple(Target(name, "q", 5, 5, r) for name, r in (("0", 2), ("1", 2), ("2", 3)))
    slots = (0, 0, 1)


def test_many_rows_become_sums_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_cores, "_ROWS", 64)
    kept = KeptCores(Bank())  # type: ignore[arg-type]
    given = [(torch.randn(2, 2), torch.randn(3, 3)) for _ in range(64 * 2 + 5)]
    for pair in given:
        kept.add(pair)
    first, shared, second = kept.by_target()
    assert shared is None and first is not None and second is not None
    assert len(first) == len(second) == 34  # of four neighbours each, the last of one
    for one, found in enumerate((first, second)):
        whole = torch.stack([pair[one] for pair in given])
        assert_close(found[:33], whole[:132].unflatten(0, (33, 4)).sum(1))
        assert_close(found[33], whole[132])


@pytest.mark.parametrize("most", [70, 71])
def test_rows_are_as_many_as_the_memory_is_for(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_cores, "_ELEMENTS", most * (4 + 9))
    kept = KeptCores(Bank())  # type: ignore[arg-type]
    for _ in range(100):
        kept.add([torch.ones(2, 2), torch.ones(3, 3)])
    first, _, second = kept.by_target()
    assert first is not None and second is not None
    assert len(first) == len(second) == 50 and bool((second == 2).all())


def test_few_rows_are_kept_whatever_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_cores, "_ELEMENTS", 1)
    kept = KeptCores(Bank())  # type: ignore[arg-type]
    for _ in range(64):
        kept.add([torch.ones(2, 2), torch.ones(3, 3)])
    first, _, second = kept.by_target()
    assert first is not None and second is not None
    assert first.shape == (64, 2, 2) and bool((second == 1).all())


def test_an_adapter_that_was_not_called_counts_as_zero() -> None:
    kept = KeptCores(Bank())  # type: ignore[arg-type]
    kept.add([None, torch.ones(3, 3)])
    first, _, second = kept.by_target()
    assert first is not None and not first.any() and second is not None and second.all()


def test_training_keeps_none() -> None:
    model = classifier()
    assert probed(model).grams is not None
    names = ("sqnorm", "gram_in", "core")
    collector = Collector(model, model.lora_bank, online=True, statistics=names)
    model(input_ids=torch.ones(2, 6, dtype=torch.int64)).logits.sum().backward()
    collector.close_row()
    grams = collector.scores().grams
    assert grams is not None and not grams.cores and not spectrum(collector.scores()).gradients


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    kept = KeptCores(Bank())  # type: ignore[arg-type]
    for i in range(1 + rank):
        kept.add([torch.full((2, 2), 10.0 * rank + i), torch.full((3, 3), 10.0 * rank + i)])
    torch.save(kept.by_target(), f"{folder}/rank{rank}.pt")
    leave()


def test_the_rows_of_all_ranks_are_together(tmp_path: Path) -> None:
    assert not any(in_ranks(on_rank, str(tmp_path), processes=WORLD))
    for rank in range(WORLD):
        first, _, second = torch.load(tmp_path / f"rank{rank}.pt")
        for found in (first, second):
            assert found[:, 0, 0].tolist() == [0.0, 0.0, 10.0, 11.0]
