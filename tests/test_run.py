"""A run from its YAML file to its report, on tiny models of four families and each kind of task."""

import json
import logging
from pathlib import Path

import pytest
import torch
from run_cases import BERT, write_model, write_table
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from training_runs import Stops
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaTokenizer,
)

import loradrop
from loradrop.command.adapter_bases import load_base
from loradrop.command.base_models import build
from loradrop.command.cli import main
from loradrop.command.run import measure, run, warm_up_run
from loradrop.command.run_config import RunConfig, folder_of, read_config
from loradrop.methods import available
from loradrop.native import read
from loradrop.text.task import load_task
from loradrop.text.tokens import collator, tokenize
from loradrop.training.stages import Result


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_table(tmp_path_factory.mktemp("data") / "films.csv")


def configured(model: str, data: str, output: Path, *more: str) -> RunConfig:
    overrides = [f"model={model}", f"data={data}", f"output={output}", "data.max_length=16"]
    overrides += ["data.dev_ratio=0.25", "lora.r=4", "lora.lora_alpha=8"]
    overrides += ["lora.method={keep_ratio: 0.34, probe_steps: 4}"]
    train = "train={steps: 12, batch_size: 6, learning_rate: 3e-2, log_every: 2, save_every: 4}"
    return read_config(None, [*overrides, train, *more])


def adapter_of(config: RunConfig) -> Path:
    return folder_of(config, "LoRA-drop") / "adapter"


def losses(result: Result) -> list[float]:
    return [entry["loss"] for entry in result.history if "loss" in entry]


