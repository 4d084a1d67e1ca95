"""Training ends the same every time: after a kill at any moment, from any kind of data."""

import json
import logging
import multiprocessing
import os
import pickle
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import loradrop
import loradrop.formats.native
import loradrop.training
from loradrop import LoRAConfig, LoraDropConfig, TrainConfig, fit
from loradrop import trainer as trainer_module
from loradrop.callbacks import MethodCallback
from loradrop.injection import injection_of
from loradrop.methods import Method
from loradrop.methods.prilora import PRILoRA
from loradrop.methods.vera import VeRA
from loradrop.trainer import last_checkpoint
from loradrop.training import Result, warm_up

datasets = pytest.importorskip("datasets")

# 44 rows in batches of 8: 6 steps an epoch, the last batch small. Both stages end inside an epoch.
ROWS, TOTAL, WARMUP = 44, 22, 8
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["query", "value"]}
DROP = LoraDropConfig(**LORA, keep_ratio=0.5, probe_steps=WARMUP)
PLAIN = LoRAConfig(**LORA)
ARGS = TrainConfig(steps=TOTAL, batch_size=8, learning_rate=1e-2, log_every=2, save_every=4)


def make_model(labels: int = 3) -> nn.Module:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=labels,
    )
    return BertForSequenceClassification(config)


