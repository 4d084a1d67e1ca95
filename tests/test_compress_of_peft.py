"""`loradrop compress` of folders that PEFT itself wrote, in each of its forms."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import Capsys, fails, works
from run_cases import WORDS, write_model, write_table
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import loradrop
from loradrop.formats.peft_file import TENSORS, read
from loradrop.spectral.spectra import spectrum_of
from loradrop.statistics.gram_sums import grams_of

peft = pytest.importorskip("peft")
R = 8
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["query", "value"]},
    "rslora": {"target_modules": ["query", "key", "value"], "use_rslora": True},
    "patterns": {
        "target_modules": ["query", "value", "dense"], "alpha_pattern": {"value": 3},
        "rank_pattern": {"query": 2, "layer.1.attention.self.value": 5},
    },
    "head": {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    "embeddings": {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models and a table."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "base")
    write_model(folder / "llama", "llama")
    write_table(folder / "films.csv")
    return folder


def base_of(place: Path, form: str) -> Any:
    if form == "embeddings":
        return AutoModelForCausalLM.from_pretrained(place / "llama")
    torch.manual_seed(0)  # the head
    return AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=2)


def written(place: Path, form: str) -> Path:
    """The folder of an adapter with values as if it were trained."""
    folder = place / form
    if not folder.exists():
        kind = "CAUSAL_LM" if form == "embeddings" else "SEQ_CLS"
        config = peft.LoraConfig(r=R, lora_alpha=16, task_type=kind, **FORMS[form])
        model = peft.get_peft_model(base_of(place, form), config)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            nn.init.normal_(parameter.data, std=0.2)
        model.save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 5 + 8)[None] % (len(WORDS) + 5)
    with torch.no_grad():
        found: torch.Tensor = model.eval().double()(input_ids=ids).logits
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_peft_and_we_load_the_same(
    form: str, padded: bool, place: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """The logits are those of the cut in Python, the size is within the budget, and the source is
    as it was.
    """
    source, out = written(place, form), tmp_path / "small"
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    flags = ["--padded"] * padded
    works(capsys, "compress", source, "--budget", 0.5, "--out", out, *flags)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    cut = base_of(place, form)
    loradrop.load(cut, source)
    full = cut.lora_bank.trainable
    bank = cut.lora_bank
    found = spectrum_of(bank.targets, grams_of(bank), "weight")
    loradrop.truncate(cut, loradrop.allocate(found, budget=0.5), metric="weight")
    theirs = peft.PeftModel.from_pretrained(base_of(place, form), out)
    ours = base_of(place, form)
    loradrop.load(ours, out)
    assert_close(logits(theirs), logits(cut), rtol=1e-5, atol=1e-5)
    assert_close(logits(ours), logits(cut), rtol=1e-5, atol=1e-5)
    ranks = {len(A) for A, _ in read(out).modules.values()}
    size = sum(A.numel() + B.numel() for A, B in read(out).modules.values())
    assert ranks == {R} if padded else size <= 0.5 * full


def test_a_model_that_it_does_not_fit_is_named(place: Path, capsys: Capsys) -> None:
    """Also where PEFT's list of modules that are trained whole matches nothing in the file."""
    source = written(place, "plain")
    said = f"{source}: it is an adapter for another model ({place / 'base'}): this Llama"
    fails(capsys, said, "compress", source, f"model={place / 'llama'}", "--dry-run")


def test_one_that_was_never_trained_is_refused(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    shutil.copytree(written(place, "plain"), source := tmp_path / "zero")
    tensors = load_file(source / TENSORS)
    save_file({k: t * 0 if "lora_B" in k else t for k, t in tensors.items()}, source / TENSORS)
    for more in ((), (f"data={place / 'films.csv'}",)):
        fails(capsys, f"{source} does nothing, as every direction", "compress", source, *more)


def test_values_that_overflow_are_refused(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    shutil.copytree(written(place, "plain"), source := tmp_path / "huge")
    tensors = load_file(source / TENSORS)
    save_file({k: t * 1e25 if "lora_" in k else t for k, t in tensors.items()}, source / TENSORS)
    said = "returns logits that are not finite, so no labels can be drawn"
    fails(capsys, said, "compress", source, f"data={place / 'films.csv'}", "--dry-run")


@pytest.mark.parametrize("form", ["plain", "rslora"])
def test_one_rank_for_all_by_weights_is_peft_s_conversion(form: str, place: Path) -> None:
    """The rival of the benchmarks, which `save_as_lora` and `convert_to_lora` of PEFT make."""
    conversion = pytest.importorskip("peft.tuners.lora.conversion")
    source, k = written(place, form), 2
    model = peft.PeftModel.from_pretrained(base_of(place, form), source)
    config, tensors = conversion.convert_to_lora(model, k)
    assert config.r == config.lora_alpha == k
    cut = base_of(place, form)
    loradrop.load(cut, source)
    ranks = {target.name: k for target in cut.lora_bank.targets}
    loradrop.truncate(cut, ranks, metric="weight")
    for i, target in enumerate(cut.lora_bank.targets):
        (A,) = (t for key, t in tensors.items() if f"{target.name}.lora_A" in key)
        (B,) = (t for key, t in tensors.items() if f"{target.name}.lora_B" in key)
        assert_close(cut.lora_bank.delta(i), B @ A, rtol=1e-4, atol=1e-5)
