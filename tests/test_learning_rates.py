"""Learning rates of a run: one schedule and optimiser over its stages, and the head's own rate."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs as tiny
from training_runs import interrupted, make_model, make_rows, outcome, run
from transformers import Trainer, TrainerCallback, TrainingArguments

import loradrop
from loradrop import LoRAConfig, fit
from loradrop.injection import injection_of, plan_of
from loradrop.methods import Method
from loradrop.optimizers import set_head_rate, unwrapped


class Rates(TrainerCallback):
    """What each step's optimiser holds: (number of elements, learning rate) of each group."""

    def __init__(self) -> None:
        self.seen: list[list[tuple[int, float]]] = []

    def on_step_begin(self, *given: Any, optimizer: Any, **more: Any) -> None:
        groups = [group for group in optimizer.param_groups if group["params"]]
        sizes = [sum(p.numel() for p in group["params"]) for group in groups]
        self.seen.append([(n, g["lr"]) for n, g in zip(sizes, groups, strict=True)])


@pytest.mark.parametrize("method", [loradrop.LoRADrop(budget=0.5), loradrop.Spectral(budget=0.5)])
def test_the_head_has_a_rate_of_its_own(method: Method, tmp_path: Path) -> None:
    model, rates = make_model(), Rates()
    args = replace(tiny.ARGS, learning_rate=1e-3, head_learning_rate=0.1, warmup_ratio=0.0)
    lora = LoRAConfig(r=4, target_modules=("query", "value"), method=method)
    fit(model, make_rows(), None, lora, args=args, output_dir=tmp_path, callbacks=[rates])
    head = sum(p.numel() for p in model.classifier.parameters())
    assert len(rates.seen) == tiny.TOTAL
    for groups in rates.seen:
        of_head = [(n, lr) for n, lr in groups if n < model.lora_bank.trainable]
        assert sum(n for n, _ in of_head) == head and len(of_head) < len(groups)
        (rate,) = {lr for _, lr in of_head}
        (other,) = {lr for n, lr in groups if (n, lr) not in of_head}
        assert rate == pytest.approx(100 * other)
    assert sum(n for n, _ in rates.seen[-1]) == model.lora_bank.trainable + head