def make_rows(n: int = ROWS, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of 5 to 12 tokens, the first ones of which tell the label; half have label 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        label = (0, 1, 0, 2)[i % 4]
        ids = torch.randint(6, 64, (12,), generator=generator)
        length = int(torch.randint(5, 13, (), generator=generator))
        ids[:4], ids[length:] = label + 1, 0
        mask = (torch.arange(12) < length).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": label})
    return rows


def accuracy(prediction: Any) -> dict[str, float]:
    guess = prediction.predictions.argmax(-1)
    return {"accuracy": float((guess == prediction.label_ids).mean())}


def run(
    folder: Path, config: LoRAConfig = DROP, args: TrainConfig = ARGS, **options: Any
) -> Result:
    return fit(
        options.pop("model", None) or make_model(),
        options.pop("train", None) or make_rows(),
        options.pop("dev", None) or make_rows(16, 1),
        config,
        args=args,
        metric=accuracy,
        output_dir=folder,
        data={"train": "a fingerprint"},
        **options,
    )


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a run leaves that has to be the same when it is repeated."""
    result = json.loads((folder / "result.json").read_text())
    seconds = result.pop("seconds")
    assert seconds > 0
    return {
        "result": result,
        "plan": json.loads((folder / "plan.json").read_text()),
        "tensors": {
            name: (tensor.dtype, tensor.numpy().tobytes())
            for name, tensor in load_file(folder / "adapter" / "adapter.safetensors").items()
        },
    }


class At(TrainerCallback):
    """Does something after a step of a stage."""

    def __init__(self, stage: str, step: int, what: Callable[[], None]) -> None:
        self.stage, self.step, self.what = stage, step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step == self.step:
            self.what()


class StopError(Exception):
    pass


def stop() -> None:
    raise StopError


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_loss_falls(tmp_path: Path) -> None:
    result = run(tmp_path, args=replace(ARGS, steps=60), dev=make_rows())
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert result.metrics["accuracy"] > 0.6  # one label for all is right for half of the rows
    assert result.metrics["loss"] < losses[0]


def test_same_seed_same_result(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "same")
    run(tmp_path / "other", args=replace(ARGS, seed=1))
    assert outcome(tmp_path / "same") == outcome(whole)
    model = make_model()
    torch.manual_seed(99)  # the run's own seed counts, from the first adapter on
    run(tmp_path / "reseeded", model=model)
    assert outcome(tmp_path / "reseeded") == outcome(whole)
    assert outcome(tmp_path / "other")["tensors"] != outcome(whole)["tensors"]


def test_what_a_run_leaves(whole: Path) -> None:
    plan = outcome(whole)["plan"]
    assert plan["warmup"]["steps"] == plan["warmup"]["planned"] == WARMUP
    assert not plan["warmup"]["settled"]
    assert plan["warmup"]["frequency"].keys() == plan["scores"]["values"].keys()
    assert plan["scores"]["source"] == "online" and plan["scores"]["rows"] == WARMUP
    assert len(plan["kept"]) == 2 and plan["data"] == {"train": "a fingerprint"}
    history = outcome(whole)["result"]["history"]
    steps = [entry["step"] for entry in history if "loss" in entry]
    assert steps == list(range(2, TOTAL + 1, 2))
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
        assert {n for n in tensors if n[0] == "s"} == {
            "saved.classifier.weight",
            "saved.classifier.bias",
        }
        state = torch.load(folder / "optimizer.pt")["state"]
        assert sum(s["exp_avg"].numel() for s in state.values()) == sum(
            tensor.numel() for tensor in tensors.values()
        )


@dataclass(frozen=True, kw_only=True)
class Watching(Method):
    """Notes its events and what they bring."""

    name: ClassVar[str] = "watching"
    statistics: ClassVar[tuple[str, ...]] = ("moment", "sqnorm")
    events: ClassVar[list[tuple[int, dict[str, Any]]]] = []

    def on_step_end(self, bank: Any, step: int, statistics: Any) -> None:
        self.events.append((step, dict(statistics)))


# --- killed at any moment ---------------------------------------------------------------------


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(owner: Any, name: str, ending: str, number: int = 1) -> None:
    """Kill at the so-and-so-many-th call of `owner.name` whose last path part ends so."""
    original, calls = getattr(owner, name), Counter[str]()

    def spied(*args: Any, **kwargs: Any) -> Any:
        paths = [str(arg) for arg in args if isinstance(arg, (str, Path))]
        calls["hits"] += any(path.endswith(ending) for path in paths)
        if calls["hits"] == number:
            kill()
        return original(*args, **kwargs)

    setattr(owner, name, spied)


def before_first_checkpoint() -> list[At]:
    return [At("warmup", 3, kill)]


def in_the_warmup() -> list[At]:
    return [At("warmup", 6, kill)]


def writing_a_checkpoint_of_the_warmup() -> list[At]:
    kill_at_call(trainer_module.LoRATrainer, "_save_rng_state", "warmup/checkpoint-8")
    return []


def between_warmup_and_start() -> list[At]:
    kill_at_call(loradrop.training, "save", "start")
    return []


def writing_start() -> list[At]:
    kill_at_call(loradrop.formats.native, "write_json", "start/plan.json")
    return []


def before_the_first_checkpoint_of_main() -> list[At]:
    return [At("main", 2, kill)]


def writing_a_checkpoint_of_main() -> list[At]:
    kill_at_call(trainer_module, "write_json", "main/checkpoint-8/complete.json")
    return []


def replacing_a_file() -> list[At]:
    kill_at_call(os, "replace", "checkpoint-8/adapter.safetensors", 2)  # the second is of main
    return []


def in_the_main_run() -> list[At]:
    return [At("main", 11, kill)]


def after_the_last_step() -> list[At]:
    return [At("main", TOTAL - WARMUP, kill)]


def before_the_result() -> list[At]:
    kill_at_call(loradrop.training, "save", "adapter")
    return []


MOMENTS = [
    before_first_checkpoint,
    in_the_warmup,
    writing_a_checkpoint_of_the_warmup,
    between_warmup_and_start,
    writing_start,
    before_the_first_checkpoint_of_main,
    writing_a_checkpoint_of_main,
    replacing_a_file,
    in_the_main_run,
    after_the_last_step,
    before_the_result,
]


def doomed(folder: Path, moment: Callable[[], list[At]]) -> None:
    torch.set_num_threads(1)
    run(folder, callbacks=moment())


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_killed_and_resumed(moment: Callable[[], list[At]], whole: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # it imports once, and has run nothing
    context.set_forkserver_preload(["loradrop.training", "datasets"])
    process = context.Process(target=doomed, args=(tmp_path, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    run(tmp_path, resume=True)
    assert outcome(tmp_path) == outcome(whole)


# --- resuming what is not a plain checkpoint -----------------------------------------------------


def interrupted(folder: Path, stage: str, step: int, **options: Any) -> None:
    with pytest.raises(StopError):
        run(folder, callbacks=[At(stage, step, stop)], **options)


def test_half_written_checkpoint_is_named_and_skipped(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path, "main", 9)
    newest = tmp_path / "main" / "checkpoint-8"
    (newest / "complete.json").unlink()
    with caplog.at_level(logging.WARNING, "loradrop"):
        run(tmp_path, resume=True)
    assert f"{newest} was being written when the run ended; going on from an earlier" in caplog.text
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter.safetensors", "complete.json"])
def test_damaged_checkpoint_is_named_and_skipped(
    name: str, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path, "warmup", 7)
    file = tmp_path / "warmup" / "checkpoint-4" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "loradrop"):
        run(tmp_path, resume=True)
    assert f"{file.parent} " in caplog.text and name in caplog.text and "damaged" in caplog.text
    assert outcome(tmp_path) == outcome(whole)


def test_truncated_checkpoint_file_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path, "warmup", 7)
    file = tmp_path / "warmup" / "checkpoint-4" / "rng_state.pth"
    file.write_bytes(file.read_bytes()[:100])
    assert last_checkpoint(file.parent.parent) is None
    assert "is damaged (rng_state.pth)" in caplog.text


def test_damaged_start_is_made_again(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path, "main", 9)
    file = tmp_path / "start" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with caplog.at_level(logging.WARNING, "loradrop"):
        run(tmp_path, resume=True)
    assert f"{file} is damaged or half-written" in caplog.text
    assert "Going on from the warm-up's last checkpoint" in caplog.text
    assert outcome(tmp_path) == outcome(whole)


def test_damaged_options_are_named(tmp_path: Path) -> None:
    interrupted(tmp_path, "warmup", 1)
    (tmp_path / "options.json").write_text("{")
    with pytest.raises(ValueError, match=r"options.json is damaged or half-written"):
        run(tmp_path, resume=True)


def test_resume_of_a_finished_run_trains_no_more(whole: Path, tmp_path: Path) -> None:
    run(tmp_path)
    steps: list[int] = []
    run(
        tmp_path,
        resume=True,
        callbacks=[At("main", s, partial(steps.append, 1)) for s in range(99)],
    )
    assert outcome(tmp_path) == outcome(whole) and not steps


def test_resume_without_anything_to_resume_starts(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, resume=True)
    assert outcome(tmp_path) == outcome(whole)


def test_resume_with_the_model_in_memory(whole: Path, tmp_path: Path) -> None:
    model = make_model()
    interrupted(tmp_path, "main", 9, model=model)
    assert model.lora_bank.collector is None
    run(tmp_path, resume=True, model=model)
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"args": replace(ARGS, learning_rate=0.5)}, r"train: learning_rate"),
        ({"args": replace(ARGS, steps=30, seed=3)}, r"train: seed, steps"),
        ({"config": replace(DROP, r=2)}, r"lora: r\)"),
        ({"config": PLAIN}, r"lora: method"),
        ({"model": make_model(labels=4)}, r"model: fingerprint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resume_with_other_options_is_refused(
    changed: dict[str, Any], named: str, tmp_path: Path
) -> None:
    interrupted(tmp_path, "warmup", 1)
    with pytest.raises(
        ValueError, match=rf"was begun with other options \({named}.*choose another"
    ):
        run(tmp_path, resume=True, **changed)


def test_used_output_is_refused(whole: Path) -> None:
    before = outcome(whole)
    with pytest.raises(
        ValueError, match=r"holds a run already: resume, or choose another output"
    ):
        run(whole)
    assert outcome(whole) == before


def test_an_error_before_training_leaves_the_output_free(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        run(tmp_path, replace(DROP, target_modules=["qwery"]))
    run(tmp_path)
    assert outcome(tmp_path) == outcome(whole)


def test_warm_up_alone_and_then_the_rest(whole: Path, tmp_path: Path) -> None:
    options = {"args": ARGS, "output_dir": tmp_path, "data": {"train": "a fingerprint"}}
    plan = warm_up(make_model(), make_rows(), DROP, **options)
    assert plan.warmup["steps"] == WARMUP and not (tmp_path / "main").exists()
    run(tmp_path, resume=True)
    assert outcome(tmp_path) == outcome(whole)
    assert json.loads(json.dumps(plan.to_dict())) == outcome(whole)["plan"]


# --- the two stages ---------------------------------------------------------------------------


def settling(margin: float) -> LoRAConfig:
    return LoraDropConfig(
        **LORA, keep_ratio=0.5, probe_steps=12, settle_margin=margin, settle_every=4
    )


def test_early_stop_when_settled_is_recorded(tmp_path: Path) -> None:
    result = run(tmp_path, settling(0.49))
    assert result.plan.warmup["settled"] and result.plan.warmup["planned"] == 12
    steps = result.plan.warmup["steps"]
    assert steps in (4, 8) and result.plan.scores["rows"] == steps
    assert result.steps == TOTAL and result.history[-1]["step"] == TOTAL


def test_not_settled_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def unsure(scores: Any, decide: Any) -> dict[str, float]:
        asked.append(len(scores.rows))
        return dict.fromkeys(scores, 0.5)

    monkeypatch.setattr(loradrop.methods.lora_drop, "keep_frequency", unsure)
    warmup = run(tmp_path, settling(0.49)).plan.warmup
    assert asked == [4, 8, 12]
    assert not warmup["settled"] and warmup["steps"] == warmup["planned"] == 12


def test_killed_once_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", settling(0.49))
    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(loradrop.training, "save", lambda *_: stop())
        run(tmp_path / "stopped", settling(0.49))
    run(tmp_path / "stopped", settling(0.49), resume=True)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_every_method_trains_as_many_steps(tmp_path: Path) -> None:
    offline = LoraDropConfig(**LORA, keep=1, probe_steps=0.3, source="offline")
    configs = {"lora": PLAIN, "drop": DROP, "settling": settling(0.49), "offline": offline}
    for name, config in configs.items():
        steps: list[int] = []
        watch = [At(s, i, partial(steps.append, 1)) for s in ("warmup", "main") for i in range(99)]
        result = run(tmp_path / name, config, callbacks=watch)
        assert len(steps) == result.steps == TOTAL, name


def test_epochs_count_steps(tmp_path: Path) -> None:
    args = replace(ARGS, steps=None, epochs=1.5, gradient_accumulation=2)
    assert run(tmp_path, PLAIN, args).steps == 5  # 6 batches an epoch, 3 steps, 1.5 times


class Watch(TrainerCallback):
    """The data that each stage trains on."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_begin(self, args: Any, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
        self.seen[Path(args.output_dir).name] = train_dataloader.dataset


def rows_as(kind: str) -> Any:
    if kind == "datasets":
        return datasets.Dataset.from_list(make_rows()).with_format("torch")
    return make_rows()


@pytest.mark.parametrize("kind", ["list", "datasets"])
@pytest.mark.parametrize("source", ["online", "offline"])
def test_warmup_trains_on_a_sample_of_each_class(kind: str, source: str, tmp_path: Path) -> None:
    config = LoraDropConfig(**LORA, keep=1, probe_steps=WARMUP, sample_ratio=0.5, source=source)
    watch = Watch()
    result = run(tmp_path, config, train=rows_as(kind), callbacks=[watch])
    assert len(watch.seen["main"]) == ROWS
    drawn = watch.seen["warmup"]
    assert Counter(int(drawn[i]["labels"]) for i in range(len(drawn))) == {0: 11, 1: 6, 2: 5}
    if source == "offline":
        sampled = sum(int(drawn[i]["attention_mask"].sum()) for i in range(len(drawn)))
        assert result.plan.scores["tokens"] == sampled


def test_a_sample_of_numbers_is_drawn_from_all(tmp_path: Path) -> None:
    rows = [row | {"labels": float(row["labels"])} for row in make_rows()]
    config = LoraDropConfig(**LORA, keep=1, probe_steps=WARMUP, sample_ratio=0.5)
    watch = Watch()
    model = make_model(labels=1)
    fit(model, rows, None, config, args=ARGS, output_dir=tmp_path, callbacks=[watch])
    assert len(watch.seen["warmup"]) == ROWS // 2


def test_offline_source_measures_the_end_of_the_warmup(tmp_path: Path) -> None:
    config = LoraDropConfig(**LORA, keep=1, probe_steps=WARMUP, source="offline")
    plan = run(tmp_path, config).plan
    assert plan.scores["source"] == "offline" and plan.scores["rows"] == 3  # 44 rows by 16
    model = make_model()
    loradrop.load(model, tmp_path / "warmup" / f"checkpoint-{WARMUP}")
    scores = loradrop.probe(model, DataLoader(make_rows(), batch_size=16))
    assert dict(scores) == plan.scores["values"]
    assert plan.scores["tokens"] == sum(int(row["attention_mask"].sum()) for row in make_rows())


def test_online_scores_are_those_of_the_passes(whole: Path, tmp_path: Path) -> None:
    """One step of the warm-up by hand: the norms of every batch, before its update."""
    plan = outcome(whole)["plan"]
    assert plan["scores"]["tokens"] < sum(12 for _ in range(WARMUP * 8))
    assert all(value > 0 for value in plan["scores"]["values"].values())
    first = load_file(whole / "warmup" / "checkpoint-4" / "statistics.safetensors")["rows"]
    last = load_file(whole / "warmup" / "checkpoint-8" / "statistics.safetensors")["rows"]
    assert first.dtype == torch.float64 and torch.equal(first, last[:4])
    assert torch.equal(last[0], torch.zeros_like(last[0]))  # B is zero before the first update
    assert last.sum(0).tolist() == list(plan["scores"]["values"].values())


def test_a_shared_model_has_no_warmup(tmp_path: Path) -> None:
    model = make_model()
    loradrop.inject(model, DROP)
    name = model.lora_bank.targets[0].name
    loradrop.share(model, [name])  # query of layer 0; the values share
    result = run(tmp_path, model=model)
    assert not (tmp_path / "warmup").exists() and result.steps == TOTAL
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
    loradrop.inject(model, PLAIN)
    with pytest.raises(ValueError, match="injected with another configuration"):
        run(tmp_path, model=model)
    assert run(tmp_path, PLAIN, model=model).steps == TOTAL


def test_warmup_needs_a_method_that_measures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'lora' measures nothing: try lora_drop"):
        warm_up(make_model(), make_rows(), PLAIN, output_dir=tmp_path)
    with pytest.raises(ValueError, match="leaves none of the 4 steps"):
        run(tmp_path, args=replace(ARGS, steps=4))


# --- data, precision, bad input ---------------------------------------------------------------


def test_data_loaders(tmp_path: Path) -> None:
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        keys = ("input_ids", "attention_mask", "labels")
        return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in keys}

    def loaders() -> dict[str, Any]:
        train = DataLoader(make_rows(), batch_size=8, shuffle=True, collate_fn=collate)
        dev = [{**row, "comment": "only its own collate_fn drops this"} for row in make_rows(16, 1)]
        return {"train": train, "dev": DataLoader(dev, batch_size=5, collate_fn=collate)}

    config = LoraDropConfig(**LORA, keep=1, probe_steps=WARMUP, source="offline")
    result = run(tmp_path / "whole", config, **loaders())
    assert result.plan.scores["rows"] == 6 and "accuracy" in result.metrics
    interrupted(tmp_path / "stopped", "main", 9, config=config, **loaders())
    run(tmp_path / "stopped", config, resume=True, **loaders())
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"sample_ratio=0\.5 needs a dataset"):
        run(tmp_path, LoraDropConfig(**LORA, sample_ratio=0.5), **loaders())


