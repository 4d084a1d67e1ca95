"""Injection: nothing changes, and only adapters and the head train."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import Make, Options, assert_same, snapshot, wake
from safetensors.torch import load_file
from surgery_models import (
    IDS,
    WIDTH,
    Net,
    R,
    Twice,
    config,
    each_model,
    injected,
    names,
    output,
    train,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import loradrop
from loradrop import LoRAConfig
from loradrop.layers import LoRALinear

pytestmark = pytest.mark.numbers


@each_model
def test_nothing_changes_at_injection(make: Make, targets: list[str]) -> None:
    model = make()
    expected, before = output(model), model.state_dict()
    bank = loradrop.inject(model, config(*targets))
    assert torch.equal(output(model), expected)
    assert bank is model.lora_bank and len(bank.targets) >= 4
    state = model.state_dict()
    base = {k: v for k, v in state.items() if not k.startswith("lora_bank.")}
    assert list(base) == list(before) and all(torch.equal(base[k], before[k]) for k in base)
    assert len(state) == len(base) + 2 * len(bank.targets) + 1  # and who shares
    assert not any(B.any() for B in bank.B) and all(A.any() for A in bank.A)


@each_model
def test_only_adapters_and_the_head_train(make: Make, targets: list[str]) -> None:
    model = make()
    bank = loradrop.inject(model, config(*targets))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in trainable if name.startswith("lora_bank.")}
    assert len(adapters) == 2 * len(bank.targets)
    head = {n for n, _ in model.named_parameters() if n.startswith("classifier.")}
    assert trainable == adapters | head
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model)
    buffers = {name for name, _ in model.named_buffers() if name.startswith("classifier.")}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key not in trainable | buffers), key
    y = model(IDS)
    (y if isinstance(y, Tensor) else y.logits).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable


@pytest.mark.parametrize("saved", [["norm"], []])
def test_modules_to_save(saved: list[str]) -> None:
    model = injected(modules_to_save=saved)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_bank" not in n} == {
        f"layers.{i}.{m}.{part}" for m in saved for i in range(3) for part in ("weight", "bias")
    }


def family(name: str, config: str, **sizes: Any) -> Any:
    options = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    options |= dict(intermediate_size=8, encoder_layers=1, decoder_layers=1, num_mel_bins=4)
    options |= dict(encoder_attention_heads=2, decoder_attention_heads=2)
    return getattr(transformers, name)(getattr(transformers, config)(**options | sizes))


FAMILIES: dict[str, tuple[str, Options, set[str]]] = {
    "BertForTokenClassification": ("BertConfig", {}, {"classifier"}),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8},
        {"pre_classifier", "classifier"},
    ),
    "BartForSequenceClassification": ("BartConfig", {"d_model": 8}, {"classification_head"}),
    "XLNetForSequenceClassification": (
        "XLNetConfig",
        {"d_model": 8, "n_layer": 1, "n_head": 2},
        {"sequence_summary", "logits_proj"},
    ),
    "ElectraForMultipleChoice": ("ElectraConfig", {}, {"sequence_summary", "classifier"}),
    "WhisperForAudioClassification": ("WhisperConfig", {"d_model": 8}, {"classifier"}),
    "BertForMaskedLM": ("BertConfig", {}, set()),
    "BertForPreTraining": ("BertConfig", {}, set()),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_of_transformers(name: str, caplog: pytest.LogCaptureFixture) -> None:
    made, sizes, heads = FAMILIES[name]
    model = family(name, made, **sizes)
    loradrop.inject(model, config(target_modules="all-linear"))
    trained = {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_bank"} | heads
    assert ("encoder, projector is not" in caplog.text) == ("Whisper" in name)


def test_heads_of_any_model() -> None:
    """By the ends of their names, once, and in no layer of a stack."""
    model = Net()
    model.layers[0].score, model.pre_classifier = nn.Linear(2, 2), nn.Linear(2, 2)
    model.heads = nn.ModuleDict({"score": nn.ModuleDict({"score": nn.Linear(2, 2)})})
    loradrop.inject(model, config())
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    heads = {"classifier.0", "classifier.1", "pre_classifier", "heads.score.score"}
    assert {name for name in trained if "lora" not in name} == heads


def layers(*kinds: str, of: Iterable[int] = range(3)) -> list[str]:
    return [f"layers.{i}.{kind}" for i in of for kind in kinds]


NOT_ONE = {"exclude_modules": ["layers.1.query"], "strict": False}
TARGETS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "suffix": (["query"], {}, layers("query")),
    "full names": (["layers.2.value", "layers.0.query"], {}, ["layers.0.query", "layers.2.value"]),
    "regex": (r"layers\.[02]\.(query|mix)", {"strict": False}, layers("query", "mix", of=(0, 2))),
    "all-linear": ("all-linear", {}, layers("query", "value", "mix")),
    "default": (None, {}, layers("query", "value")),
    "but one": (["query"], NOT_ONE, layers("query", of=(0, 2))),
}


@pytest.mark.parametrize(("targets", "options", "expected"), TARGETS.values(), ids=TARGETS)
def test_which_modules_are_targets(targets: Any, options: Options, expected: list[str]) -> None:
    bank = loradrop.inject(Net(), LoRAConfig(r=R, target_modules=targets, **options))
    assert names(bank) == expected


def test_rank_and_scaling_patterns() -> None:
    options = {"rank_pattern": {"value": 2}, "alpha_pattern": {r"layers\.1\.query": 9}}
    bank = loradrop.inject(Net(), config(lora_alpha=6, **options))
    for target, s in zip(bank.targets, bank.scaling, strict=True):
        assert target.r == (2 if target.kind == "value" else R)
        alpha = 9 if target.name == "layers.1.query" else 6
        assert s == alpha / target.r
    assert loradrop.inject(Net(), config(lora_alpha=6, use_rslora=True)).scaling[0] == 6 / R**0.5


def test_a_pattern_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: `re` itself forgets some where there is one for each target."""
    compiled, compile = [], re.compile
    monkeypatch.setattr(re, "compile", lambda key: compiled.append(key) or compile(key))
    patterns = {f"once{i}": 2 for i in range(600)}
    found = config(rank_pattern=patterns)
    assert [found.rank(f"x.{name}") for name in [*patterns, "other"] * 2] == [*[2] * 600, R] * 2
    assert len(compiled) == len(patterns)