@pytest.fixture(scope="session")
def trained(bert: str, table: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A configuration that was run."""
    config = configured(bert, table, tmp_path_factory.mktemp("trained"))
    run(config)
    return config


HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "distilbert": ["classifier", "pre_classifier"],
    "llama": ["score"],
}


@pytest.mark.parametrize("family", HEADS)
def test_new_head_is_found_trained_and_loaded(family: str, table: str, tmp_path: Path) -> None:
    model_id = write_model(tmp_path / "base", family)
    more = ("train.steps=6", "lora.method.probe_steps=3", "train.save_every=99")
    config = configured(model_id, table, tmp_path / "run", *more)
    model, tokenizer, missing = build(config, load_task(config.data))
    assert missing == HEADS[family]
    assert model.config.id2label == {0: "bad", 1: "good"} and model.config.num_labels == 2
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0

    result = run(config)["LoRA-drop"]
    adapter = adapter_of(config)
    saved = {key for key in load_file(adapter / "adapter.safetensors") if key.startswith("saved.")}
    head = [name for name in model.state_dict() if name.startswith(tuple(missing))]
    assert saved == {f"saved.{name}" for name in head}
    again, where = load_base(adapter)
    assert type(again) is type(model) and where == model_id and not again.training
    loradrop.load(again, adapter)
    _, dev = tokenize(load_task(config.data), tokenizer, config.data.max_length)
    batch = dict(collator("classification", tokenizer)([dev[i] for i in range(len(dev))]))
    batch = {k: v for k, v in batch.items() if k != "token_type_ids" or family == "bert"}
    with torch.no_grad():
        output = again(**batch)
    assert float(output.loss) == pytest.approx(result.metrics["loss"], rel=1e-4)


def test_base_that_cannot_be_loaded_is_named(
    trained: RunConfig, bert: str, table: str, tmp_path: Path
) -> None:
    adapter = adapter_of(trained)
    for load in (
        lambda: load_base(adapter, "not/there"),
        lambda: run(configured("not/there", table, tmp_path / "other")),
    ):
        with pytest.raises(ValueError, match="the model 'not/there' cannot be loaded: "):
            load()
    model, where = load_base(adapter, bert, "bfloat16")
    assert model.dtype == torch.bfloat16 and where == bert
    plain = torch.nn.TransformerEncoderLayer(8, 2)
    loradrop.inject(plain, loradrop.LoRAConfig(r=2, target_modules=["linear1"]))
    loradrop.save(plain, tmp_path / "plain")
    refusal = r"not name a model to load \(class TransformerEncoderLayer, id None\)"
    with pytest.raises(ValueError, match=refusal):
        load_base(tmp_path / "plain")


def test_run_with_arms(
    bert: str, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ("arms.LoRA.method=lora", "arms.LoRA of half the rank={r: 2, method: lora}")
    more = ("train.steps=48", "train.log_every=1")
    config = configured(bert, table, tmp_path, *arms, *more)
    results = run(config)
    assert list(results) == ["LoRA", "LoRA of half the rank", "LoRA-drop"]
    full, half, ours = results.values()
    assert full.parameters == 2 * half.parameters == 6 * 4 * 64
    assert ours.parameters < full.parameters and len(ours.plan.kept) == 2
    assert {result.steps for result in results.values()} == {48}
    for result in results.values():
        assert result.metrics["accuracy"] > 0.8
        assert sum("eval_accuracy" in entry for entry in result.history) == 5 + 1  # and at the end
        assert sum(losses(result)[-3:]) < 0.5 * sum(losses(result)[:3])
        assert result.plan.config.modules_to_save == ("classifier",)
        assert result.plan.base["id"] == bert
        assert result.plan.data == load_task(config.data).fingerprint
    # The head starts alike in every arm, and so does the first batch.
    first = [result.history[0]["loss"] for result in results.values()]
    assert first[0] == pytest.approx(first[1], rel=1e-3) == pytest.approx(first[2], rel=1e-3)

    files = {"config.yaml", "plan.json", "importance.png", "loss.png", "report.html"}
    folders = {"lora", "lora-of-half-the-rank", "lora-drop"}
    assert {path.name for path in tmp_path.iterdir()} == files | folders
    assert json.loads((tmp_path / "plan.json").read_text())["kept"] == list(ours.plan.kept)
    for picture in ("importance.png", "loss.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "LoRA of half the rank" in page and f"{ours.parameters:,}" in page
    assert f"loradrop train {tmp_path / 'config.yaml'} output=NEW_FOLDER" in page
    printed = capsys.readouterr().out
    assert f"{ours.parameters:,}" in printed and "dev accuracy" in printed

    assert read_config(tmp_path / "config.yaml").to_dict() == config.to_dict()
    before = {path: load_file(path) for path in tmp_path.rglob("adapter/adapter.safetensors")}
    before = {path: {k: t.clone() for k, t in old.items()} for path, old in before.items()}
    again = run(read_config(tmp_path / "config.yaml"), resume=True)
    assert [again[name].metrics for name in results] == [r.metrics for r in results.values()]
    for path, old in before.items():
        new = load_file(path)
        assert all(torch.equal(old[key], new[key]) for key in {*old, *new})
    with pytest.raises(ValueError, match="holds a run already"):
        run(config)


@pytest.mark.parametrize("kind", ["numbers", "pairs", "several", "tags"])
def test_each_kind_of_label(kind: str, bert: str, tmp_path: Path) -> None:
    data = write_table(tmp_path / "table.jsonl", kind)
    config = configured(bert, data, tmp_path / "run", "train.steps=96")
    task = load_task(config.data)
    expected = {
        "numbers": ("regression", 1, "pearson"),
        "pairs": ("classification", 2, "accuracy"),
        "several": ("multi_label_classification", 3, "micro_f1"),
        "tags": ("token_classification", 2, "accuracy"),
    }
    model, tokenizer, _ = build(config, task)
    assert (task.kind, model.config.num_labels, task.metric) == expected[kind]
    if kind == "pairs":
        row = tokenize(task, tokenizer, 16)[0][0]
        assert set(row["token_type_ids"]) == {0, 1}
    assert run(config)["LoRA-drop"].metrics[task.metric] > 0.8
    again, _ = load_base(adapter_of(config))
    assert type(again) is type(model) and again.config.num_labels == model.config.num_labels
    for name in ("id2label", "label2id"):  # a merged model says them
        assert getattr(again.config, name) == getattr(model.config, name)
    if kind in ("numbers", "several"):  # the outputs are not those of one class each
        assert again.config.problem_type == model.config.problem_type == task.kind
    begun = json.loads((adapter_of(config).parent / "options.json").read_text())
    assert begun["model"].keys() == {"class", "id", "revision", "fingerprint"}  # as ever
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(label in page for label in task.labels)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_head_for_other_classes_is_made_anew(
    family: str, table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trained whole, with what of it had the right shape, and loaded again."""
    base = write_model(tmp_path / "base", family)
    there = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    there.save_pretrained(base)
    config = configured(base, table, tmp_path / "run", "train.steps=6", "lora.method.probe_steps=3")
    with caplog.at_level(logging.INFO, "loradrop"):
        model, _, missing = build(config, load_task(config.data))
        build(config, load_task(config.data))
    said = [r.getMessage() for r in caplog.records if "made anew" in r.getMessage()]
    last = "classifier" if family == "bert" else "classifier.out_proj"
    assert len(said) == 1 and f"{last}.weight is (3, 32) and should be (2, 32)" in said[0]
    assert missing == ["classifier"] and model.config.id2label == {0: "bad", 1: "good"}
    run(config)
    saved = read(adapter_of(config)).trained
    again, _ = load_base(adapter_of(config))
    loradrop.load(again, adapter_of(config))
    assert {*saved} == {name for name in again.state_dict() if name.startswith("classifier.")}
    assert saved[f"{last}.weight"].shape == (2, 32)
    for name, value in saved.items():
        assert torch.equal(again.state_dict()[name], value)
        old = there.state_dict()[name]
        assert old.shape != value.shape or not torch.equal(old, value), "trained"


def test_other_weights_than_the_config_says_are_refused(table: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 40}))
    config = configured(base, table, tmp_path / "run")
    refusal = r"word_embeddings\.weight is \(32, 32\) and should be \(40, 32\) by its config\.json"
    with pytest.raises(ValueError, match=refusal):
        build(config, load_task(config.data))


