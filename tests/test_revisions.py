"""Adapters of a base whose revision was named: everything that is done with them takes that one,
weights and tokenizer, from a cache of the Hub.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cli_cases import Capsys, command, works
from run_cases import write_model, write_table
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoTokenizer

import loradrop
from loradrop.command.adapter_bases import load_base, tokenizer_for
from loradrop.files import read_json, write_json
from loradrop.injection import plan_of
from loradrop.integrations.peft import LoraDropConfig
from loradrop.origin import commit_of

ID, V1, MAIN = "someone/base", "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`ID` at two revisions: "v1", and "main" with other weights and another vocabulary."""
    repository = tmp_path / "hub" / f"models--{ID.replace('/', '--')}"
    one = repository / "snapshots" / V1
    write_model(one)
    other = Path(shutil.copytree(one, repository / "snapshots" / MAIN))
    tokenizer = read_json(other / "tokenizer.json")
    words = tokenizer["model"]["vocab"]
    words |= {"good": words["bad"], "bad": words["good"]}
    write_json(other / "tokenizer.json", tokenizer)
    model = Classifier.from_pretrained(one).bert
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.0)
    model.save_pretrained(other)
    (repository / "refs").mkdir()
    for name, commit in {"main": MAIN, "v1": V1}.items():
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


@pytest.fixture
def adapter(cache: Path, tmp_path: Path, capsys: Capsys) -> Path:
    data = f"data={write_table(tmp_path / 'films.csv')}"
    options = ("lora.r=2", "train.steps=4", "lora.method.probe_steps=2", "data.max_length=16")
    run = f"output={tmp_path / 'run'}"
    works(capsys, "train", f"model={ID}", "model.revision=v1", data, run, *options)
    return tmp_path / "run" / "lora-drop" / "adapter"


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**tokenizer("a good film", return_tensors="pt")).logits
    return found


def as_trained(adapter: Path) -> torch.Tensor:
    model = Classifier.from_pretrained(ID, revision="v1")
    loradrop.load(model, adapter)
    return logits(model, AutoTokenizer.from_pretrained(ID, revision="v1"))


def test_the_command_goes_on_with_the_revision_that_was_trained_on(
    adapter: Path, tmp_path: Path, capsys: Capsys
) -> None:
    assert read_json(adapter / "plan.json")["base"]["revision"] == V1
    works(capsys, "merge", adapter, tmp_path / "merged")
    merged = Classifier.from_pretrained(tmp_path / "merged")
    found = logits(merged, AutoTokenizer.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, as_trained(adapter))
    works(capsys, "export", adapter, tmp_path / "peft")
    works(capsys, "compress", tmp_path / "peft", "--out", tmp_path / "small", "--budget", 1)
    for folder in ("peft", "small"):
        assert read_json(tmp_path / folder / "adapter_config.json")["revision"] == V1
        assert f"revision='{V1}'" in (tmp_path / folder / "README.md").read_text()
        works(capsys, "verify", adapter, tmp_path / folder)
        base, _ = load_base(tmp_path / folder)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / folder)
        found = logits(theirs, tokenizer_for(tmp_path / folder, base))
        torch.testing.assert_close(found, as_trained(adapter), rtol=1e-4, atol=1e-5)


def test_another_revision_is_taken_where_it_is_asked_for(
    adapter: Path, tmp_path: Path, capsys: Capsys, caplog: pytest.LogCaptureFixture
) -> None:
    for more, commit in (((), V1), (("--model", ID), V1), (("--revision", "main"), MAIN)):
        caplog.clear()
        works(capsys, "export", adapter, tmp_path / commit, *more)
        assert read_json(tmp_path / commit / "adapter_config.json")["revision"] == commit
        told = f"at revision {V1}, and this model is of revision {MAIN}" in caplog.text
        assert told == (commit == MAIN)


def test_a_revision_that_is_gone_is_named(cache: Path, adapter: Path, capsys: Capsys) -> None:
    shutil.rmtree(cache / "snapshots" / V1)
    for more in ((), ("--model", ID)):
        status, _, error = command(capsys, "merge", adapter, adapter.parent / "merged", *more)
        assert status == 2 and f"the model {ID!r} at revision {V1} cannot be loaded" in error


def test_a_run_that_resumes_finds_the_commit_that_it_began_with(
    cache: Path, adapter: Path, tmp_path: Path, capsys: Capsys
) -> None:
    (cache / "refs" / "v1").write_text(MAIN)
    config = tmp_path / "run" / "config.yaml"
    status, _, error = command(capsys, "train", config, "--resume", "train.steps=4")
    assert status == 2 and "was begun with other options (model: revision)" in error


@pytest.mark.parametrize("kind", [peft.LoraConfig, LoraDropConfig], ids=["LORA", "LORADROP"])
def test_a_revision_that_peft_knows_is_kept(cache: Path, tmp_path: Path, kind: Any) -> None:
    base = Classifier.from_pretrained(ID, revision="v1")
    config = kind(r=2, task_type="SEQ_CLS")
    peft.get_peft_model(base, config, revision="v1").save_pretrained(tmp_path / "theirs")
    assert read_json(tmp_path / "theirs" / "adapter_config.json")["revision"] == "v1"
    model = Classifier.from_pretrained(ID, revision="v1")
    loradrop.load(model, tmp_path / "theirs")
    assert plan_of(model).base["revision"] == "v1"
    loradrop.export(model, tmp_path / "ours")
    assert read_json(tmp_path / "ours" / "adapter_config.json")["revision"] == "v1"


def test_the_commit_of_a_revision(cache: Path, tmp_path: Path, caplog: Any) -> None:
    assert [commit_of(ID, of) for of in (None, "main", "v1", V1)] == [MAIN, MAIN, V1, V1]
    for name in ("someone/else", str(tmp_path), "not an id!", "a/b/c"):
        assert (commit_of(name, "v1"), commit_of(name, None)) == ("v1", None)
    model = Classifier.from_pretrained(ID)
    model.config._commit_hash = "v1"  # a name, as PEFT has it
    loradrop.inject(model, loradrop.LoRAConfig(r=2))
    loradrop.save(model, tmp_path / "saved")
    loradrop.remove(model)
    for of, said in ((V1, False), ("v1", False), (MAIN, True), ("main", True), ("gone", False)):
        model.config._commit_hash = of
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loradrop.load(model, tmp_path / "saved")
        loradrop.remove(model)
        assert ("and this model is of revision" in caplog.text) == said


def test_the_packaged_model_has_no_revisions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from loradrop.command.base_models import MINILM, resolve_model

    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert resolve_model(MINILM) == str(tmp_path / "model")
    assert resolve_model(MINILM, "main") == MINILM
