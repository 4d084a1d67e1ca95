"""What a run of training does: its stages, its scores, its data, its precision, its seams."""

import pickle
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import training_runs as tiny
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from training_runs import At, interrupted, make_model, make_rows, outcome, run
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import loradrop
from loradrop import LoRAConfig, LoraDropConfig, TrainConfig, fit
from loradrop.injection import injection_of
from loradrop.methods import Method
from loradrop.methods.base import Warmup
from loradrop.statistics.collector import GRAMS
from loradrop.training import arguments as arguments_module
from loradrop.training.callbacks import MethodCallback
from loradrop.training.checkpoints import last_checkpoint
from loradrop.training.fit import warm_up


def test_loss_falls(tmp_path: Path) -> None:
    result = run(tmp_path, args=replace(tiny.ARGS, steps=60), dev=make_rows())
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert result.metrics["accuracy"] > 0.6  # one label for all is right for half of the rows
    assert result.metrics["loss"] < losses[0]


def test_same_seed_same_result(whole: Path, tmp_path: Path) -> None:
    model = make_model()
    torch.manual_seed(99)  # the run's own seed counts, from the first adapter on
    run(tmp_path / "same", model=model)
    assert outcome(tmp_path / "same") == outcome(whole)
    run(tmp_path / "other", args=replace(tiny.ARGS, seed=1))
    assert outcome(tmp_path / "other")["tensors"] != outcome(whole)["tensors"]


def test_what_a_run_leaves(whole: Path) -> None:
    plan = outcome(whole)["plan"]
    assert plan["warmup"]["steps"] == plan["warmup"]["planned"] == tiny.WARMUP
    assert not plan["warmup"]["settled"]
    assert plan["warmup"]["frequency"].keys() == plan["scores"]["values"].keys()
    assert plan["scores"]["source"] == "online" and plan["scores"]["rows"] == tiny.WARMUP
    assert len(plan["kept"]) == 2 and plan["data"] == {"train": "a fingerprint"}
    history = outcome(whole)["result"]["history"]
    steps = [entry["step"] for entry in history if "loss" in entry]
    assert steps == list(range(2, tiny.TOTAL + 1, 2))
    assert [e["stage"] for e in history[:4]] == ["warmup"] * 4 and history[4]["stage"] == "main"
    model = make_model()
    loradrop.load(model, whole / "adapter")
    assert injection_of(model).plan.to_dict() == plan


def test_checkpoints_hold_only_what_is_trained(whole: Path) -> None:
    folders = sorted(whole.glob("*/checkpoint-*"))
    assert len(folders) == 4  # the last two of each stage
    for folder in folders:
        files = {file.name for file in folder.iterdir()}
        assert not {"model.safetensors", "pytorch_model.bin", "training_args.bin"} & files
        tensors = load_file(folder / "adapter.safetensors")
        assert {name.partition(".")[0] for name in tensors} == {"bank", "saved"}
        saved = {name for name in tensors if name.startswith("saved.")}
        assert saved == {"saved.classifier.weight", "saved.classifier.bias"}
        state = torch.load(folder / "optimizer.pt")["state"]
        moments = sum(s["exp_avg"].numel() for s in state.values())
        assert moments == sum(tensor.numel() for tensor in tensors.values())


# --- the two stages ---------------------------------------------------------------------------


def test_early_stop_when_settled_is_recorded(runs: tiny.Runs) -> None:
    _, result, _ = runs["settling"]
    warmup, rows = result.plan.warmup, result.plan.scores["rows"]
    assert warmup["settled"] and warmup["planned"] == 12 and warmup["steps"] == rows in (4, 8)
    assert result.steps == result.history[-1]["step"] == tiny.TOTAL


def test_not_settled_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def unsure(scores: Any, decide: Any) -> dict[str, float]:
        asked.append(len(scores.rows))
        return dict.fromkeys(scores, 0.5)

    monkeypatch.setattr(loradrop.methods.lora_drop, "keep_frequency", unsure)
    warmup = run(tmp_path, tiny.SETTLING).plan.warmup
    assert asked == [4, 8, 12]
    assert not warmup["settled"] and warmup["steps"] == warmup["planned"] == 12


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_method_trains_as_many_steps(name: str, runs: tiny.Runs) -> None:
    _, result, steps = runs[name]
    assert steps == result.steps == tiny.TOTAL