def test_datasets_with_columns_that_the_model_does_not_take(whole: Path, tmp_path: Path) -> None:
    train = datasets.Dataset.from_list([row | {"text": "unused"} for row in make_rows()])
    run(tmp_path, train=train.with_format("torch"))
    assert outcome(tmp_path) == outcome(whole)


def test_gradient_checkpointing_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, args=replace(ARGS, gradient_checkpointing=True))
    ours, theirs = outcome(tmp_path), outcome(whole)
    assert ours["tensors"] == theirs["tensors"] and ours["plan"] == theirs["plan"]


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
        args = replace(
            ARGS, steps=12, log_every=1, batch_size=8 // size, gradient_accumulation=size
        )
        drop = replace(DROP, lora_dropout=0.0)
        whole = run(tmp_path / f"{size}", drop, args, model=without_dropout())
        assert whole.plan.scores["rows"] == WARMUP
        scores.append(list(whole.plan.scores["values"].values()))
        watched = replace(PLAIN, lora_dropout=0.0, method=Watching())
        Watching.events.clear()
        result = run(tmp_path / f"{size}w", watched, args, model=without_dropout())
        assert [step for step, _ in Watching.events] == list(range(1, 13))
        moments.append(torch.stack([sum(found["moment"]) for _, found in Watching.events]))
        logged = [*whole.history, *result.history]
        histories.append([(e["loss"], e["grad_norm"]) for e in logged if "grad_norm" in e])
    for other, measured in zip(histories[1:], scores[1:], strict=True):
        assert other == [pytest.approx(pair, rel=1e-3) for pair in histories[0]]
        assert measured == pytest.approx(scores[0], rel=1e-2)
    assert moments[0].min() > 0
    torch.testing.assert_close(moments[1], moments[0], rtol=1e-3, atol=0)