def test_a_module_reached_twice_is_adapted_once() -> None:
    model = Twice()
    x = torch.randn(4, WIDTH)
    before = snapshot(model)
    bank = loradrop.inject(model, config("first"))
    assert len(bank.targets) == 1 and type(model.second) is LoRALinear
    wake(model, 0.25)
    layer, h = model.first, model.first(x).tanh()
    seen = [layer(v) - nn.functional.linear(v, layer.weight, layer.bias) for v in (x, h)]
    expected = sum(float(delta.detach().square().sum()) for delta in seen)
    assert loradrop.probe(model, [x])["first"] == pytest.approx(expected, rel=1e-5)
    loradrop.remove(model)
    assert_same(model, before)


@pytest.mark.parametrize("wrap_first", [True, False])
def test_torchs_activation_checkpointing(wrap_first: bool, tmp_path: Path) -> None:
    """FSDP and others wrap blocks, before or after `inject`: names are those of the model still."""
    plain, model = injected(), Net()
    before = output(model)
    blocks = set(model.layers)
    if not wrap_first:
        loradrop.inject(model, config())
    apply_activation_checkpointing(model, check_fn=blocks.__contains__)
    if wrap_first:
        loradrop.inject(model, config())
    assert names(model.lora_bank) == names(plain.lora_bank)
    loradrop.save(plain, tmp_path / "plain")
    loradrop.load(model, tmp_path / "plain")
    torch.testing.assert_close(output(model), output(plain))
    train(model)
    loradrop.save(model, tmp_path / "wrapped")
    loradrop.load(plain, tmp_path / "wrapped")
    expected = output(plain)
    torch.testing.assert_close(output(model), expected)
    assert (expected - before).abs().max() > 0.01
    files = []
    for each in (plain, model):
        loradrop.export(each, tmp_path / "peft")
        files.append(load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    loradrop.merge(model, keep_original=True)
    torch.testing.assert_close(output(model), expected)
    loradrop.remove(model)
    torch.testing.assert_close(output(model), before)


def test_one_name_where_several_may_stand() -> None:
    """It is one name, not its letters."""
    model = injected()
    loradrop.share(model, "layers.1.query")
    assert model.lora_bank.assignment.kept == ("layers.1.query",)
