"""`fit` as people use it: short data, other arguments, odd models, and what it says of them."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_runs as tiny
from models import llama, words
from test_trainer_callback import trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from training_runs import At, falling, make_model, make_rows, run
from transformers import EarlyStoppingCallback, Seq2SeqTrainingArguments, TrainingArguments

import loradrop
from loradrop import LoRAConfig, LoraDropConfig, fit
from loradrop.injection import injection_of
from loradrop.native import read
from loradrop.scores import Scores
from loradrop.training.arguments import train_config, training_arguments
from loradrop.training.callbacks import MethodCallback
from loradrop.training.trainer import LoRATrainer

CONFIGS = {"lora": tiny.PLAIN, "lora_drop": tiny.DROP, "prilora": tiny.CONFIGS["prilora"]}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_target_that_is_never_called(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def adapted(folder: Path, **options: Any) -> Any:
        model = make_model()
        model.bert.spare = nn.Linear(32, 32)
        config = replace(CONFIGS[method], target_modules=["query", "spare"], **options)
        run(folder, config, model=model)
        return model

    with pytest.raises(RuntimeError, match=r"the forward of bert\.spare was never called"):
        adapted(tmp_path / "strict")
    model = adapted(tmp_path / "loose", strict=False)
    assert model.lora_bank.collector is None
    assert "the forward of bert.spare was never called so far" in caplog.text


@pytest.mark.parametrize("method", CONFIGS)
def test_layers_that_are_dropped_now_and_then(method: str, tmp_path: Path) -> None:
    """A layer that a step skips counts zero there, and is trained in the others."""
    model, calls = make_model(), list[int]()
    layer = model.bert.encoder.layer[1]
    forward = type(layer).forward

    class Dropped(type(layer)):  # type: ignore[misc]
        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return forward(self, x, *args, **kwargs) if len(calls) % 3 else x

    layer.__class__ = Dropped
    assert run(tmp_path, CONFIGS[method], model=model, dev=None).steps == tiny.TOTAL
    bank = model.lora_bank
    for kind in ("query", "value"):
        pair = bank.factors(bank.index(f"bert.encoder.layer.1.attention.self.{kind}"))
        assert pair is not None and pair[1].any()


def test_a_warmup_that_measured_nothing_frees_its_folder(tmp_path: Path) -> None:
    config, frozen = LoraDropConfig(**tiny.LORA, keep=1, probe_steps=4), make_model()
    loradrop.inject(frozen, config)
    for B in frozen.lora_bank.B:  # as where a loss scaler skips every step
        B.register_hook(torch.zeros_like)
    with pytest.raises(ValueError, match=r"4 steps left B at zero.*probe_steps"):
        run(tmp_path, config, model=frozen)
    longer = LoraDropConfig(**tiny.LORA, keep=1, probe_steps=5)
    plan = run(tmp_path, longer).plan
    assert plan.warmup is not None and plan.warmup["steps"] == 5


def test_a_run_that_fails_at_once_frees_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        run(tmp_path, replace(tiny.DROP, target_modules=["qeury"]))
    with pytest.raises(ValueError, match=r"train\.extra has no option 'optimm': .*'optim'"):
        run(tmp_path, args=replace(tiny.ARGS, extra={"optimm": "sgd"}))
    assert run(tmp_path).steps == tiny.TOTAL
    with pytest.raises(ValueError, match="holds a run already"):
        run(tmp_path)


@pytest.mark.parametrize(("total", "steps"), [(4, 3), (3, 2), (40, 4)])
def test_the_default_warmup_measures_and_halves(total: int, steps: int, tmp_path: Path) -> None:
    result = run(tmp_path, LoraDropConfig(**tiny.LORA), args=replace(tiny.ARGS, steps=total))
    assert result.plan.warmup is not None
    assert result.plan.warmup["steps"] == steps and result.steps == total
    assert result.parameters * 2 == result.plan.full_parameters


def test_too_few_steps_for_any_warmup(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a warm-up of 1 steps .*2 steps in all"):
        run(tmp_path, LoraDropConfig(**tiny.LORA), args=replace(tiny.ARGS, steps=2))


def test_a_decision_that_saves_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "all", LoraDropConfig(**tiny.LORA, keep=4, probe_steps=4))
    assert "nothing is saved: all 4 targets keep an adapter of their own" in caplog.text
    caplog.clear()
    one = tiny.LORA | {"target_modules": ["1.attention.self.query"]}
    plan = run(tmp_path / "one", LoraDropConfig(**one, probe_steps=4)).plan
    assert plan.kept == () and plan.parameters == plan.full_parameters
    assert "budget=0.5 is out of reach: one adapter per group takes 1 of LoRA's" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.1}, r"budget=0\.1 is out of reach: one adapter per group takes 0\.5 of"),
        ({"budget": 0.7, "share": "interval", "interval": 1}, "budget=0.7 .* takes 1 of"),
        ({"budget": 0.1}, r"Choose at least that as the budget"),
        ({"keep": 5}, "keep=5: choose a whole number from 0 to the 4 targets"),
    ],
)
def test_what_no_decision_could_meet_is_refused_before_the_warmup(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Also of the Trainer's callback, and of scores that are at hand."""
    config = LoraDropConfig(**tiny.LORA, **options, probe_steps=4)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, config)
    assert not any(tmp_path.rglob("checkpoint-*"))
    model = make_model()
    bank = loradrop.inject(model, config)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model, [loradrop.LoraDropCallback()]).train()
    scores = Scores(bank.targets, torch.ones(1, 4, dtype=torch.float64), 8, "offline")
    injection_of(model).scores = scores
    with pytest.raises(ValueError, match=message):
        loradrop.share(model)
    assert bank.slots == (0, 1, 2, 3)