@pytest.mark.parametrize("kind", ["text", "words"])
def test_words_are_tokens_as_in_a_text(kind: str, tmp_path: Path) -> None:
    """RoBERTa's tokens know whether a space stands before them."""
    vocabulary = {
        t: i for i, t in enumerate(["<s>", "</s>", "<pad>", "<unk>", "Ġ", "a", "b", "Ġb"])
    }
    options = {"vocab": vocabulary, "merges": [("Ġ", "b")], "pad_token": "<pad>"}
    RobertaTokenizer(**options).save_pretrained(tmp_path)
    AutoModel.from_config(AutoConfig.for_model("roberta", **BERT)).save_pretrained(tmp_path)
    rows = {
        "text": '{"text": "a b", "label": 0}\n{"text": "a b", "label": 1}',
        "words": '{"tokens": ["a", "b"], "tags": [0, 1]}',
    }
    (tmp_path / "t.jsonl").write_text(rows[kind])
    path = str(tmp_path / "t.jsonl")
    config = configured(str(tmp_path), path, tmp_path / "run", f"data.dev={path}")
    tokenizer = build(config, load_task(config.data))[1]
    tokens = tokenize(load_task(config.data), tokenizer)[0][0]["input_ids"]
    assert vocabulary["Ġb"] in tokens and vocabulary["b"] not in tokens