def test_warmup_too_short_to_measure(tmp_path: Path) -> None:
    config = LoraDropConfig(**LORA, keep=1, probe_steps=1)
    with pytest.raises(ValueError, match="the warm-up of 1 steps left B at zero"):
        run(tmp_path, config)


@pytest.mark.parametrize("native", [True, False])
def test_bf16(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer_module, "native_bf16", lambda: native)
    seen: set[torch.dtype] = set()
    model = make_model()
    query = model.bert.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda module, args, y: seen.add(y.dtype))
    result = run(tmp_path, args=replace(ARGS, precision="bf16"), model=model)
    assert seen == {torch.bfloat16 if native else torch.float32}
    assert ("no native bfloat16" in caplog.text) != native
    assert {p.dtype for p in model.lora_bank.parameters()} == {torch.float32}
    assert result.metrics["loss"] < result.history[0]["loss"]
    assert "forward" not in vars(model)
    query._forward_hooks.clear()
    assert len(pickle.dumps(model)) > 0  # mixed precision leaves no wrapper behind


def test_evaluates_while_it_trains(tmp_path: Path) -> None:
    result = run(tmp_path, args=replace(ARGS, eval_every=7))
    evaluated = [entry for entry in result.history if "eval_accuracy" in entry]
    assert [entry["step"] for entry in evaluated] == [15, 22, 22]  # and once at the end
    assert not [key for entry in result.history for key in entry if "runtime" in key]