def test_epochs_count_steps(tmp_path: Path) -> None:
    args = replace(tiny.ARGS, steps=None, epochs=1.5, gradient_accumulation=2)
    assert run(tmp_path, tiny.PLAIN, args).steps == 5  # 6 batches an epoch, 3 steps, 1.5 times


class Watch(TrainerCallback):
    """The data that each stage trains on."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_begin(self, args: Any, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
        self.seen[Path(args.output_dir).name] = train_dataloader.dataset


SAMPLED = tiny.LORA | {"keep": 1, "probe_steps": tiny.WARMUP, "sample_ratio": 0.5}


@pytest.mark.parametrize("kind", ["list", "datasets"])
@pytest.mark.parametrize("source", ["online", "offline"])
def test_warmup_trains_on_a_sample_of_each_class(kind: str, source: str, tmp_path: Path) -> None:
    config = LoraDropConfig(**SAMPLED, source=source)
    watch, train = Watch(), make_rows()
    if kind == "datasets":
        train = tiny.datasets.Dataset.from_list(train).with_format("torch")
    result = run(tmp_path, config, train=train, callbacks=[watch])
    assert len(watch.seen["main"]) == tiny.ROWS
    drawn = watch.seen["warmup"]
    assert Counter(int(drawn[i]["labels"]) for i in range(len(drawn))) == {0: 11, 1: 6, 2: 5}
    if source == "offline":
        sampled = sum(int(drawn[i]["attention_mask"].sum()) for i in range(len(drawn)))
        assert result.plan.scores["tokens"] == sampled


def test_a_sample_of_numbers_is_drawn_from_all(tmp_path: Path) -> None:
    rows = [row | {"labels": float(row["labels"])} for row in make_rows()]
    config, watch = LoraDropConfig(**SAMPLED), Watch()
    run(tmp_path, config, train=rows, dev=None, model=make_model(labels=1), callbacks=[watch])
    assert len(watch.seen["warmup"]) == tiny.ROWS // 2


def test_offline_source_measures_the_end_of_the_warmup(runs: tiny.Runs) -> None:
    folder, result, _ = runs["offline"]
    plan = result.plan
    assert plan.scores["source"] == "offline" and plan.scores["rows"] == 3  # 44 rows by 16
    model = make_model()
    loradrop.load(model, folder / "warmup" / f"checkpoint-{tiny.WARMUP}")
    scores = loradrop.probe(model, DataLoader(make_rows(), batch_size=16))
    assert dict(scores) == plan.scores["values"]
    assert plan.scores["tokens"] == sum(int(row["attention_mask"].sum()) for row in make_rows())


def test_online_scores_are_those_of_the_passes(whole: Path) -> None:
    """One step of the warm-up by hand: the norms of every batch, before its update."""
    plan = outcome(whole)["plan"]
    assert plan["scores"]["tokens"] < sum(12 for _ in range(tiny.WARMUP * 8))
    assert all(value > 0 for value in plan["scores"]["values"].values())
    first = load_file(whole / "warmup" / "checkpoint-4" / "statistics.safetensors")["rows"]
    last = load_file(whole / "warmup" / "checkpoint-8" / "statistics.safetensors")["rows"]
    for checkpoint in whole.glob("main/checkpoint-*"):  # after the warm-up nothing is collected
        assert load_file(checkpoint / "statistics.safetensors") == {}
    assert first.dtype == torch.float64 and torch.equal(first, last[:4])
    assert torch.equal(last[0], torch.zeros_like(last[0]))  # B is zero before the first update
    assert last.sum(0).tolist() == list(plan["scores"]["values"].values())


def test_a_shared_model_has_no_warmup(tmp_path: Path) -> None:
    model = make_model()
    loradrop.inject(model, tiny.DROP)
    name = model.lora_bank.targets[0].name
    loradrop.share(model, [name])  # query of layer 0; the values share
    result = run(tmp_path, model=model)
    assert not (tmp_path / "warmup").exists() and result.steps == tiny.TOTAL
    assert result.plan.slots == (0, 1, 2, 1) and result.parameters == 3 * 4 * (32 + 32)


def test_a_loaded_model_keeps_what_was_measured(whole: Path, tmp_path: Path) -> None:
    model = make_model()
    loradrop.load(model, whole / "adapter")
    before = injection_of(model).plan
    plan = run(tmp_path, model=model).plan
    assert (plan.scores, plan.warmup, plan.kept) == (before.scores, before.warmup, before.kept)
    assert plan.scores is not None and plan.assignment == before.assignment


def test_an_injected_model_keeps_its_configuration(tmp_path: Path) -> None:
    model = make_model()
    loradrop.inject(model, tiny.PLAIN)
    with pytest.raises(ValueError, match=r"another configuration: .*config=None"):
        run(tmp_path, model=model)
    assert run(tmp_path, replace(tiny.PLAIN, target_modules=["value", "query"]), model=model).steps


@pytest.mark.parametrize("kind", ["native", "peft"])
def test_what_was_loaded_is_trained_on_without_a_configuration(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config=None takes .*give loradrop\.LoRAConfig"):
        run(tmp_path / "none", config=None)
    run(tmp_path / "first", tiny.PLAIN)
    adapter, model = tmp_path / "first" / "adapter", make_model()
    if kind == "peft":
        loradrop.load(model, adapter)
        loradrop.export(model, adapter := tmp_path / "peft")
        model = make_model()
    loradrop.load(model, adapter)
    before = [p.detach().clone() for p in model.lora_bank.parameters()]
    assert run(tmp_path / "more", None, model=model).steps == tiny.TOTAL
    now = list(model.lora_bank.parameters())
    assert len(now) == len(before) and not any(map(torch.equal, now, before))


def test_a_warmup_that_cannot_measure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'lora' measures nothing: try lora_drop"):
        warm_up(make_model(), make_rows(), tiny.PLAIN, output_dir=tmp_path)
    with pytest.raises(ValueError, match="leaves none of the 4 steps"):
        run(tmp_path, args=replace(tiny.ARGS, steps=4))
    with pytest.raises(ValueError, match=r"a warm-up of 1 steps .* at least 2"):
        run(tmp_path, LoraDropConfig(**tiny.LORA, keep=1, probe_steps=1))


# --- data, precision, bad input ---------------------------------------------------------------


def test_data_loaders(tmp_path: Path) -> None:
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        keys = ("input_ids", "attention_mask", "labels")
        return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in keys}

    def loaders() -> dict[str, Any]:
        train = DataLoader(make_rows(), batch_size=8, shuffle=True, collate_fn=collate)
        dev = [{**row, "comment": "only its own collate_fn drops this"} for row in make_rows(16, 1)]
        return {"train": train, "dev": DataLoader(dev, batch_size=5, collate_fn=collate)}

    result = run(tmp_path / "whole", tiny.OFFLINE, **loaders())
    assert result.plan.scores["rows"] == 6 and "accuracy" in result.metrics
    interrupted(tmp_path / "stopped", "main", 9, config=tiny.OFFLINE, **loaders())
    run(tmp_path / "stopped", tiny.OFFLINE, resume=True, **loaders())
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"sample_ratio=0\.5 needs a dataset"):
        run(tmp_path, LoraDropConfig(**tiny.LORA, sample_ratio=0.5), **loaders())


def test_datasets_with_columns_that_the_model_does_not_take(whole: Path, tmp_path: Path) -> None:
    train = tiny.datasets.Dataset.from_list([row | {"text": "unused"} for row in make_rows()])
    run(tmp_path, train=train.with_format("torch"))
    assert outcome(tmp_path) == outcome(whole)


def test_gradient_checkpointing_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, args=replace(tiny.ARGS, gradient_checkpointing=True))
    ours, theirs = outcome(tmp_path), outcome(whole)
    assert ours["tensors"] == theirs["tensors"] and ours["plan"] == theirs["plan"]


@dataclass(frozen=True, kw_only=True)
class Watching(Method):
    """Notes its events and what they bring."""

    name: ClassVar[str] = "watching"
    statistics: ClassVar[tuple[str, ...]] = ("moment", "sqnorm")
    events: ClassVar[list[tuple[int, dict[str, Any]]]] = []

    def on_step_end(self, bank: Any, step: int, statistics: Any) -> None:
        self.events.append((step, dict(statistics)))


@dataclass(frozen=True, kw_only=True)
class Holding(Method):
    """Notes the gradients of A and takes them away."""

    name: ClassVar[str] = "holding"
    events: ClassVar[list[tuple[int, int, float]]] = []

    def before_step(self, bank: Any, step: int, total: int) -> None:
        grads = [pair.A.grad for pair in bank.pairs]
        self.events.append((step, total, float(sum(grad.norm() for grad in grads))))
        for grad in grads:
            grad.zero_()


def test_a_method_can_change_gradients(tmp_path: Path) -> None:
    model, config = make_model(), replace(tiny.PLAIN, method=Holding())
    Holding.events.clear()
    bank = loradrop.inject(model, config)
    before = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in bank.pairs]
    run(tmp_path, config, replace(tiny.ARGS, steps=3), model=model)
    assert [event[:2] for event in Holding.events] == [(1, 3), (2, 3), (3, 3)]
    assert Holding.events[-1][2] > 0
    for pair, (A, B) in zip(bank.pairs, before, strict=True):
        assert torch.equal(pair.A, A) and not torch.equal(pair.B, B)


@pytest.mark.parametrize("clipped", [True, False])
def test_a_method_sees_gradients_without_the_loss_scale(clipped: bool) -> None:
    model = make_model()
    bank = loradrop.inject(model, replace(tiny.PLAIN, method=Holding()))
    optimizer = torch.optim.SGD(bank.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(sum(p.sum() for p in bank.parameters())).backward()
    if clipped:
        scaler.unscale_(optimizer)
    Holding.events.clear()
    wrapped = SimpleNamespace(scaler=scaler, optimizer=optimizer)  # as accelerate's
    events = MethodCallback(model)
    state = SimpleNamespace(global_step=0, max_steps=1)
    events.on_pre_optimizer_step(None, state, None, optimizer=wrapped)
    ones = sum(pair.A.numel() ** 0.5 for pair in bank.pairs)
    assert Holding.events[0][2] == pytest.approx(ones)
    before = [pair.B.detach().clone() for pair in bank.pairs]
    scaler.step(optimizer)
    for pair, B in zip(bank.pairs, before, strict=True):
        torch.testing.assert_close(pair.B, B - 1.0)


def test_statistics_are_those_of_a_run_without_a_loss_scale() -> None:
    """The callback hands the scale of accelerate's optimiser on to the collector."""
    found, scaler = [], torch.amp.GradScaler("cpu", init_scale=64.0)
    for scaled in (False, True):
        model = without_dropout()
        bank = loradrop.inject(model, tiny.PLAIN)
        with torch.no_grad():
            for pair in bank.pairs:
                pair.B.fill_(0.1)
        events = MethodCallback(model, statistics=("sqnorm", *GRAMS))
        events.begin()
        assert events.collector is not None
        loss = model(**default_data_collator(make_rows(4))).loss
        (scaler.scale(loss) if scaled else loss).backward()
        wrapped = SimpleNamespace(scaler=scaler if scaled else None, optimizer=None)
        state = SimpleNamespace(global_step=0, max_steps=1)
        events.on_pre_optimizer_step(None, state, None, optimizer=wrapped)
        events.collector.close_row()
        found.append(events.collector.scores().grams.left)
        events.detach()
    for one, other in zip(*found, strict=True):
        assert float(one.trace()) > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0.0)