def test_causal_language_model(tmp_path: Path) -> None:
    model_id = write_model(tmp_path / "base", "llama")
    data = write_table(tmp_path / "table.jsonl", "causal")
    more = ("train.steps=40", "lora.target_modules=all-linear")
    config = configured(model_id, data, tmp_path / "run", *more)
    assert load_task(config.data).kind == "causal_lm"
    result = run(config)["LoRA-drop"]
    assert result.metrics.keys() == {"loss"} and result.metrics["loss"] < 0.6 * losses(result)[0]
    kinds = {f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {target.kind for target in result.plan.targets} == kinds
    adapter = adapter_of(config)
    model, _ = load_base(adapter)
    loradrop.load(model, adapter)
    generated = model.generate(torch.tensor([[2, 5, 6]]), max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 3


def test_conversations(tmp_path: Path) -> None:
    model_id = write_model(tmp_path / "base", "llama")
    data = write_table(tmp_path / "table.jsonl", "chat")
    config = configured(model_id, data, tmp_path / "run", "train.steps=40")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        run(config)
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}[SEP]{% endfor %}"
    tokenizer.save_pretrained(model_id)
    result = run(config)["LoRA-drop"]
    assert result.metrics["loss"] < 0.7 * losses(result)[0]


def test_other_ranks_than_the_first_write_nothing_of_the_run(
    bert: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("loradrop.command.run.is_first_rank", lambda: False)
    config = configured(bert, table, tmp_path / "out", "train.steps=6")
    warm_up_run(config)
    assert run(config, resume=True)["LoRA-drop"].steps == 6
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora-drop"]
    assert not capsys.readouterr().out


def test_an_arm_that_is_stopped_ends_the_run(
    bert: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one does not begin, and a resume goes on to the end of both."""
    config = configured(bert, table, tmp_path, "arms.LoRA.method=lora")
    with monkeypatch.context() as patch:
        stops = Stops("main", "on_step_end", 3, by_signal=False)
        patch.setattr("loradrop.training.stages.Progress", lambda _: stops)
        with pytest.raises(RuntimeError, match=r"^LoRA was stopped at step 3: .*--resume, goes"):
            run(config)
    assert not (tmp_path / "lora-drop").exists() and not (tmp_path / "plan.json").exists()
    results = run(config, resume=True)
    assert {result.steps for result in results.values()} == {config.train.steps}


def test_plain_lora_alone_has_no_heat_map(bert: str, table: str, tmp_path: Path) -> None:
    more = ("lora.method=lora", "name=LoRA", "train.steps=3")
    results = run(configured(bert, table, tmp_path, *more))
    assert results["LoRA"].plan.scores is None
    assert (tmp_path / "report.html").exists() and not (tmp_path / "importance.png").exists()


def test_warm_up_alone_and_then_the_run(
    trained: RunConfig, bert: str, table: str, tmp_path: Path
) -> None:
    config = configured(bert, table, tmp_path / "two")
    plan = warm_up_run(config)
    assert plan.warmup["steps"] == 4 and len(plan.kept) == 2
    file = tmp_path / "two" / "plan.json"
    assert json.loads(file.read_text())["kept"] == list(plan.kept)
    two = run(config, resume=True)["LoRA-drop"]
    one = json.loads((folder_of(trained, "LoRA-drop") / "result.json").read_text())
    assert (two.metrics, two.history) == (one["metrics"], one["history"])
    assert two.plan == read(adapter_of(trained)).plan == plan


@pytest.mark.parametrize(
    ("option", "named"),
    [("data.max_length=8", "rows: max_length"), ("model.dtype=bfloat16", "parameters: dtype")],
)
def test_a_resume_reads_the_data_and_the_model_alike(
    option: str, named: str, bert: str, table: str, tmp_path: Path
) -> None:
    plan = warm_up_run(configured(bert, table, tmp_path))
    assert not {"max_length", "dtype"} & plan.data.keys()
    with pytest.raises(ValueError, match=rf"begun with other options \({named}\)"):
        run(configured(bert, table, tmp_path, option), resume=True)


def test_the_best_model_of_the_command(bert: str, table: str, tmp_path: Path) -> None:
    """dev is measured where a checkpoint is made."""
    more = ("train.save_every=2", "train.extra.load_best_model_at_end=true", "lora.method=lora")
    results = run(configured(bert, table, tmp_path, "train.steps=6", "name=LoRA", *more))
    measured = {entry["step"] for entry in results["LoRA"].history if "eval_loss" in entry}
    assert measured == {2, 4, 6}


def test_measure_is_an_offline_probe(trained: RunConfig) -> None:
    config, adapter = trained, adapter_of(trained)
    model, _ = load_base(adapter)
    loradrop.load(model, adapter)
    task = load_task(config.data)
    _, tokenizer, _ = build(config, task)
    for split, rows in zip(("train", "dev"), tokenize(task, tokenizer, 16), strict=True):
        batches = list(DataLoader(rows, batch_size=6, collate_fn=collator(task, tokenizer)))
        for count in (None, 1):
            _, scores = measure(config, adapter, split=split, batches=count)
            assert dict(scores) == dict(loradrop.probe(model, batches[:count]))
            assert scores.source == "offline" and len(scores.rows) == (count or len(batches))


def test_every_method_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As an arm of one run: it trains, and its adapter loads and exports."""
    base, table = write_model(tmp_path / "base"), write_table(tmp_path / "films.csv")
    names = [name for name in available() if name != "lora_drop"]
    arms = [f"arms.{name}.method={name}" for name in names]
    settings = [f"model={base}", f"data={table}", "data.max_length=16", f"output={tmp_path}"]
    settings += ["lora.r=4", "train.steps=5", "train.batch_size=6", *arms]
    assert main(["train", *settings]) == 0
    for name in (*names, "LoRA-drop"):
        folder = folder_of(RunConfig(output=str(tmp_path)), name)
        result = json.loads((folder / "result.json").read_text())
        assert result["steps"] == 5 and 0.0 <= result["metrics"]["accuracy"] <= 1.0, name
        model, _ = load_base(folder / "adapter")
        bank = loradrop.load(model, folder / "adapter")
        assert bank.trainable == result["parameters"], name
        loradrop.export(model, tmp_path / "peft" / name, base_id=base)
    assert "none was made" not in caplog.text  # of a warm-up, which `fit` has yet to end then