class Knowledge(TrainerCallback):
    """Learning rates at each step; what the optimiser knows before one step and after another."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.known: list[dict[Any, dict[str, Any]]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        if Path(args.output_dir).name == "main" and state.global_step == 0:
            self.note(optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        self.note(optimizer)

    def note(self, optimizer: Any) -> None:
        state = unwrapped(optimizer).state
        self.known.append({p: copy.deepcopy(state[p]) for p in state})


KEEPING = replace(tiny.DROP, method=replace(tiny.DROP.method, after_select="continue"))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("config", [tiny.CONFIGS["spectral"], KEEPING, tiny.DROP, tiny.SETTLING])
def test_the_stages_have_one_schedule_and_one_optimiser(
    schedule: str, config: LoRAConfig, tmp_path: Path
) -> None:
    """The rates of plain LoRA over both stages; and what was known of the head, and of adapters but
    for those that begin anew, is known at the first step after the decision.
    """
    args = replace(tiny.ARGS, extra={"lr_scheduler_type": schedule}, warmup_ratio=0.25)
    plain_run, own, model = Knowledge(), Knowledge(), make_model()
    run(tmp_path / "lora", tiny.PLAIN, args, callbacks=[plain_run])
    run(tmp_path / "own", config, args, callbacks=[own], model=model)
    assert own.rates == pytest.approx(plain_run.rates) and len(own.rates) == tiny.TOTAL
    before, after, end = own.known
    steps = int(plan_of(model).warmup["steps"])
    for parameter in model.classifier.parameters():
        for name, value in before[parameter].items():
            assert torch.equal(after[parameter][name], value)
        assert float(end[parameter]["step"]) == tiny.TOTAL
    bank = model.lora_bank
    kept = {target.name for target in bank.targets} & {*bank.assignment.kept}
    if config in (tiny.DROP, tiny.SETTLING):
        kept = set()  # they begin anew, too
    for target, slot in zip(bank.targets, bank.slots, strict=True):
        for parameter in () if slot is None else bank.pairs[slot].factors():
            assert (parameter in after) == (target.name in kept)
            if target.name in kept:
                assert after[parameter]["exp_avg"].shape == parameter.shape
                assert after[parameter]["exp_avg"].any() and after[parameter]["step"] == steps


@pytest.mark.parametrize("name", ["drop", "spectral"])
def test_a_schedule_that_follows_evaluations_begins_with_them(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}
    found, args = Knowledge(), replace(tiny.ARGS, eval_every=4, warmup_ratio=0.0, extra=plateau)
    run(tmp_path, tiny.CONFIGS[name], args, callbacks=[found])
    assert found.rates[: tiny.WARMUP + 4] == [args.learning_rate] * (tiny.WARMUP + 4)
    assert "ReduceLROnPlateau, which cannot begin in its middle: it begins anew" in caplog.text


def test_what_cannot_be_cut_with_the_adapters_begins_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, model = Knowledge(), make_model()
    args = replace(tiny.ARGS, extra={"optim": "adafactor"})
    run(tmp_path, tiny.CONFIGS["spectral"], args, callbacks=[found], model=model)
    assert "Adafactor keeps 'exp_avg_sq_row' of each parameter, which cannot be cut" in caplog.text
    assert {*found.known[1]} == {*model.classifier.parameters()}


def test_an_optimiser_without_the_adapters_is_an_error(tmp_path: Path) -> None:
    model = make_model()
    loradrop.inject(model, tiny.PLAIN)
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none")
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-3)
    trainer = Trainer(
        model, args, train_dataset=make_rows(), optimizers=(optimizer, None),
        callbacks=[loradrop.LoraDropCallback()],
    )  # fmt: skip
    with pytest.raises(ValueError, match="the optimiser holds none of the adapters"):
        trainer.train()


def test_nothing_is_said_where_all_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, replace(tiny.DROP, modules_to_save=()), tiny.ARGS)
    assert "keeps nothing by parameter" not in caplog.text


@pytest.mark.parametrize("method", [loradrop.LoRADrop(budget=0.5), loradrop.Spectral(budget=0.5)])
def test_a_run_with_a_head_rate_resumes(method: Method, tmp_path: Path) -> None:
    args, config = replace(tiny.ARGS, head_learning_rate=0.05), replace(tiny.DROP, method=method)
    run(tmp_path / "whole", config, args)
    interrupted(tmp_path / "cut", "main", 9, config=config, args=args)
    run(tmp_path / "cut", config, args, resume=True)
    run(tmp_path / "without", config, tiny.ARGS)
    whole, cut, without = (outcome(tmp_path / n)["tensors"] for n in ("whole", "cut", "without"))
    assert cut == whole != without


def test_a_head_rate_without_a_head_in_fit() -> None:
    lora = LoRAConfig(r=2, target_modules=("query",), modules_to_save=())
    with pytest.raises(ValueError, match=r"head_learning_rate=0.5: nothing is trained whole"):
        fit(make_model(), make_rows(), None, lora, args=replace(tiny.ARGS, head_learning_rate=0.5))


def test_a_head_rate_without_a_head() -> None:
    model = make_model()
    bank = loradrop.inject(model, LoRAConfig(r=2, target_modules=("query",), modules_to_save=()))
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"head_learning_rate=0.5: nothing is trained whole"):
        set_head_rate(model, optimizer, 0.5)


@pytest.mark.parametrize("method", [loradrop.LoRADrop(budget=0.5), loradrop.Spectral(budget=0.5)])
def test_an_optimiser_of_ones_own_for_a_head(method: Method, tmp_path: Path) -> None:
    """In any Trainer, with the callback: both rates on both sides of the boundary."""
    model, rates = make_model(), Rates()
    loradrop.inject(model, LoRAConfig(r=4, target_modules=("query", "value"), method=method))
    groups = loradrop.parameter_groups(model, head_learning_rate=0.1)
    assert sum(p.numel() for p in groups[1]["params"]) == sum(
        p.numel() for p in model.classifier.parameters()
    )
    args = TrainingArguments(
        str(tmp_path), max_steps=12, use_cpu=True, disable_tqdm=True, report_to="none",
        lr_scheduler_type="constant", save_steps=10,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    callbacks = [loradrop.LoraDropCallback(), rates]
    trainer = Trainer(
        model, args, train_dataset=make_rows(), optimizers=(optimizer, None), callbacks=callbacks
    )
    trainer.train()
    assert len(rates.seen) == 12
    assert all([lr for _, lr in groups] == [1e-3, 0.1] for groups in rates.seen)
    assert rates.seen[-1][0][0] == model.lora_bank.trainable < rates.seen[0][0][0]
    end = {name: p.detach().clone() for name, p in model.named_parameters()}
    again = make_model()  # and resumed after the boundary
    loradrop.inject(again, injection_of(model).config)
    optimizer = torch.optim.AdamW(loradrop.parameter_groups(again, head_learning_rate=0.1), lr=1e-3)
    Trainer(
        again, args, train_dataset=make_rows(), optimizers=(optimizer, None),
        callbacks=[loradrop.LoraDropCallback()],
    ).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))  # fmt: skip
    assert all(torch.equal(p, end[name]) for name, p in again.named_parameters())
    loradrop.remove(model)
    loradrop.inject(model, LoRAConfig(r=2, target_modules=("query",), modules_to_save=()))
    with pytest.raises(ValueError, match=r"head_learning_rate=0.1: nothing is trained whole"):
        loradrop.parameter_groups(model, head_learning_rate=0.1)
