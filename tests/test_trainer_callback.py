"""Any Trainer: LoRA-drop in one run by a callback, and checkpoints that bring adapters back."""

import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
import training_runs as tiny
from safetensors.torch import load_file
from trainer_cases import DROP, STEPS, WARM, injected, tensors, trainer
from training_runs import At, StopError, equal, falling, make_model, make_rows, stop
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import HPSearchBackend

import loradrop
from loradrop import LoRAConfig, LoraDropConfig
from loradrop.injection import plan_of
from loradrop.methods import LoRADrop, Spectral
from loradrop.methods.prilora import PRILoRA
from loradrop.probing import require_drawable
from loradrop.training.callbacks import MethodCallback


def test_a_method_that_acts_at_every_step_goes_on_after_a_cut(tmp_path: Path) -> None:
    model = injected(LoRAConfig(**tiny.LORA, method=PRILoRA(prune_every=3)))
    ranks = {target.name: target.r // 2 for target in model.lora_bank.targets}
    loradrop.truncate(model, ranks, metric="weight")
    trainer(tmp_path, model, [loradrop.LoraDropCallback()]).train()
    assert model.lora_bank.pruned(0).any()
    assert model.lora_bank.input_norm(0).all()


def test_two_callbacks_are_one_too_many(tmp_path: Path) -> None:
    callbacks = [loradrop.LoraDropCallback(), loradrop.LoraDropCallback()]
    with pytest.raises(ValueError, match="the Trainer has two LoraDropCallbacks: give it one"):
        trainer(tmp_path, injected(), callbacks).train()


def test_reentrant_checkpointing_in_several_processes_is_refused() -> None:
    """Also where all is decided: DDP would give what layers share wrong gradients."""
    model = injected()
    loradrop.share(model, [])
    kind: Any = {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "world_size": 2}
    args: Any = SimpleNamespace(gradient_checkpointing=True, fsdp=None, deepspeed=None, **kind)
    with pytest.raises(ValueError, match=r"wrong gradients.*pass use_reentrant=False"):
        loradrop.LoraDropCallback().on_train_begin(args, TrainerState(), None, model=model)


def test_a_callback_that_comes_late_says_how_to_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A Trainer tells only those that it is made with that it is there."""
    trainer(tmp_path / "early", injected(), [loradrop.LoraDropCallback()], max_steps=5).train()
    assert "callbacks=[" not in caplog.text
    run = trainer(tmp_path, injected(), max_steps=8)
    run.add_callback(loradrop.LoraDropCallback())
    run.train()
    assert "with model= and callbacks=[loradrop.LoraDropCallback()]" in caplog.text
    model = injected()
    run = trainer(tmp_path, model)
    run.add_callback(loradrop.LoraDropCallback())
    with pytest.raises(RuntimeError, match=r"other layers share.*callbacks=\[.*not add_callback"):
        run.train(resume_from_checkpoint=True)
    trainer(tmp_path, model, [loradrop.LoraDropCallback()]).train(resume_from_checkpoint=True)
    assert model.lora_bank.assignment.shares


class Note(TrainerCallback):
    """The learning rate of each step, as a part of the highest."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"] / 1e-2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder, model = tmp_path_factory.mktemp("whole"), injected()
    trainer(folder, model, [loradrop.LoraDropCallback()]).train()
    return folder, model


def test_the_whole_method_in_one_run(whole: tuple[Path, Any]) -> None:
    folder, model = whole
    bank, plan = model.lora_bank, plan_of(model)
    assert bank.assignment.adapters == 3 and len(bank.assignment.kept) == 1
    assert plan.warmup["steps"] == WARM and plan.scores["rows"] == WARM
    assert all(B.any() for B in bank.B)
    assert all(p.requires_grad for p in bank.parameters())
    assert loradrop.select(scores_of(plan), keep=1) == list(plan.kept)
    loaded = make_model()
    loradrop.load(loaded, folder / f"checkpoint-{STEPS}")
    assert equal(tensors(loaded), tensors(model)) and plan_of(loaded).warmup == plan.warmup


def scores_of(plan: Any) -> loradrop.Scores:
    rows = torch.tensor([list(plan.scores["values"].values())], dtype=torch.float64)
    return loradrop.Scores(plan.targets, rows, plan.scores["tokens"], "online")


