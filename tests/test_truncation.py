"""The cut: what it keeps exactly, what it loses as predicted, and what goes on working after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import adapt, bert, outputs, share, wake
from torch import Tensor, nn
from torch.testing import assert_close

import loradrop
from loradrop.adapters import adapters_of
from loradrop.config import LoRAConfig
from loradrop.injection import injection_of, plan_of
from loradrop.methods.vera import VeRA
from loradrop.spectral.spectra import spectrum_of
from loradrop.statistics.gram_sums import grams_of

K, N, TOKENS = 12, 10, 40


def chain(r: int = 6, seed: int = 0) -> Any:
    """One adapted layer in float64, whose output is linear in its adapter."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(K, N)).double()
    loradrop.inject(model, LoRAConfig(r=r, lora_alpha=2 * r, target_modules=["0"]))
    return wake(model.double())


def batches(count: int = 4) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [
        torch.randn(TOKENS // count, K, generator=random, dtype=torch.float64) for _ in range(count)
    ]


def probed(model: Any, metric: str = "output", **options: Any) -> Any:
    scores = loradrop.probe(model, batches(), gram=True, **options)
    return loradrop.spectrum(scores, metric)


def delta(model: Any) -> Tensor:
    found = model.lora_bank.delta(0)
    return torch.zeros(N, K, dtype=torch.float64) if found is None else found


@pytest.mark.parametrize("k", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("metric", ["output", "weight", "loss"])
def test_the_output_changes_by_what_was_cut_off(metric: str, k: int) -> None:
    model, x = chain(), torch.cat(batches())
    found, before = probed(model, metric), delta(model)
    loradrop.truncate(model, {"0": k}, metric=metric)
    change = before - delta(model)
    lost = sum(found["0"][k:])
    if metric == "output":
        assert float((x @ change.T).square().sum()) == pytest.approx(lost, rel=1e-6, abs=1e-9)
    elif metric == "weight":
        assert float(change.square().sum()) == pytest.approx(lost, rel=1e-6, abs=1e-9)
    assert torch.linalg.matrix_rank(delta(model)) == k
    bank = model.lora_bank
    assert bank.trainable == k * (K + N) and bank.scaling == (2.0,)
    if k == 0:
        assert bank.factors(0) is None
    else:
        A, B = bank.factors(0)
        assert (A.shape, B.shape) == ((k, K), (N, k)) and A.requires_grad and B.requires_grad
        if k < 6:
            assert_close(A.square().sum(1), B.square().sum(0))


def test_full_rank_keeps_the_very_parameters() -> None:
    model = chain()
    probed(model)
    before = model.lora_bank.factors(0)
    loradrop.truncate(model, {})
    loradrop.truncate(model, {"0": 6}, metric="weight")
    assert all(a is b for a, b in zip(before, model.lora_bank.factors(0), strict=True))


def test_other_targets_and_the_base_stay_as_they_are() -> None:
    model = wake(adapt(bert(2)))
    names = [target.name for target in model.lora_bank.targets]
    base = {k: v.clone() for k, v in model.state_dict().items() if "lora_bank" not in k}
    kept = [model.lora_bank.factors(i) for i in (1, 2)]
    loradrop.truncate(model, {names[0]: 1, names[3]: 0}, metric="weight")
    now = [model.lora_bank.factors(i) for i in (1, 2)]
    assert all(a is b for p, q in zip(kept, now, strict=True) for a, b in zip(p, q, strict=True))
    assert model.lora_bank.factors(3) is None and model.lora_bank.factors(0)[0].shape[0] == 1
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in base.items())


def test_members_of_a_shared_adapter_are_cut_together() -> None:
    model = wake(share(adapt(bert(2)), [0], "group"))
    bank = model.lora_bank
    names = [target.name for target in bank.targets]
    before = list(bank.slots)
    together = [n for n, s in zip(names, before, strict=True) if s == before[1]]
    assert len(together) > 1
    with pytest.raises(ValueError, match="share an adapter, so one rank serves all"):
        loradrop.truncate(model, {together[0]: 1}, metric="weight")
    loradrop.truncate(model, dict.fromkeys(together, 1), metric="weight")
    now = model.lora_bank
    assert len({now.slots[now.index(name)] for name in together}) == 1
    assert now.factors(now.index(together[0]))[0].shape[0] == 1
    assert plan_of(model).cut["slots"] == before and not plan_of(model).cut["earlier"]
    loradrop.truncate(model, {}, metric="weight")
    assert plan_of(model).cut["earlier"]


def test_a_cut_adapter_saves_loads_merges_exports_and_trains_on(tmp_path: Path) -> None:
    model = wake(adapt(bert(2)))
    names = [target.name for target in model.lora_bank.targets]
    loradrop.truncate(model, {names[0]: 1, names[3]: 0}, metric="weight")
    want, full = (
        outputs(model),
        8 * sum(t.in_features + t.out_features for t in bank_targets(model)),
    )
    plan = plan_of(model)
    assert plan.full_parameters == full > plan.parameters == model.lora_bank.trainable
    loradrop.save(model, tmp_path / "native")
    again = bert(2)
    loradrop.load(again, tmp_path / "native")
    assert torch.equal(outputs(again), want)
    assert plan_of(again).to_dict() == plan_of(model).to_dict()
    loradrop.truncate(again, {names[0]: 0}, metric="weight")  # a second cut
    assert plan_of(again).full_parameters == full
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    outputs_with_grad(model).sum().backward()
    optimizer.step()
    assert not torch.equal(outputs(model), want)
    loradrop.export(model, tmp_path / "merged", "merged")
    changed = outputs(model)
    loradrop.merge(model)
    assert_close(outputs(model), changed, rtol=1e-4, atol=1e-5)


def bank_targets(model: Any) -> list[Any]:
    return list(model.lora_bank.targets)


def outputs_with_grad(model: Any) -> Tensor:
    ids = torch.arange(1, 9)[None]
    found: Tensor = model(input_ids=ids).logits
    return found


def test_what_does_not_fit_is_refused() -> None:
    model = chain()
    with pytest.raises(ValueError, match="gram=True"):
        loradrop.truncate(model, {"0": 2})
    loradrop.probe(model, batches())
    with pytest.raises(ValueError, match="gram=True"):
        loradrop.truncate(model, {"0": 2})
    probed(model)
    for rank in (7, -1, 1.5, True):
        with pytest.raises(ValueError, match="a whole number from 0 to 6"):
            loradrop.truncate(model, {"0": rank})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="ranks has '1', which is not a target: 0"):
        loradrop.truncate(model, {"1": 2})
    with pytest.raises(ValueError, match="metric='svd': choose one of"):
        loradrop.truncate(model, {"0": 2}, metric="svd")
    loradrop.truncate(model, {"0": 4})
    with pytest.raises(ValueError, match="gram=True"):  # the probe was of another adapter
        loradrop.truncate(model, {"0": 2})
    loradrop.merge(model, keep_original=True)
    with pytest.raises(ValueError, match="merged"):
        loradrop.truncate(model, {"0": 2}, metric="weight")


