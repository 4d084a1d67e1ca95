"""Spectral LoRA-drop as a method: train wide, cut at a step, train what is left."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training_runs as tiny

import loradrop
from loradrop import LoRAConfig, Plan, Spectral
from loradrop.injection import plan_of
from loradrop.methods.spectral import SpectralBank
from loradrop.report.terminal import plan_table
from loradrop.scores import Target

CUT = tiny.WARMUP


def config(**options: Any) -> LoRAConfig:
    method = Spectral(**{"cut_at": CUT, **options})
    return LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear", method=method)


@pytest.mark.parametrize("source", ["online", "offline"])
@pytest.mark.parametrize("metric", ["loss", "output", "weight"])
def test_it_cuts_to_its_budget_and_trains_on(metric: str, source: str, tmp_path: Path) -> None:
    model, scale = tiny.make_model(), "fixed" if metric == "weight" else "rank"
    result = tiny.run(tmp_path, config(metric=metric, source=source, scale=scale), model=model)
    bank, plan = model.lora_bank, result.plan
    nominal = 4 * sum(t.in_features + t.out_features for t in bank.targets)
    assert 0.2 * nominal < bank.trainable == result.parameters <= 0.25 * nominal
    ranks = {t.name: 0 if s is None else t.r for t, s in zip(bank.targets, bank.slots, strict=True)}
    assert plan.cut["ranks"] == ranks and len(set(ranks.values())) > 1
    assert all(len(values) == 8 for values in plan.cut["values"].values())
    assert plan.cut["metric"] == metric and (plan.cut["loss"] is not None) == (metric == "loss")
    assert (plan.cut["compensated"] is not None) == (metric == "loss" and source == "offline")
    assert plan.full_parameters == 2 * nominal and result.steps == tiny.TOTAL
    for s, target in zip(bank.scaling, bank.targets, strict=True):
        assert s == pytest.approx(2.0 if scale == "fixed" else 2.0 * 0.25 * 4 / target.r)
    assert plan.warmup["steps"] == CUT
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_run_that_is_decided_has_one_stage(tmp_path: Path) -> None:
    first = tiny.run(tmp_path / "first", config())
    model = tiny.make_model()
    loradrop.load(model, tmp_path / "first" / "adapter")
    assert plan_of(model).to_dict() == first.plan.to_dict()
    second = tiny.run(tmp_path / "second", config(), model=model)
    assert second.parameters == first.parameters and second.steps == tiny.TOTAL
    assert {entry["stage"] for entry in second.history} == {"main"}


@pytest.mark.parametrize(
    ("stage", "step"), [("warmup", 3), ("warmup", 7), ("main", 2), ("main", 11)]
)
def test_a_run_that_is_cut_off_comes_to_the_same_end(
    stage: str, step: int, runs: tiny.Runs, tmp_path: Path
) -> None:
    folder, *_ = runs["spectral"]
    lora = tiny.CONFIGS["spectral"]
    tiny.interrupted(tmp_path, stage, step, config=lora)
    tiny.run(tmp_path, lora, resume=True)
    assert tiny.outcome(tmp_path) == tiny.outcome(folder)


def test_only_the_last_part_of_the_first_stage_is_measured(tmp_path: Path) -> None:
    stage = Spectral(cut_at=50, measured=0.2).warmup(100)
    assert (stage.steps, stage.measured_from) == (50, 40)
    for part, rows in ((0.5, CUT // 2), (1.0, CUT)):
        result = tiny.run(tmp_path / str(part), config(measured=part, source="online"))
        assert result.plan.scores["rows"] == rows


@pytest.mark.parametrize("scale", ["rank", "fixed"])
def test_the_cut_changes_no_output_and_s_goes_with_the_rank(scale: str) -> None:
    """Directions that hold nothing are cut, so s·B·A stays what it was."""
    lora = LoRAConfig(r=4, lora_alpha=8, target_modules=["0", "1"], method=Spectral(scale=scale))
    model = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 9)).double()
    bank = loradrop.inject(model, lora)
    model.double()
    with torch.no_grad():
        for B, used in zip(bank.B, (3, 1), strict=True):
            B[:, :used] = torch.randn(len(B), used)
    before = [bank.delta(i) for i in range(2)]
    assert bank.scaling == pytest.approx([2.0 if scale == "fixed" else 2.0 / 8] * 2)
    loradrop.truncate(model, {"0": 3, "1": 1}, metric="weight")
    assert bank.scaling == pytest.approx([2.0, 2.0] if scale == "fixed" else [2.0 / 3, 2.0])
    for i, delta in enumerate(before):
        torch.testing.assert_close(bank.delta(i), delta, rtol=1e-6, atol=1e-9)
        A, B = bank.factors(i)
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))  # balanced still


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_alpha_for_the_s_of_a_small_lora(rslora: bool) -> None:
    """The example of docs/compress.md: a / budget, of rsLoRA a / √budget at the average rank."""
    budget, a, r = 0.125, 2.0, 16

    def injected(**options: Any) -> Any:
        net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
        lora = LoRAConfig(target_modules=["0", "1"], use_rslora=rslora, **options)
        loradrop.inject(net, lora)
        return models.wake(net)

    small = injected(r=2, lora_alpha=a)  # budget · r
    alpha = a / (budget**0.5 if rslora else budget)
    wide = injected(r=r, lora_alpha=alpha, method=Spectral(budget=budget))
    loradrop.truncate(wide, {"0": 2, "1": 1}, metric="weight")
    assert wide.lora_bank.scaling[0] == pytest.approx(small.lora_bank.scaling[0])
    root = r**0.5 if rslora else 1
    assert wide.lora_bank.scaling[1] == pytest.approx(alpha * budget * root / 1)


def test_a_plan_of_before_has_one_s() -> None:
    """Up to schema 4 s did not change, so such an adapter is not read with another."""
    model = tiny.make_model()
    loradrop.inject(model, config(scale="fixed"))
    data = plan_of(model).to_dict() | {"schema": 4}
    assert data["config"]["method"].pop("scale") == "fixed"
    data["cut"] = {"metric": "loss", "values": {}, "ranks": {}, "full": {}, "loss": 0.25}
    plan = Plan.from_dict(data)
    assert plan.config.method.scale == "fixed"
    assert "predicted rise of the loss 0.25\n" in plan_table(plan) + "\n", "nothing made up"
    with pytest.raises(ValueError, match=r"the plan is damaged: .*cut is "):
        Plan.from_dict(plan.to_dict() | {"cut": data["cut"]})
    assert config().method.scale == "rank"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.01}, r"budget=0.01 is below one direction: choose at least 0.0\d+"),
        ({"budget": 0.03, "multiple": 8}, "choose at least 0"),
        ({"budget_time": 0.6}, "budget_time=0.6 leaves none of the 2 layers an adapter"),
    ],
)
def test_what_cannot_be_cut_to_is_refused_before_any_training(
    options: dict[str, Any], message: str
) -> None:
    model = tiny.make_model()
    with pytest.raises(ValueError, match=message) as refused:
        loradrop.inject(model, config(**options))
    advised = re.search("choose at least ([0-9.]+), or a scope", str(refused.value))
    if advised is not None:
        loradrop.inject(model, config(**options | {"budget": float(advised[1])}))


def test_the_first_stage_is_as_wide_as_it_can_be() -> None:
    targets = [Target("a", "a", 100, 6, 4), Target("b", "b", 100, 100, 4)]
    likes = [torch.empty(0)] * 2
    bank = Spectral().bank(targets, [1.0, 1.0], likes)
    assert isinstance(bank, SpectralBank) and [t.r for t in bank.targets] == [6, 8]
    assert bank.nominal == 4 * 106 + 4 * 200
    assert [t.r for t in Spectral(r_start=3).bank(targets, [1.0, 1.0], likes).targets] == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget=0.0"),
        ({"r_start": 0}, "r_start=0"),
        ({"scale": "wide"}, "scale='wide': choose one of rank, fixed"),
        ({"cut_at": 0.0}, "cut_at=0.0"),
        ({"cut_at": 2.5}, "cut_at=2.5"),
        ({"measured": 0.0}, "measured=0.0"),
        ({"metric": "svd"}, "metric='svd': choose one of loss"),
        ({"scope": "all"}, "scope='all'"),
        ({"source": "both"}, "source='both'"),
        ({"multiple": 0}, "multiple=0"),
        ({"budget_time": 0.5}, "budget_time=0.5"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spectral(**options)


def test_stages_without_a_step_are_refused() -> None:
    for at, total in ((1, 10), (10, 10), (0.5, 2)):
        with pytest.raises(ValueError, match=r"lora\.method\.cut_at"):
            Spectral(cut_at=at).warmup(total)
    assert Spectral(cut_at=0.01).warmup(10).steps == 2
    assert dataclasses.asdict(Spectral())["budget"] == 0.25