def test_the_schedule_goes_on(whole: tuple[Path, Any]) -> None:
    """Two steps up, then down to zero; and of adapters that began anew the optimiser knows what
    came after that.
    """
    model, note = injected(), Note()
    run = trainer(whole[0].parent / "rates", model, [loradrop.LoraDropCallback(), note])
    run.train()
    assert note.rates == pytest.approx([0.0, 0.5, *(1 - k / (STEPS - 2) for k in range(STEPS - 2))])
    known = run.optimizer.state
    assert {float(known[p]["step"]) for p in model.lora_bank.parameters()} == {STEPS - WARM}
    assert {float(known[p]["step"]) for p in model.classifier.parameters()} == {STEPS}
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("step", [3, 5, 9])
def test_resumed_to_the_same_end(step: int, whole: tuple[Path, Any], tmp_path: Path) -> None:
    """On either side of the boundary, in a new process as it were."""
    with pytest.raises(StopError):
        stopping = At(tmp_path.name, step, stop)
        trainer(tmp_path, injected(), [loradrop.LoraDropCallback(), stopping]).train()
    model = injected()
    run = trainer(tmp_path, model, [loradrop.LoraDropCallback()])
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == STEPS
    assert equal(tensors(model), tensors(whole[1]))
    assert plan_of(model).scores == plan_of(whole[1]).scores


# transformers saves before step 3's weights change, after, before step 4, after an epoch, and
# before the decision after step 4, which the resumed run makes a step later.
STOPS = [
    ("on_step_begin", 2, WARM),
    ("on_optimizer_step", 2, WARM),
    ("on_step_end", 3, WARM),
    ("on_step_end", 6, WARM),
    ("on_optimizer_step", 3, WARM + 1),
]