def test_a_model_that_shares_already_needs_no_warmup(tmp_path: Path) -> None:
    model, config = make_model(), LoraDropConfig(**tiny.LORA, keep=1, probe_steps=10)
    loradrop.inject(model, config)
    loradrop.share(model, [])
    assert run(tmp_path, config, args=replace(tiny.ARGS, steps=8), model=model).steps == 8


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "q"}


@pytest.mark.parametrize("more", [{}, {"eval_strategy": "steps", "eval_steps": 4}])
def test_early_stopping_and_the_best_model(more: dict[str, Any], tmp_path: Path) -> None:
    """The first evaluation of the main run is the best, so it ends after two more."""
    model, args = make_model(), replace(tiny.ARGS, steps=60, eval_every=4, extra=BEST | more)
    metric = falling()
    result = fit(
        model, make_rows(), make_rows(16, 1), tiny.DROP, args=args, metric=metric,
        output_dir=tmp_path, callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    assert result.steps == tiny.WARMUP + 12 == max(entry["step"] for entry in result.history)
    best = read(tmp_path / "main" / "checkpoint-4")
    B = best.bank["B.0"]
    assert torch.equal(B, model.lora_bank.B[0]) and B.any()
    again = fit(
        make_model(), make_rows(), make_rows(16, 1), tiny.DROP, args=args, metric=metric,
        output_dir=tmp_path, callbacks=[EarlyStoppingCallback(2)], resume=True,
    )  # fmt: skip
    assert again.steps == result.steps  # it stopped, and does not train on
    assert torch.equal(read(tmp_path / "adapter").bank["B.0"], B)


def test_a_class_of_a_callback_does() -> None:
    args = replace(tiny.ARGS, eval_every=4, extra=BEST)
    result = fit(
        make_model(), make_rows(), make_rows(16, 1), tiny.DROP, args=args,
        metric=lambda _: {"q": 1.0}, callbacks=[EarlyStoppingCallback],
    )  # fmt: skip
    assert result.steps == tiny.WARMUP + 8 < tiny.TOTAL  # no better for one evaluation


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"max_steps": 30}, "train.extra has max_steps: give train.steps"),
        ({"num_train_epochs": 9}, "has num_train_epochs: give train.epochs"),
        ({"per_device_train_batch_size": 4}, "give train.batch_size"),
        ({"bf16": True}, "give train.precision"),
        ({"output_dir": "x"}, "train.extra has output_dir: give fit output_dir="),
        ({"save_only_model": True}, "save_only_model=True keeps no optimiser"),
        ({"auto_find_batch_size": True}, r"steps fit counts.*train\.gradient_accumulation"),
        ({"resume_from_checkpoint": "x"}, "give fit resume=True with the output_dir="),
        ({"eval_strategy": "epoch"}, "eval_strategy='epoch' needs rows to evaluate on: give dev="),
    ],
)
def test_extra_options_that_fit_has_itself(
    extra: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", args=replace(tiny.ARGS, extra=extra), dev=None)
    assert not (tmp_path / "run" / "warmup").exists()  # before anything was trained


def test_no_norm_clips_nothing() -> None:
    def losses(norm: float | None) -> list[float]:
        args = replace(tiny.ARGS, steps=4, log_every=1, max_grad_norm=norm)
        history = fit(make_model(), make_rows(), None, tiny.PLAIN, args=args).history
        return [entry["loss"] for entry in history]

    assert losses(None) == losses(0.0) == losses(1e9) != losses(1e-9)


def test_the_best_model_needs_a_checkpoint(tmp_path: Path) -> None:
    """Checked for the steps after the warm-up, before it."""
    args = replace(tiny.ARGS, eval_every=2, save_every=tiny.TOTAL - tiny.WARMUP + 2, extra=BEST)
    with pytest.raises(ValueError, match=r"save_every=16 makes none in a run of 14 steps"):
        run(tmp_path / "run", args=args)
    assert not (tmp_path / "run" / "warmup").exists()
    late = replace(args, save_every=tiny.TOTAL - tiny.WARMUP)
    assert run(tmp_path / "run", args=replace(late, extra={"load_best_model_at_end": True})).metrics


def test_the_last_rows_of_a_pass_can_be_dropped(tmp_path: Path) -> None:
    """44 rows are 5 whole batches of 8, so two passes are 10 steps, with the boundary in one."""
    extra = {"dataloader_drop_last": True}
    args = replace(tiny.ARGS, steps=None, epochs=2.0, extra=extra)
    assert run(tmp_path / "two", args=args).steps == 10
    with pytest.raises(ValueError, match=r"has 44 rows, and dataloader_drop_last .*below 45"):
        run(tmp_path / "none", args=replace(args, batch_size=45))


NAME = "dataloader_drop_last"


def test_no_row_is_dropped_where_nothing_is_trained(tmp_path: Path) -> None:
    """Dev has 16 rows and the offline probe 44; a batch of either has up to 48."""
    args = replace(tiny.ARGS, batch_size=24, steps=12)
    found = [
        run(tmp_path / str(dropped), tiny.OFFLINE, replace(args, extra={NAME: dropped})).plan.scores
        for dropped in (False, True)
    ]
    assert found[0] is not None and found[1] is not None
    assert found[0]["tokens"] == found[1]["tokens"]
    dropping = replace(args, extra={NAME: True})
    assert "accuracy" in run(tmp_path / "dev", tiny.PLAIN, dropping).metrics


@pytest.mark.parametrize("form", [list, torch.tensor])
def test_rows_of_different_lengths_need_a_tokenizer(form: Any) -> None:
    rows = [
        {"input_ids": form([2] * n), "attention_mask": form([1] * n), "labels": 0}
        for n in (5, 10) * 8
    ]
    for train, dev in ((rows, None), (rows[1::2], rows)):
        with pytest.raises(ValueError, match=r"length of 'input_ids' .*processing_class=tokenizer"):
            fit(make_model(), train, dev, tiny.PLAIN, args=replace(tiny.ARGS, steps=2))
    collate = pad_sequences
    fit(make_model(), rows, None, tiny.PLAIN, args=replace(tiny.ARGS, steps=2), collate=collate)


def pad_sequences(rows: Any) -> dict[str, torch.Tensor]:
    found = {"labels": torch.tensor([row["labels"] for row in rows])}
    for name in ("input_ids", "attention_mask"):
        parts = [torch.as_tensor(row[name]) for row in rows]
        found[name] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return found


@pytest.mark.parametrize("every", [3, 0.2, None])
def test_the_best_model_is_measured_at_every_checkpoint(every: float | None) -> None:
    args = replace(tiny.ARGS, eval_every=every, extra={"load_best_model_at_end": True})
    with pytest.raises(ValueError, match=r"train\.save_every=4 .*multiple of train\.eval_every="):
        fit(make_model(), make_rows(), make_rows(16, 1), tiny.PLAIN, args=args)


def test_dev_can_be_several_loaders(tmp_path: Path) -> None:
    loaders = {name: DataLoader(make_rows(16, i), batch_size=8) for i, name in enumerate("ab")}
    metrics = run(tmp_path, tiny.PLAIN, dev=loaders).metrics
    assert {"a_accuracy", "b_accuracy"} <= metrics.keys()
    assert metrics["a_loss"] != metrics["b_loss"]


@pytest.mark.parametrize("callback", [loradrop.LoraDropCallback(), loradrop.LoraDropCallback])
def test_the_callback_of_other_trainers_is_refused(callback: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="callbacks has a LoraDropCallback, which fit has itself"):
        run(tmp_path, callbacks=[callback])
    assert list(tmp_path.iterdir()) == []


def test_a_run_after_one_that_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It frees the folder where there is no checkpoint, and what goes on from what is said."""
    model = make_model()

    def fail() -> None:
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        run(tmp_path, tiny.PLAIN, model=model, callbacks=[At("main", 3, fail)])
    assert "going on from" not in caplog.text
    with torch.no_grad():
        model.lora_bank.B[1].fill_(float("inf"))
    with pytest.raises(ValueError, match=r"adapters are not finite.*loradrop\.remove\(model\)"):
        run(tmp_path, tiny.PLAIN, model=model)
    with torch.no_grad():
        model.lora_bank.B[1].zero_()
    assert run(tmp_path, tiny.PLAIN, model=model).steps == tiny.TOTAL
    assert "going on from the adapters that a run before this one trained" in caplog.text


def test_options_that_are_not_plain_data(tmp_path: Path) -> None:
    args = replace(tiny.ARGS, extra={"run_name": tmp_path / "name"})
    first = run(tmp_path / "run", tiny.PLAIN, args)
    assert run(tmp_path / "run", tiny.PLAIN, args, resume=True).metrics == first.metrics


def test_arguments_of_another_trainer_are_named(tmp_path: Path) -> None:
    args = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match=r"a Seq2SeqTrainingArguments, .*LoraDropCallback"):
        fit(make_model(), make_rows(), None, tiny.DROP, args=args)


def test_tokens_of_the_hub_are_not_written(tmp_path: Path) -> None:
    run(tmp_path, args=replace(tiny.ARGS, extra={"hub_token": "hf_SECRET"}))
    written = [file for file in tmp_path.rglob("*.json") if "hf_SECRET" in file.read_text()]
    assert not written


def test_training_arguments_mean_what_they_say(tmp_path: Path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, learning_rate=0.01, lr_scheduler_type="cosine",
        warmup_steps=2, logging_steps=1, save_steps=50, seed=5, use_cpu=True, report_to="none",
    )  # fmt: skip
    found = train_config(args)
    own = {"per_device_eval_batch_size": 8, "save_total_limit": None, "use_cpu": True}
    assert found.extra == {"lr_scheduler_type": "cosine", "warmup_steps": 2, **own}
    main = training_arguments(found, tmp_path, 10, warm_up=False, has_dev=False)
    for name in ("num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type", "seed"):
        if name != "num_train_epochs":  # both stages count steps
            assert getattr(main, name) == getattr(args, name)
    assert main.get_warmup_steps(10) == 2
    warm = training_arguments(found, tmp_path, 3, total=10, warm_up=True, has_dev=False)
    assert warm.warmup_steps == 2 and warm.lr_scheduler_type == "cosine"  # one schedule for both
    short = training_arguments(tiny.ARGS, tmp_path, 10, warm_up=False, has_dev=False)
    assert short.warmup_steps == 0  # the first step of one has rate 0
    part = training_arguments(tiny.ARGS, tmp_path, 10, total=50, warm_up=False, has_dev=False)
    assert part.warmup_steps == 3
    result = fit(make_model(), make_rows(), None, tiny.DROP, args=args)
    assert result.steps == 12 and (tmp_path / "adapter").is_dir()


def test_a_tokenizer_pads() -> None:
    rows = [{"input_ids": [5] * (3 + i % 4), "labels": i % 3} for i in range(24)]
    config = LoraDropConfig(**tiny.LORA, keep=1, probe_steps=3)
    args = replace(tiny.ARGS, steps=6, batch_size=8)
    result = fit(make_model(), rows, None, config, args=args, processing_class=words())
    assert result.plan.scores is not None and result.plan.scores["tokens"] == 3 * 2 * (
        3 + 4 + 5 + 6
    )


def test_a_mask_of_ones_own() -> None:
    def counted(args: Any = tiny.ARGS, **options: Any) -> float:
        config = LoraDropConfig(**tiny.LORA, keep=1, probe_steps=6, source="offline")
        plan = fit(make_model(), make_rows(), None, config, args=args, **options).plan
        assert plan.scores is not None
        return float(plan.scores["values"]["bert.encoder.layer.0.attention.self.query"])

    every = counted(mask=None)
    assert counted(replace(tiny.ARGS, mask=None)) == every > counted()
    assert counted(mask_fn=lambda name, x, mask: None) == every


def test_labels_that_count_nowhere_are_named() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3} for _ in range(16)]
    config = LoRAConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"no label counts in the batch of step 1.*-100"):
        fit(llama(), rows, None, config, args=tiny.ARGS)


class Stream(IterableDataset[Any]):
    """Rows one after another, with a length."""

    def __len__(self) -> int:
        return tiny.ROWS

    def __iter__(self) -> Any:
        return iter(make_rows())


@pytest.mark.parametrize("train", [Stream(), set(range(8)), {"a": make_rows()}.values()])
def test_train_that_has_no_first_row(train: Any) -> None:
    kind = type(train).__name__
    with pytest.raises(ValueError, match=rf"train is a {kind}, .* not train\[0\] .*DataLoader of"):
        fit(make_model(), train, None, tiny.PLAIN, args=tiny.ARGS)


def test_a_loader_of_a_stream(tmp_path: Path) -> None:
    run(tmp_path, args=replace(tiny.ARGS, steps=10), train=DataLoader(Stream(), batch_size=8))


def test_labels_that_are_text_are_named() -> None:
    rows = [row | {"labels": "good"} for row in make_rows(8)]
    with pytest.raises(ValueError, match=r"'labels' holds text \('good'\).*class indices"):
        fit(make_model(), rows, None, tiny.PLAIN, args=tiny.ARGS)


def test_one_of_several_gpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = training_arguments(tiny.ARGS, tmp_path, 2, warm_up=False, has_dev=False)
    arguments._n_gpu = 4
    model = make_model()
    loradrop.inject(model, tiny.PLAIN)
    with caplog.at_level(logging.WARNING, "loradrop"):
        LoRATrainer(model, arguments, events=MethodCallback(model), train_dataset=make_rows())
    assert arguments.n_gpu == 1 and "torchrun --nproc_per_node 4" in caplog.text


def test_reentrant_checkpointing_in_several_processes_is_refused() -> None:
    """DDP would give a shared adapter wrong gradients, without an error."""
    model = make_model()
    loradrop.inject(model, tiny.PLAIN)
    kind: Any = {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "world_size": 2}
    arguments: Any = SimpleNamespace(gradient_checkpointing=True, **kind)
    with pytest.raises(ValueError, match=r"wrong gradients.*pass use_reentrant=False"):
        LoRATrainer(model, arguments, events=MethodCallback(model), train_dataset=make_rows())


@pytest.mark.parametrize("trainable", [True, False])
def test_a_quantised_base(trainable: bool, tmp_path: Path) -> None:
    """The Trainer takes one that can be trained, as with PEFT's adapters on it."""
    model: Any = make_model()
    quantization = SimpleNamespace(quant_method="fake")
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(
        is_trainable=trainable, is_qat_trainable=False, quantization_config=quantization
    )
    if trainable:
        assert run(tmp_path, model=model).steps == tiny.TOTAL
        assert not getattr(model, "_hf_peft_config_loaded", False)
    else:
        with pytest.raises(ValueError, match="quantized"):
            run(tmp_path, model=model)


def test_one_logger_by_its_name(tmp_path: Path) -> None:
    assert loradrop.TrainConfig(report_to="tensorboard").report_to == ("tensorboard",)
    quiet = loradrop.TrainConfig(report_to="none")
    made = training_arguments(quiet, tmp_path, 2, warm_up=False, has_dev=False)
    assert made.report_to == []