def test_a_probe_of_other_adapters_is_refused(tmp_path: Path) -> None:
    """Of those before more training, or before others of the same shape were loaded."""
    model = chain()
    loradrop.save(model, tmp_path)
    probed(model)
    loradrop.load(model, tmp_path)
    with pytest.raises(ValueError, match="gram=True"):
        loradrop.truncate(model, {"0": 2})
    probed(model)
    with torch.no_grad():
        model.lora_bank.B[0].add_(0.1)
    with pytest.raises(ValueError, match="changed since they were probed, by training"):
        loradrop.truncate(model, {"0": 2})
    probed(model)
    model.lora_bank.float()  # rounding is no change
    loradrop.truncate(model, {"0": 2})


def test_a_bank_without_pairs_is_refused() -> None:
    model = nn.Sequential(nn.Linear(K, N))
    loradrop.inject(model, LoRAConfig(r=4, target_modules=["0"], method=VeRA()))
    with pytest.raises(ValueError, match="'vera' has no pair"):
        loradrop.truncate(model, {"0": 2}, metric="weight")


def test_the_spectrum_is_the_same_whoever_makes_it() -> None:
    model = chain()
    found = probed(model, "weight")
    grams = grams_of(model.lora_bank)
    assert found.by_target == spectrum_of(model.lora_bank.targets, grams, "weight").by_target
    assert injection_of(model).scores is not None and len(adapters_of(model).factors) == 1
