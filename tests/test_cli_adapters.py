"""The command over a trained adapter: `export`, `merge` and `verify`, and which base it goes on."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from cli_cases import Capsys, adapter, command, fails, work, works
from run_cases import write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import loradrop
from loradrop.command.adapter_bases import load_base, tokenizer_for
from loradrop.command.cli import Dtype
from loradrop.config import DTYPES

__all__ = ["adapter", "work"]  # fixtures


def test_a_base_that_lies_elsewhere(
    work: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder named from where the run was: the option that names it from here is said."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(work)
    given = ("model=base", "data=films.csv", "data.max_length=16", f"output={tmp_path / 'run'}")
    works(capsys, "train", *given, "lora.method=lora", "lora.target_modules=query", "train.steps=2")
    adapter, out = tmp_path / "run" / "lora" / "adapter", tmp_path / "merged"
    assert json.loads((adapter / "plan.json").read_text())["base"]["id"] == "base"
    monkeypatch.chdir(tmp_path)
    data = (f"data={work / 'films.csv'}", "data.max_length=16")
    for option, arguments in {
        "--model": (("export", adapter, out), ("merge", adapter, out), ("verify", adapter, out)),
        "model=": (("compress", adapter, *data), ("probe", "--adapter", adapter, *data)),
    }.items():
        for line in arguments:
            elsewhere = f"{adapter} names it. Where it lies elsewhere, give its folder or id with "
            fails(capsys, f"the model 'base' cannot be loaded: {elsewhere}{option}. ", *line)
    works(capsys, "merge", adapter, out, "--model", work / "base")
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    works(capsys, "export", adapter, tmp_path / "peft", "--model", work / "base")
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "num_labels=2, id2label={0: 'bad', 1: 'good'})" in card
    nothing = ("verify", adapter, "none", "--model", work / "base")
    fails(capsys, "none holds no adapter of PEFT and no merged model: give the folder", *nothing)
    said = f"{tmp_path / 'peft' / 'plan.json'} is not there, as PEFT's format has no plan: give"
    fails(capsys, said, "plan", "show", tmp_path / "peft")


def test_the_adapter_of_a_run_is_named(
    work: Path, adapter: Path, tmp_path: Path, capsys: Capsys
) -> None:
    run = work / "run"
    arms = f"{run / 'lora-drop' / 'adapter'} or {run / 'lora' / 'adapter'}"
    for folder, below in ((adapter.parent, adapter), (run, arms)):
        for line in (("export", folder, tmp_path / "a"), ("compress", folder, "--dry-run")):
            said = f"give the folder loradrop.save wrote, or one of PEFT, which is {below}\n"
            fails(capsys, said, *line)


def test_a_merged_classifier_takes_several_texts(
    work: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """Llama's head has to know what fills a batch, which its base model did not say."""
    base = Path(write_model(tmp_path / "base", "llama"))
    config = json.loads((base / "config.json").read_text()) | {"pad_token_id": None}
    (base / "config.json").write_text(json.dumps(config))
    given = (f"model={base}", f"data={work / 'films.csv'}", "data.max_length=16")
    works(capsys, "train", *given, f"output={tmp_path / 'run'}", "method=lora", "train.steps=2")
    works(capsys, "merge", tmp_path / "run" / "lora" / "adapter", tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["pad_token_id"] == 0 and merged["id2label"] == {"0": "bad", "1": "good"}


def test_export_and_verify(adapter: Path, tmp_path: Path, capsys: Capsys) -> None:
    out = tmp_path / "peft"
    printed = works(capsys, "export", adapter, out)
    assert f"wrote {out}" in printed and "peft       takes it" in printed
    assert (out / "adapter_config.json").exists() and (out / "adapter_model.safetensors").exists()
    assert "logits (peft): ok" in works(capsys, "verify", adapter, out)
    works(capsys, "verify", adapter, out, "--engine", "peft", "--engine", "vllm")
    status, printed, _ = command(capsys, "verify", adapter, out, "--engine", "sglang")
    assert status == 1 and "sglang     refused" in printed and "logits (peft): ok" in printed
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_B" in key)
    save_file(tensors | {key: tensors[key] * 2}, file, {"format": "pt"})
    status, printed, _ = command(capsys, "verify", adapter, out)
    assert status == 1 and "WRONG" in printed


def test_a_tokenizer_beside_the_adapter_goes_along(
    work: Path, adapter: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """To an export, and from there to a cut, which read the data with it; the base's does not."""
    works(capsys, "export", adapter, tmp_path / "bare")
    assert not (tmp_path / "bare" / "tokenizer_config.json").exists()
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    base, _ = load_base(adapter)
    tokenizer = tokenizer_for(adapter, base)
    tokenizer.add_tokens(["marvellous"])
    tokenizer.save_pretrained(own)
    works(capsys, "export", own, tmp_path / "peft")
    works(capsys, "compress", tmp_path / "peft", "--out", tmp_path / "small")
    for folder in ("peft", "small"):
        found = tokenizer_for(tmp_path / folder, base)
        assert found.get_vocab() == tokenizer.get_vocab() and "marvellous" in found.get_vocab()


def test_export_options(work: Path, adapter: Path, tmp_path: Path, capsys: Capsys) -> None:
    assert get_args(Dtype) == tuple(DTYPES)
    narrow = tmp_path / "narrow"
    works(capsys, "export", adapter, narrow, "--dtype", "bfloat16")
    factors = {k: t.dtype for k, t in load_file(narrow / "adapter_model.safetensors").items()}
    assert {dtype for key, dtype in factors.items() if "lora_" in key} == {torch.bfloat16}
    works(capsys, "verify", adapter, narrow)
    works(capsys, "export", adapter, tmp_path / "own", "--unpadded")
    works(capsys, "verify", adapter, tmp_path / "own")
    r = [{t.shape[0] for k, t in load_file(tmp_path / folder / "adapter_model.safetensors").items()
          if "lora_A" in k} for folder in ("narrow", "own")]  # fmt: skip
    assert r == [{8}, {4}]
    out = ("export", adapter, tmp_path / "refused")
    fails(capsys, "sglang cannot take this adapter", *out, "--engine", "sglang")
    fails(capsys, "the model 'not/there' cannot be loaded", *out, "--model", "not/there")
    assert not (tmp_path / "refused").exists()
    # The same model under another path, without a tokenizer
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(work / "base" / name, moved)
    options = ("verify", adapter, narrow, "--model", moved)
    assert "comparing on arbitrary tokens" in works(capsys, *options)
    works(capsys, "export", adapter, tmp_path / "named", "--model", moved)
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved)


MERGES = {"merge": torch.float32, "export --format merged": torch.float32}
MERGES["merge --dtype bfloat16"] = torch.bfloat16


@pytest.mark.parametrize("line", MERGES)
def test_merge_and_verify(line: str, adapter: Path, tmp_path: Path, capsys: Capsys) -> None:
    out = tmp_path / "merged"
    assert f"wrote {out}" in works(capsys, *line.split(), adapter, out)
    dtypes = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
    assert dtypes == {MERGES[line]}
    assert (out / "tokenizer.json").exists()
    assert works(capsys, "verify", adapter, out).startswith("logits (merged): ok")
    model, _ = load_base(adapter)  # without the adapter
    model.save_pretrained(out)
    status, printed, _ = command(capsys, "verify", adapter, out)
    assert status == 1 and "DIFFER" in printed


def test_a_base_of_another_architecture_is_named(
    adapter: Path, tmp_path: Path, capsys: Capsys
) -> None:
    other = write_model(tmp_path / "llama", "llama")
    said = f"{adapter} was trained on a BertForSequenceClassification, and {other} is a llama"
    for line in (("export", adapter, tmp_path / "a"), ("merge", adapter, tmp_path / "a")):
        fails(capsys, said, *line, "--model", other)
    fails(capsys, said, "compress", adapter, f"model={other}", "--dry-run")
    assert not (tmp_path / "a").exists()


def test_a_base_stored_in_bfloat16_is_merged_as_it_is(
    work: Path, adapter: Path, tmp_path: Path, capsys: Capsys
) -> None:
    narrow = tmp_path / "narrow"
    AutoModel.from_pretrained(work / "base", dtype=torch.bfloat16).save_pretrained(narrow)
    base = ("--model", narrow)
    works(capsys, "merge", adapter, tmp_path / "merged", *base)
    merged = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert {tensor.dtype for tensor in merged} == {torch.bfloat16}
    assert "ok" in works(capsys, "verify", adapter, tmp_path / "merged", *base)
    works(capsys, "merge", adapter, tmp_path / "wide", *base, "--dtype", "float32")
    wide = load_file(tmp_path / "wide" / "model.safetensors").values()
    assert {tensor.dtype for tensor in wide} == {torch.float32}
    # The head in an adapter's file has its own digits
    works(capsys, "export", adapter, tmp_path / "peft", *base)
    works(capsys, "export", adapter, tmp_path / "from-float32")
    files = (tmp_path / name / "adapter_model.safetensors" for name in ("peft", "from-float32"))
    one, other = map(load_file, files)
    assert any("classifier" in name for name in one) and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_merge_goes_on_after_one_that_was_killed(
    adapter: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """And leaves no half of it, which is as large as the model."""
    works(capsys, "merge", adapter, tmp_path / "whole")
    out = tmp_path / "merged"
    (out / ".merged-abc").mkdir(parents=True)
    for name in (".merged-abc/model.safetensors", ".model.safetensors.0123abcd.tmp"):
        (out / name).write_bytes(b"half")
    works(capsys, "merge", adapter, out)
    names = [sorted(file.name for file in folder.iterdir()) for folder in (tmp_path / "whole", out)]
    assert names[0] == names[1]


def test_pickle_is_refused(tmp_path: Path, capsys: Capsys) -> None:
    torch.save({"A": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    for arguments in (("export", tmp_path, tmp_path / "out"), ("plan", "show", tmp_path)):
        fails(capsys, "is a pickle, which can run any code when it is loaded", *arguments)


def test_verify_without_text(tmp_path: Path, capsys: Capsys) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(**sizes, intermediate_size=24, image_size=8, patch_size=4))
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules="all-linear"))
    loradrop.save(model, tmp_path / "native")
    loradrop.export(model, tmp_path / "peft")
    message = "ViTModel takes pixel_values, and this command has text alone"
    fails(capsys, message, "verify", tmp_path / "native", tmp_path / "peft")