@pytest.mark.parametrize(("event", "step", "decides"), STOPS)
def test_stopped_by_a_signal_and_resumed(
    event: str, step: int, decides: int, whole: tuple[Path, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Nothing that was measured is lost, and the plan is there after the decision, too."""
    tiny.take_signals_at_once(monkeypatch)
    options = {"save_steps": 50, "enable_jit_checkpoint": True}
    stopping = tiny.Stops(tmp_path.name, event, step)
    trainer(tmp_path, injected(), [loradrop.LoraDropCallback(), stopping], **options).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    caplog.clear()
    model, loras = injected(), [loradrop.LoraDropCallback()]
    trainer(tmp_path, model, loras, **options).train(resume_from_checkpoint=True)
    assert "events.json" not in caplog.text
    found, expected = plan_of(model), plan_of(whole[1])
    assert found.warmup["steps"] == found.scores["rows"] == decides
    if decides == WARM:
        assert found.scores["tokens"] == expected.scores["tokens"]
        # What dropout draws goes on from where the step was that transformers makes again.
        assert equal(tensors(model), tensors(whole[1])) == (event != "on_step_begin")


def test_the_plan_is_there_where_the_statistics_are_not(
    whole: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "loradrop_adapter" / "events.json").unlink()
    model = injected()
    trainer(tmp_path, model, [loradrop.LoraDropCallback()]).train(resume_from_checkpoint=True)
    assert "events.json is not there: the statistics count from here on" in caplog.text
    assert plan_of(model).scores == plan_of(whole[1]).scores


@pytest.mark.parametrize("config", [DROP, tiny.PLAIN])
def test_resuming_at_another_scale_is_refused(config: LoRAConfig, tmp_path: Path) -> None:
    """The checkpoint's plan is saved with the adapters, and these compute by the model's scale."""
    callbacks = [loradrop.LoraDropCallback(), At(tmp_path.name, 6, stop)]
    with pytest.raises(StopError):
        trainer(tmp_path, injected(config), callbacks).train()
    model = injected(replace(config, lora_alpha=4 * config.lora_alpha))
    with pytest.raises(ValueError, match=r"loradrop_adapter was trained with another scale"):
        trainer(tmp_path, model, [loradrop.LoraDropCallback()]).train(resume_from_checkpoint=True)


def test_what_is_merged_for_now_does_not_train(tmp_path: Path) -> None:
    """Neither here nor in `fit`, which would end with targets that were never called."""
    model = injected()
    loradrop.merge(model, keep_original=True)
    said = r"merged into the weights.*loradrop\.save them first, and loradrop\.load them afterwards"
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, model, [loradrop.LoraDropCallback()]).train()
    with pytest.raises(ValueError, match=said):
        loradrop.fit(model, make_rows(), None, None, output_dir=tmp_path / "fit")
    loradrop.save(model, tmp_path / "saved")  # as it says
    loradrop.remove(model)
    loradrop.load(model, tmp_path / "saved")
    trainer(tmp_path, model, [loradrop.LoraDropCallback()], max_steps=6).train()


def test_a_trainer_that_has_decided_does_not_go_back(
    whole: tuple[Path, Any], tmp_path: Path
) -> None:
    """As in a notebook, after an interruption before there is a checkpoint of the decision."""
    model, stopping = injected(), At(tmp_path.name, 5, stop)
    run = trainer(tmp_path, model, [loradrop.LoraDropCallback(), stopping], save_steps=3)
    with pytest.raises(StopError):
        run.train()
    assert model.lora_bank.assignment.decided
    with pytest.raises(RuntimeError, match="make a new Trainer with this model, and resume with"):
        run.train(resume_from_checkpoint=True)
    trainer(tmp_path, model, [loradrop.LoraDropCallback()]).train(resume_from_checkpoint=True)
    assert equal(tensors(model), tensors(whole[1]))


@pytest.mark.parametrize("beside", ["nothing", "another run"])
def test_resumed_from_a_checkpoint_elsewhere(
    beside: str, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    """The Trainer does not tell which one, so it is found by what it logged, or asked for."""
    with pytest.raises(StopError):
        stopping = At("first", 3, stop)
        trainer(tmp_path / "first", injected(), [loradrop.LoraDropCallback(), stopping]).train()
    here, there = tmp_path / "second", str(tmp_path / "first" / "checkpoint-2")
    if beside == "another run":
        with pytest.raises(StopError):
            stopping = At("second", 3, stop)
            other = trainer(here, injected(), [loradrop.LoraDropCallback(), stopping], seed=7)
            other.train()
    with pytest.raises(ValueError, match=r"name it in TrainingArguments\(resume_from_checkpoint"):
        trainer(here, injected(), [loradrop.LoraDropCallback()]).train(there)
    model = injected()
    named = {"resume_from_checkpoint": there}
    trainer(here, model, [loradrop.LoraDropCallback()], **named).train(there)
    assert equal(tensors(model), tensors(whole[1]))
    assert plan_of(model).scores == plan_of(whole[1]).scores


@pytest.mark.parametrize("name", ["run-{}", "grid/{}", "{elsewhere}/{}"])
def test_each_trial_of_a_search_has_its_own_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where two log the same, and NaN; one outside of output_dir is not found: it has none."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: {})
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    args = trainer(out, injected(), max_steps=6, save_steps=3).args
    callbacks = [loradrop.LoraDropCallback(), LogsNan()]
    init = partial(injected, DROP)  # a function of one argument is given the trial
    run = Trainer(model_init=init, args=args, train_dataset=make_rows(), callbacks=callbacks)
    run.hp_search_backend, run.hp_space = HPSearchBackend.OPTUNA, lambda trial: {}
    run.hp_name = lambda trial: name.format(trial.number, elsewhere=elsewhere)
    for number in range(2):
        run.train(trial=SimpleNamespace(number=number, params={}))
    found = {str(file.parents[1].relative_to(out)) for file in out.rglob("events.json")}
    trials = [] if "elsewhere" in name else [name.format(number) for number in range(2)]
    assert found == {f"{trial}/checkpoint-{step}" for trial in trials for step in (3, 6)}
    assert not any(out.glob("checkpoint-*"))


class LogsNan(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history.append({"q": float("nan"), "step": state.global_step})


def test_the_events_alone_collect_what_the_method_asks_for(tmp_path: Path) -> None:
    model = injected(tiny.CONFIGS["prilora"])
    trainer(tmp_path, model, [MethodCallback(model)]).train()
    assert model.lora_bank.input_norm(0).all() and model.lora_bank.pruned(0).any()


@pytest.mark.parametrize("kind", [MethodCallback, loradrop.LoraDropCallback])
def test_a_try_that_was_given_up_collects_no_more(kind: Any, tmp_path: Path) -> None:
    model, tries = injected(tiny.PLAIN), iter([True])

    def full() -> None:
        if next(tries, False):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    own = kind(model, statistics=["sqnorm"]) if kind is MethodCallback else kind()
    callbacks = [own, At(tmp_path.name, 3, full)]
    run = trainer(tmp_path, model, callbacks, max_steps=5, auto_find_batch_size=True)
    assert run.train().global_step == 5
    assert run.state.train_batch_size < 8
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert model.lora_bank.collector is None


def test_a_stream_cannot_be_measured_offline(tmp_path: Path) -> None:
    """Said before the first step."""
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(make_rows()).to_iterable_dataset()
    model = injected(LoRAConfig(**tiny.LORA, method=Spectral(cut_at=WARM)))
    run = trainer(tmp_path, model, [loradrop.LoraDropCallback()])
    run.train_dataset = stream
    with pytest.raises(ValueError, match=r'IterableDataset has no rows .*source="online"'):
        run.train()
    assert run.state.global_step == 0
    model = injected(LoRAConfig(**tiny.LORA, method=Spectral(cut_at=WARM, source="online")))
    run = trainer(tmp_path, model, [loradrop.LoraDropCallback()])
    run.train_dataset = stream
    assert run.train().global_step == STEPS


@pytest.mark.parametrize("face", ["fit", "callback"])
def test_a_model_without_logits_cannot_be_measured_offline(face: str, tmp_path: Path) -> None:
    """Said before the first step."""
    with pytest.raises(ValueError, match=r"no logits .*: choose source='online'"):
        without_logits(face, "offline", tmp_path)
    without_logits(face, "online", tmp_path / "online")


def without_logits(face: str, source: str, folder: Path) -> None:
    """A run of a model that returns its loss alone."""
    config = LoRAConfig(**tiny.LORA, method=Spectral(cut_at=WARM, source=source))
    model: Any = tiny.make_model()
    model.register_forward_hook(lambda model, args, out: type(out)(loss=out.loss))
    steps: list[int] = []
    note = CountsSteps(steps)
    try:
        if face == "fit":
            args = replace(tiny.ARGS, steps=STEPS)
            tiny.run(folder, config, args, model=model, dev=None, callbacks=[note])
        else:
            loradrop.inject(model, config)
            trainer(folder, model, [loradrop.LoraDropCallback(), note]).train()
    except ValueError:
        assert not steps
        raise
    assert len(steps) == STEPS


class CountsSteps(TrainerCallback):
    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(state.global_step)


def test_the_try_before_the_first_step_draws_nothing() -> None:
    model = injected(LoRAConfig(**tiny.LORA, method=Spectral(cut_at=WARM)))
    before = torch.random.get_rng_state(), random.getstate()
    require_drawable(model, make_rows(), default_data_collator)
    assert torch.equal(torch.random.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert model.training and model.lora_bank.collector is None


def test_a_run_that_stops_in_its_warmup_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = injected()
    run = trainer(tmp_path, model, [loradrop.LoraDropCallback(), Ends()])
    run.train()
    assert not model.lora_bank.assignment.decided
    assert "ended at step 2, in the warm-up of 4 steps: nothing is decided" in caplog.text


class Ends(TrainerCallback):
    """Stops the run at its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_the_spectral_method_in_one_run(tmp_path: Path) -> None:
    """It cuts in place, trains what is left, and resumes on either side to the same end."""
    lora = LoRAConfig(**tiny.LORA, method=Spectral(cut_at=WARM))
    model, note = injected(lora), Note()
    run = trainer(tmp_path / "whole", model, [loradrop.LoraDropCallback(), note])
    run.train()
    assert note.rates == pytest.approx([0.0, 0.5, *(1 - k / 12 for k in range(STEPS - 2))])
    assert {float(known["step"]) for known in run.optimizer.state.values()} == {STEPS}
    bank, plan = model.lora_bank, plan_of(model)
    assert plan.scores["source"] == "offline" and plan.cut["compensated"] <= plan.cut["loss"]
    assert bank.trainable <= 0.25 * bank.nominal < plan.full_parameters / 4
    assert plan.cut["ranks"] == {
        t.name: 0 if s is None else t.r for t, s in zip(bank.targets, bank.slots, strict=True)
    }
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    for step in (3, 6):
        folder = tmp_path / str(step)
        with pytest.raises(StopError):
            stopping = At(folder.name, step, stop)
            trainer(folder, injected(lora), [loradrop.LoraDropCallback(), stopping]).train()
        again = injected(lora)
        trainer(folder, again, [loradrop.LoraDropCallback()]).train(resume_from_checkpoint=True)
        assert equal(tensors(again), tensors(model))
        assert again.lora_bank.targets == bank.targets


def test_spectral_without_moments_to_project(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = injected(LoRAConfig(**tiny.LORA, method=Spectral(cut_at=WARM)))
    run = trainer(tmp_path, model, [loradrop.LoraDropCallback()], optim="adafactor")
    run.train()
    assert "Adafactor keeps 'exp_avg_sq_row' of each parameter, which cannot be cut" in caplog.text
    known = run.optimizer.optimizer.state
    assert {known[p]["step"] for p in model.lora_bank.parameters()} == {STEPS - WARM}
    assert {known[p]["step"] for p in model.classifier.parameters()} == {STEPS}


def test_the_best_model_is_one_of_the_second_part(tmp_path: Path) -> None:
    """Before it, nothing is shared yet."""
    model = injected()
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, save_steps=2, eval_steps=2, report_to="none",
        eval_strategy="steps", load_best_model_at_end=True, metric_for_best_model="q",
        per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    run = Trainer(
        model, args, train_dataset=make_rows(), eval_dataset=make_rows(16, 1),
        compute_metrics=falling(),
        callbacks=[loradrop.LoraDropCallback(), EarlyStoppingCallback(2)],
    )  # fmt: skip
    run.train()
    best = str(run.state.best_model_checkpoint)
    assert best.endswith(f"checkpoint-{WARM}") and run.state.global_step == WARM + 4
    loaded = make_model()
    loradrop.load(loaded, best)
    assert equal(tensors(loaded), tensors(model)) and model.lora_bank.assignment.shares


def test_a_checkpoint_holds_what_is_trained_alone(whole: tuple[Path, Any]) -> None:
    folder = whole[0] / f"checkpoint-{STEPS}"
    names = set(load_file(folder / "model.safetensors"))
    frozen = {k for k, p in make_model().named_parameters()} - {
        "classifier.weight",
        "classifier.bias",
    }
    assert not names & frozen and {"classifier.weight", "lora_bank.pairs.0.A"} <= names
    assert not (folder / "config.json").exists()  # nothing that would pass for the whole model


def test_a_folder_for_others_says_where_the_adapters_are(
    whole: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, whole[1], [loradrop.LoraDropCallback()])
    run.save_model(str(tmp_path / "final"))
    assert "lacks them until loradrop.load(model, " in caplog.text
    model = BertForSequenceClassification.from_pretrained(tmp_path / "final")
    loradrop.load(model, tmp_path / "final")
    assert equal(tensors(model), tensors(whole[1]))


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        (LoRADrop(sample_ratio=0.5), {}, "sample_ratio below 1"),
        (LoRADrop(source="offline"), {}, "need a run of their own"),
        (LoRADrop(), {"max_steps": 2}, "measures nothing"),
    ],
)
def test_what_needs_fit_is_said_at_the_start(
    method: LoRADrop, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = injected(LoRAConfig(**tiny.LORA, method=method))
    with pytest.raises(ValueError, match=reason):
        trainer(tmp_path, model, [loradrop.LoraDropCallback()], **options).train()


def test_a_target_that_is_never_called_is_named_before_the_decision(tmp_path: Path) -> None:
    model = make_model()
    model.bert.spare = torch.nn.Linear(32, 32)
    options = tiny.LORA | {"target_modules": ["query", "spare"]}
    loradrop.inject(model, LoraDropConfig(**options, keep=1, probe_steps=WARM))
    with pytest.raises(RuntimeError, match=r"bert\.spare was never called"):
        trainer(tmp_path, model, [loradrop.LoraDropCallback()], save_strategy="no").train()
    assert not model.lora_bank.assignment.decided


def test_sharing_keeps_the_parameters_that_an_optimiser_holds() -> None:
    model = injected(tiny.PLAIN)
    before = {id(p) for p in model.lora_bank.parameters()}
    loradrop.share(model, [model.lora_bank.targets[0].name])
    assert {id(p) for p in model.lora_bank.parameters()} < before


def test_in_trl(tmp_path: Path) -> None:
    """Its own rows, collator and checkpoints; resumed before and after the boundary."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": [3 + i % 7, 5, 6, 8 + i % 5, 9][: 3 + i % 3]} for i in range(48)]

    def run(resume: str | None = None) -> Any:
        model = models.llama()
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "probe_steps": WARM}
        loradrop.inject(model, LoraDropConfig(**options))
        args = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=STEPS, save_steps=2, report_to="none",
            per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trained = trl.SFTTrainer(
            model, args, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=models.words(), callbacks=[loradrop.LoraDropCallback()],
        )  # fmt: skip
        trained.train(resume_from_checkpoint=resume)
        return model

    whole = run()
    assert whole.lora_bank.assignment.shares
    for step in (2, 8):
        assert equal(tensors(run(str(tmp_path / f"checkpoint-{step}"))), tensors(whole))