def without_dropout() -> nn.Module:
    model = make_model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.attention_probs_dropout_prob = 0.0
    return model


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    """The same losses, gradients, scores and moments, as many rows."""
    histories, scores, moments = [], [], []
    for size in (1, 4):
        rows = {"batch_size": 8 // size, "gradient_accumulation": size}
        args = replace(tiny.ARGS, steps=12, log_every=1, **rows)
        drop = replace(tiny.DROP, lora_dropout=0.0)
        whole = run(tmp_path / f"{size}", drop, args, model=without_dropout())
        assert whole.plan.scores["rows"] == tiny.WARMUP
        scores.append(list(whole.plan.scores["values"].values()))
        watched = replace(tiny.PLAIN, lora_dropout=0.0, method=Watching())
        Watching.events.clear()
        result = run(tmp_path / f"{size}w", watched, args, model=without_dropout())
        assert [step for step, _ in Watching.events] == list(range(1, 13))
        moments.append(torch.stack([sum(found["moment"]) for _, found in Watching.events]))
        logged = [*whole.history, *result.history]
        histories.append([(e["loss"], e["grad_norm"]) for e in logged if "grad_norm" in e])
    assert histories[1] == [pytest.approx(pair, rel=1e-3) for pair in histories[0]]
    assert scores[1] == pytest.approx(scores[0], rel=1e-2)
    assert moments[0].min() > 0
    torch.testing.assert_close(moments[1], moments[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("native", [True, False])
def test_bf16(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(arguments_module, "native_bf16", lambda: native)
    seen: set[torch.dtype] = set()
    model = make_model()
    query = model.bert.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda module, args, y: seen.add(y.dtype))
    result = run(tmp_path, args=replace(tiny.ARGS, precision="bf16"), model=model)
    assert seen == {torch.bfloat16 if native else torch.float32}
    assert ("no native bfloat16" in caplog.text) != native
    assert {p.dtype for p in model.lora_bank.parameters()} == {torch.float32}
    assert result.metrics["loss"] < result.history[0]["loss"]
    assert "forward" not in vars(model)
    query._forward_hooks.clear()
    assert len(pickle.dumps(model)) > 0  # mixed precision leaves no wrapper behind


@pytest.mark.skipif(torch.accelerator.is_available(), reason="it computes in float16")
def test_fp16_on_a_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: set[torch.dtype] = set()
    model = make_model()
    query = model.bert.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda module, args, y: seen.add(y.dtype))
    run(tmp_path, args=replace(tiny.ARGS, precision="fp16"), model=model)
    said = [record for record in caplog.records if "fp16 is for accelerators" in record.message]
    assert seen == {torch.float32} and len(said) == 1


def test_evaluates_while_it_trains(tmp_path: Path) -> None:
    result = run(tmp_path, args=replace(tiny.ARGS, eval_every=7))
    evaluated = [entry for entry in result.history if "eval_accuracy" in entry]
    assert [entry["step"] for entry in evaluated] == [15, 22, 22]  # and once at the end
    assert not [key for entry in result.history for key in entry if "runtime" in key]


def test_best_checkpoint_comes_back(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    args = replace(tiny.ARGS, learning_rate=0.3, steps=40, eval_every=4, extra=best)
    result = run(tmp_path / "run", tiny.PLAIN, args)
    losses = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert result.metrics["loss"] == min(losses) < losses[-2]
    assert run(tmp_path / "run", tiny.PLAIN, args, resume=True).metrics == result.metrics
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run(tmp_path / "moved", tiny.PLAIN, args, resume=True).metrics == result.metrics


def test_without_output_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = fit(make_model(), make_rows(), None, tiny.DROP, args=tiny.ARGS)
    assert result.metrics == {} and result.steps == tiny.TOTAL
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr()
    assert printed.out == "" and "main: 100%" in printed.err and "loss=" in printed.err


def test_loss_that_is_not_finite(tmp_path: Path) -> None:
    model = make_model()
    weight = model.classifier.weight

    def poison() -> None:
        weight.data.fill_(float("nan"))

    with pytest.raises(ValueError, match=r"the loss is nan at step 6: lower the learning rate"):
        run(tmp_path, tiny.PLAIN, model=model, callbacks=[At("main", 5, poison)])
    assert model.lora_bank.collector is None and not model._forward_pre_hooks
    assert last_checkpoint(tmp_path / "main").name == "checkpoint-4"


@pytest.mark.parametrize("train", [[], DataLoader([])], ids=["list", "loader"])
def test_train_that_is_empty_or_has_no_length(train: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dev is empty: give rows to measure on, or dev=None"):
        fit(make_model(), make_rows(), [], tiny.DROP, args=tiny.ARGS)
    with pytest.raises(ValueError, match="long is empty"):
        fit(make_model(), make_rows(), {"all": make_rows(), "long": []}, tiny.DROP, args=tiny.ARGS)
    with pytest.raises(TypeError, match="args is a dict: give TrainConfig or TrainingArguments"):
        fit(make_model(), make_rows(), None, tiny.DROP, args={"steps": 5})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train is empty: give at least one example"):
        fit(make_model(), train, None, tiny.DROP, output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="train is a generator without a length"):
        fit(make_model(), (row for row in make_rows()), None, tiny.DROP)
    datasets = tiny.datasets
    stream = datasets.Dataset.from_list([{"a": 1}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="train is a IterableDataset without a length"):
        fit(make_model(), DataLoader(stream), None, tiny.DROP)
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(make_rows()))
    with pytest.raises(ValueError, match=r"train is a DatasetDict of train: .*train\['train'\]"):
        fit(make_model(), splits, None, tiny.DROP)


WRONG = {
    "steps": 0,
    "batch_size": -1,
    "learning_rate": 0.0,
    "head_learning_rate": -1.0,
    "save_every": 0,
    "precision": "int8",
}


@pytest.mark.parametrize(("name", "value"), WRONG.items(), ids=WRONG)
def test_train_config_names_what_is_wrong(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r}: choose"):
        TrainConfig(**{name: value})


# --- the seams --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Blind(Watching):
    name: ClassVar[str] = "blind"
    statistics: ClassVar[tuple[str, ...]] = ()


@pytest.mark.parametrize("method", [Watching(), Blind()], ids=["statistics", "none"])
def test_a_method_of_one_stage_sees_every_step(method: Method, tmp_path: Path) -> None:
    Watching.events.clear()
    model = make_model()
    run(tmp_path, LoRAConfig(**tiny.LORA, method=method), model=model)
    assert [step for step, _ in Watching.events] == list(range(1, tiny.TOTAL + 1))
    for _, found in Watching.events:
        assert found.keys() == {*method.statistics}
        moments = found.get("moment", [])
        assert len(moments) == len(model.lora_bank.targets) * bool(found)
        for target, moment in zip(model.lora_bank.targets, moments, strict=False):
            assert moment.shape == (target.in_features,) and moment.min() > 0


@pytest.mark.parametrize("settled", [False, True])
def test_callback_in_a_stock_trainer(settled: bool, tmp_path: Path) -> None:
    model = make_model()
    loradrop.inject(model, tiny.SETTLING if settled else tiny.DROP)
    warmup = Warmup(steps=tiny.WARMUP + 4, settle_every=2 * settled)
    events = MethodCallback(model, statistics=["sqnorm"], warmup=warmup)
    arguments = TrainingArguments(
        **{"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "disable_tqdm": True},
        **{"max_steps": tiny.WARMUP + 4, "save_steps": 6, "learning_rate": 1e-2},
        per_device_train_batch_size=8,
    )
    trainer = Trainer(model, arguments, train_dataset=make_rows(), callbacks=[events])
    trainer.train()
    assert events.settled == settled and events.seconds > 0
    scores = events.collector.scores()
    assert len(scores.rows) == trainer.state.global_step < (tiny.WARMUP + 4 if settled else 99)
    kept = loradrop.select(scores, keep=1)
    loradrop.share(model, kept)
    assert model.lora_bank.collector is None
    saved = sorted(tmp_path.glob("checkpoint-*"))[-1]
    assert (saved / "loradrop_adapter" / "adapter.safetensors").exists()
    fresh = make_model()
    loradrop.load(fresh, saved)
    assert len(fresh.lora_bank.A) == 4