def test_best_checkpoint_comes_back(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    args = replace(ARGS, learning_rate=0.3, steps=40, eval_every=4, extra=best)
    result = run(tmp_path, PLAIN, args)
    losses = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert result.metrics["loss"] == min(losses) < losses[-2]


def test_without_output_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = fit(make_model(), make_rows(), None, DROP, args=ARGS)
    assert result.metrics == {} and result.steps == TOTAL
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr()
    assert printed.out == "" and "main: 100%" in printed.err and "loss=" in printed.err


def test_loss_that_is_not_finite(tmp_path: Path) -> None:
    model = make_model()
    weight = model.classifier.weight

    def poison() -> None:
        weight.data.fill_(float("nan"))

    with pytest.raises(ValueError, match=r"the loss is nan at step 6: lower the learning rate"):
        run(tmp_path, PLAIN, model=model, callbacks=[At("main", 5, poison)])
    assert model.lora_bank.collector is None and not model._forward_pre_hooks
    assert last_checkpoint(tmp_path / "main").name == "checkpoint-4"


@pytest.mark.parametrize("train", [[], DataLoader([])], ids=["list", "loader"])
def test_empty_train(train: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train is empty: give at least one example"):
        fit(make_model(), train, None, DROP, output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_train_without_a_length() -> None:
    with pytest.raises(ValueError, match="train is a generator without a length"):
        fit(make_model(), (row for row in make_rows()), None, DROP)


def test_target_that_is_never_called(tmp_path: Path) -> None:
    model = make_model()
    model.bert.spare = nn.Linear(32, 32)
    config = LoRAConfig(**{**LORA, "target_modules": ["query", "spare"]}, strict=False)
    with pytest.raises(RuntimeError, match=r"the forward of bert\.spare was never called"):
        run(tmp_path, config, model=model)
    assert model.lora_bank.collector is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": -1},
        {"learning_rate": 0.0},
        {"save_every": 0},
        {"precision": "int8"},
    ],
    ids=str,
)
def test_train_config_names_what_is_wrong(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name}={value!r}: choose"):
        TrainConfig(**wrong)


# --- the seams --------------------------------------------------------------------------------


def test_a_method_of_one_stage_sees_every_step(tmp_path: Path) -> None:
    Watching.events.clear()
    model = make_model()
    run(tmp_path, LoRAConfig(**LORA, method=Watching()), model=model)
    assert [step for step, _ in Watching.events] == list(range(1, TOTAL + 1))
    for _, found in Watching.events:
        assert found.keys() == {"moment", "sqnorm"}
        for target, moment in zip(model.lora_bank.targets, found["moment"], strict=True):
            assert moment.shape == (target.in_features,) and moment.min() > 0


def test_a_method_without_statistics_sees_every_step(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Blind(Watching):
        statistics: ClassVar[tuple[str, ...]] = ()

    Watching.events.clear()
    run(tmp_path, LoRAConfig(**LORA, method=Blind()))
    assert Watching.events == [(step, {}) for step in range(1, TOTAL + 1)]


@pytest.mark.parametrize("method", [VeRA(), PRILoRA(prune_every=3)], ids=["vera", "prilora"])
@pytest.mark.parametrize("step", [3, 14, TOTAL])
def test_a_bank_of_other_tensors_is_resumed(method: Method, step: int, tmp_path: Path) -> None:
    config = LoRAConfig(**LORA, method=method)
    result = run(tmp_path / "whole", config)
    assert result.plan.warmup is None and result.plan.kept is None
    interrupted(tmp_path / "other", "main", step, config=config)
    run(tmp_path / "other", config, resume=True)
    assert outcome(tmp_path / "other") == outcome(tmp_path / "whole")
    assert result.metrics["loss"] < 1.09  # ln 3: it has learnt


@pytest.mark.parametrize("settled", [False, True])
def test_callback_in_a_stock_trainer(settled: bool, tmp_path: Path) -> None:
    model = make_model()
    loradrop.inject(model, settling(0.49) if settled else DROP)
    events = MethodCallback(model, statistics=["sqnorm"], settle_every=2 * settled)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=WARMUP + 4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_steps=6,
    )
    trainer = Trainer(model, arguments, train_dataset=make_rows(), callbacks=[events])
    trainer.train()
    assert events.settled == settled and events.seconds > 0
    scores = events.collector.scores()
    assert len(scores.rows) == trainer.state.global_step < (WARMUP + 4 if settled else 99)
    kept = loradrop.select(scores, keep=1)
    loradrop.share(model, kept)
    assert model.lora_bank.collector is None
    saved = sorted(tmp_path.glob("checkpoint-*"))[-1]
    assert (saved / "loradrop_adapter" / "adapter.safetensors").exists()
    fresh = make_model()
    loradrop.load(fresh, saved)
    assert len(fresh.lora_bank.A) == 4
