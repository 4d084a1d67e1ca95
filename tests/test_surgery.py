"""Surgery: nothing changes at injection, only adapters and the head train, all can be undone."""

import copy
import logging
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from models import LM, Make, Options, assert_same, bert, build, gpt2, llama, snapshot, wake
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.utils import prune

import loradrop
from loradrop import LoRAConfig
from loradrop.layers import LoRALinear

pytestmark = pytest.mark.numbers

WIDTH, R = 8, 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mix, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mix(self.query(x).tanh() * self.value(x)))


class Net(nn.Module):
    """Embedding, three layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.classifier = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x.mean(1))


def config(*targets: str, **options: Any) -> LoRAConfig:
    options = {"target_modules": list(targets or ("query", "value")), **options}
    return LoRAConfig(r=R, **options)


def injected(*targets: str, **options: Any) -> Any:
    """A `Net` with B away from zero."""
    model = Net()
    loradrop.inject(model, config(*targets, **options))
    return wake(model, 0.25)


def names(bank: loradrop.AdapterBank) -> list[str]:
    return [target.name for target in bank.targets]


IDS = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def output(model: nn.Module) -> Tensor:
    """In eval mode, and the mode kept."""
    training = model.training
    with torch.no_grad():
        y = model.eval()(IDS)
    model.train(training)
    return y if isinstance(y, Tensor) else y.logits


def train(model: nn.Module) -> None:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        y = model(IDS)
        (y if isinstance(y, Tensor) else y.logits).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "net": (Net, ["query", "value"]),
    "bert": (bert, ["query", "value", "dense"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
}
each_model = pytest.mark.parametrize(("make", "targets"), MODELS.values(), ids=MODELS)


# Injection


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


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


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


# Removal and merging


@each_model
def test_remove_restores_the_model(make: Make, targets: list[str]) -> None:
    model = make()
    next(iter(model.parameters())).requires_grad_(False)
    expected, before = output(model), snapshot(model)
    loradrop.inject(model, config(*targets))
    train(model)
    assert not torch.equal(output(model), expected)
    loradrop.remove(model)
    assert_same(model, before)
    assert torch.equal(output(model), expected)
    with pytest.raises(ValueError, match="inject"):
        loradrop.remove(model)
    loradrop.inject(model, config(*targets))
    assert torch.equal(output(model), expected)


def test_remove_restores_buffers_that_training_moved() -> None:
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
    before = snapshot(model)
    loradrop.inject(model, config("1"))
    model.train()(torch.randn(6, WIDTH) + 3.0)
    loradrop.remove(model)
    assert_same(model, before)


@each_model
def test_merge_computes_what_the_adapters_did(make: Make, targets: list[str]) -> None:
    model = make()
    before = snapshot(model)
    loradrop.inject(model, config(*targets, lora_alpha=7))
    adapted = output(wake(model, 0.25))
    loradrop.merge(model)
    torch.testing.assert_close(output(model), adapted, **CLOSE)
    after = snapshot(model)
    state, was = after.pop("state"), before.pop("state")
    assert list(state) == list(was)
    assert (after["classes"], after["identity"]) == (before["classes"], before["identity"])
    assert not {"lora_bank", "save_pretrained"} & {*model.__dict__, *model._modules}
    changed = {k for k, v in state.items() if not torch.equal(v, was[k])}
    assert changed and all(k.endswith(".weight") for k in changed)
    with pytest.raises(ValueError, match="keep_original"):
        loradrop.remove(model)


@pytest.mark.parametrize("how", ["group", "none"])
def test_shared_and_dropped_adapters(how: str) -> None:
    model = Net()
    before = snapshot(model)
    loradrop.inject(model, config())
    loradrop.share(model, ["layers.1.value"], share=how)
    merged = wake(copy.deepcopy(model), 0.25)
    adapted = output(merged)
    loradrop.merge(merged)
    torch.testing.assert_close(output(merged), adapted, **CLOSE)
    weight = "layers.0.query.weight"
    assert torch.equal(merged.state_dict()[weight], before["state"][weight]) == (how == "none")
    train(model)
    loradrop.remove(model)
    assert_same(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(WIDTH, 5, r=R, lora_alpha=7, dtype=dtype)
    wake(layer, 0.25)
    A, B = (factor.detach().double() for factor in layer.lora_bank.factors(0))
    exact = layer.weight.detach().double() + 7 / R * B @ A
    loradrop.merge(layer)
    assert layer.weight.dtype == dtype
    limit = exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-6
    assert ((layer.weight.double() - exact).abs() <= limit).all()


def test_merge_can_be_undone() -> None:
    model = Net()
    before = snapshot(model)
    loradrop.inject(model, config())
    adapted = output(wake(model, 0.25))
    loradrop.merge(model, keep_original=True)
    torch.testing.assert_close(output(model), adapted, **CLOSE)
    assert not torch.equal(model.layers[0].query.weight, before["state"]["layers.0.query.weight"])
    with pytest.raises(ValueError, match="merged"):
        loradrop.merge(model)
    with pytest.raises(ValueError, match="merged"), loradrop.disabled(model):
        pass
    with pytest.raises(ValueError, match="merged"):
        loradrop.probe(model, [IDS])
    twin = copy.deepcopy(model)
    for each in (twin, model):
        loradrop.remove(each)
        assert torch.equal(output(each), output(Net()))
    assert_same(model, before)


def test_merge_then_inject_again() -> None:
    model = injected()
    loradrop.merge(model)
    before, merged = snapshot(model), output(model)
    loradrop.inject(model, config("mix"))
    assert torch.equal(output(model), merged)
    train(model)
    loradrop.remove(model)
    assert_same(model, before)


class Tied(Twice):
    """Two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("targets", [["first", "second"], ["second"]], ids=str)
def test_tied_weights_are_not_merged(targets: list[str]) -> None:
    model = Tied()
    with pytest.raises(ValueError, match=r"is tied.*second|second is tied"):
        loradrop.inject(model, config(*targets))
        loradrop.merge(wake(model))
    torch.testing.assert_close(model.first.weight, Tied().first.weight, rtol=0, atol=0)


def normed(module: nn.Linear) -> None:
    nn.utils.parametrizations.weight_norm(module)


def pruned(module: nn.Linear) -> None:
    prune.l1_unstructured(module, "weight", 0.5)


@pytest.mark.parametrize("change", [normed, nn.utils.spectral_norm, pruned])
def test_computed_weights_are_not_merged(change: Callable[[nn.Linear], Any]) -> None:
    net = Net()
    change(net.layers[1].mix)
    loradrop.inject(net, config("mix"))
    before = snapshot(wake(net))
    with pytest.raises(ValueError, match=r"weight of layers\.1\.mix is computed.*would be lost"):
        loradrop.merge(net)
    assert_same(net, before)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, math.inf), (torch.float16, 1e6)])
def test_a_merge_that_is_not_finite_changes_nothing(dtype: torch.dtype, size: float) -> None:
    net = injected("mix")
    net.to(dtype)
    net.lora_bank.float()
    wake(net)
    net.lora_bank.B[1].data *= size
    before = snapshot(net)
    with pytest.raises(ValueError, match=rf"layers\.1\.mix is not finite in {dtype}"):
        loradrop.merge(net)
    assert_same(net, before)


def test_disabled_is_the_base_and_ends_with_the_block() -> None:
    model, base = injected(), output(Net())
    adapted = output(model)
    assert not torch.equal(adapted, base)
    with loradrop.disabled(model):
        assert torch.equal(output(model), base)
        with loradrop.disabled(model):
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), adapted)
    with pytest.raises(KeyError), loradrop.disabled(model):
        raise KeyError
    assert torch.equal(output(model), adapted)


# What changed after injection


def resized() -> Any:
    model = llama()
    loradrop.inject(model, config("q_proj", "lm_head"))
    model.resize_token_embeddings(64)
    return model


def shorter() -> Any:
    model = injected()
    del model.layers[0]
    return model


def patched() -> Any:
    model = injected("mix")
    layer = model.layers[2].mix
    forward = layer.forward
    layer.forward = lambda x: forward(x)
    return model


CHANGED: dict[str, tuple[Make, str]] = {
    "a target replaced": (resized, r"lm_head \(32 -> 50\) is another Linear \(32 -> 64\)"),
    "layers removed": (shorter, r"layers\.0\.query \(8 -> 8\) is another LoRALinear"),
    "patched": (patched, r"layers\.2\.mix has a forward of its own.*del module\.forward"),
}


@pytest.mark.parametrize("changed", CHANGED)
def test_a_target_that_is_not_there_any_more(changed: str, tmp_path: Any) -> None:
    """Nothing is half removed, and no dead adapter is saved or merged."""
    make, message = CHANGED[changed]
    model = make()
    before = snapshot(model)
    calls = [loradrop.remove, loradrop.merge]
    if changed != "patched":
        calls.append(lambda m: loradrop.save(m, tmp_path))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(model)
    assert_same(model, before)


def test_what_trains_since_injection(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is saved and loaded with the adapters, and stays where they are removed."""
    model = injected()
    model.layers[1].norm.requires_grad_(True)
    model.value_head = nn.Linear(WIDTH, 1)
    wake(model).layers[1].norm.weight.data.fill_(2.0)
    for _ in range(2):
        loradrop.save(model, tmp_path)
    assert caplog.text.count("layers.1.norm.weight, layers.1.norm.bias, value_head") == 1
    other = Net()
    with pytest.raises(ValueError, match=r"value_head\.weight: \(1, 8\) in the file, not there"):
        loradrop.load(other, tmp_path)
    other.value_head = nn.Linear(WIDTH, 1)
    loradrop.load(other, tmp_path)
    assert torch.equal(output(other), output(model)) and other.value_head.weight.requires_grad
    assert torch.equal(other.value_head.weight, model.value_head.weight)
    loradrop.remove(other)
    assert torch.equal(output(other), output(Net()))
    caplog.clear()
    loradrop.remove(model)
    assert "layers.1.norm.weight" in caplog.text and model.value_head.weight.requires_grad
    assert torch.equal(model.layers[1].norm.weight, torch.full((WIDTH,), 2.0))
    assert all(p.requires_grad for p in model.parameters())


def test_an_export_has_what_trains_since_injection(tmp_path: Any) -> None:
    model = bert()
    loradrop.inject(model, config())
    norm = wake(model).bert.encoder.layer[1].output.LayerNorm.requires_grad_(True)
    norm.weight.data.fill_(2.0)
    loradrop.export(model, tmp_path)
    report = loradrop.verify(model, tmp_path, [{"input_ids": IDS}])
    assert report.relative <= report.tolerance


def test_modules_to_save_that_were_resized(tmp_path: Any) -> None:
    model = llama()
    saved = ["embed_tokens", "lm_head"]
    loradrop.inject(model, config("q_proj", modules_to_save=saved))
    model.resize_token_embeddings(64)
    loradrop.save(model, tmp_path)
    other = llama()
    other.resize_token_embeddings(64)
    loradrop.load(other, tmp_path)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    loradrop.remove(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert model.lm_head.weight.shape[0] == 64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_disabled_sets_trained_modules_back(mode: Any) -> None:
    """And after them, bit for bit, what they had learnt; a graph made before stays usable."""
    model = injected()
    train(model)
    trained, loss = snapshot(model), model.eval()(IDS).square().sum()
    with pytest.raises(KeyError), mode(), loradrop.disabled(model), loradrop.disabled(model):
        assert torch.equal(model(IDS), Net().eval()(IDS))
        model.train()(IDS)  # moves the statistics of the normalisation
        raise KeyError
    assert_same(model, trained)
    loss.backward()
    loradrop.remove(model)
    assert torch.equal(output(model), output(Net()))


def test_disabled_with_tied_modules() -> None:
    model = llama(tie_word_embeddings=True)
    expected = model(IDS).logits
    loradrop.inject(model, config("q_proj", modules_to_save=["embed_tokens", "lm_head"]))
    model.lm_head.weight.data.mul_(2.0)
    trained = model(IDS).logits
    with loradrop.disabled(model):
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, trained)


# Refusals


def refused(message: str, model: nn.Module, *targets: str, **options: Any) -> None:
    """By a ValueError with the words of `message` in this order; the model is as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError) as raised:
        loradrop.inject(model, config(*targets, **options))
    assert re.search(message, str(raised.value), re.DOTALL)
    assert_same(model, before)


def part() -> nn.Module:
    """Its second layer has no query."""
    model = Net()
    model.layers[1].other = model.layers[1].query
    del model.layers[1].query
    return model


class Outer(nn.Module):
    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.a, self.b = model, nn.Linear(4, 4), nn.Linear(4, 4)


def already_patched() -> Any:
    model = Net()
    model.layers[1].mix.forward = torch.tanh
    return model


LOOSE = {"strict": False}
REFUSED: list[tuple[Make, list[str], Options, str]] = [
    (Net, ["query", "no_such"], {}, r"'no_such'.*query: 3.*no_such: 0.*value \(3\).*mix \(3\)"),
    (lambda: nn.Sequential(nn.Linear(8, 8)), ["0", "4"], {}, "'4'.*matches nothing"),
    (Net, ["mix"], {"rank_pattern": {"mix": 9}}, r"r=9.*layers\.0\.mix.*r <= 8"),
    (Net, ["norm"], LOOSE, "norm.*LayerNorm.*linear"),
    (Net, ["embed"], LOOSE, "embed.*Embedding.*linear"),
    (gpt2, ["lm_head"], {}, r"lm_head.*tied.*transformer\.wte"),
    (Outer, [], {"target_modules": None}, r"target_modules.*a \(1\), b \(1\)"),
    (Net, ["mix"], {"exclude_modules": ["mix2"]}, "exclude_modules has 'mix2'.*no module"),
    (Net, ["mix"], {"exclude_modules": ".*mix2"}, "exclude_modules has '.*mix2'.*no module"),
    (Net, ["mix"], {"rank_pattern": {"value": 2}}, r"rank_pattern has 'value'.*mix \(3\).*strict"),
    (Net, ["mix"], {"alpha_pattern": {"layers.7.mix": 2}}, "alpha_pattern has 'layers.7.mix'"),
    (already_patched, ["mix"], {}, r"layers\.1\.mix.*forward of its own"),
    (injected, ["mix"], {}, "remove"),
    (lambda: Outer(injected()), ["a"], {}, "remove"),
    (Net, [], {"modules_to_save": ["no_head"]}, "'no_head'.*classifier"),
]


@pytest.mark.parametrize(("make", "targets", "options", "words"), REFUSED)
def test_refusals(make: Make, targets: list[str], options: Options, words: str) -> None:
    refused(words, make(), *targets, **options)


def test_a_head_that_is_offloaded_cannot_train() -> None:
    model = accelerate.cpu_offload(Net(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"classifier\.0\.weight is offloaded.*dispatched"):
        loradrop.inject(model, config())
    loradrop.inject(model, config(modules_to_save=[]))


def stack(*kinds: str) -> nn.Module:
    """Layers of different kinds, as hybrid models have them."""
    model = nn.Module()
    made = (nn.ModuleDict({kind: nn.Linear(WIDTH, WIDTH)}) for kind in kinds)
    model.layers = nn.ModuleList(made)
    return model


COVERED: list[tuple[Any, bool, list[str]]] = [
    (["q_proj"], True, ["layers.0.q_proj"]),
    (r".*q_proj", True, ["layers.0.q_proj"]),
    (["layers.0.q_proj"], False, ["layers.0.q_proj"]),
    (["0.q_proj", "layers.1.in_proj"], False, ["layers.0.q_proj", "layers.1.in_proj"]),
    (r"layers\.0\..*_proj", False, ["layers.0.q_proj"]),
    ("all-linear", False, ["layers.0.q_proj", "layers.1.in_proj", "layers.2.in_proj"]),
    (None, False, ["layers.0.q_proj"]),
]
DEFAULTS = [("query_proj", "value_proj"), ("Wqkv",), ("to_q", "to_v"), ("q_b_proj",), ("in_proj",)]


@pytest.mark.parametrize(("targets", "told", "expected"), COVERED)
def test_an_entry_that_some_layers_lack(
    targets: Any, told: bool, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A warning with the table, unless it names its layers or is no choice of the user."""
    model = stack("q_proj", "in_proj", "in_proj")
    assert names(loradrop.inject(model, LoRAConfig(r=R, target_modules=targets))) == expected
    assert ("1 of 3 layers" in caplog.text and "none in layers.1, layers.2" in caplog.text) == told


@pytest.mark.parametrize("kinds", DEFAULTS)
def test_names_of_query_and_value(kinds: tuple[str, ...]) -> None:
    bank = loradrop.inject(stack(*kinds, "out_proj"), LoRAConfig(r=R))
    assert {target.kind for target in bank.targets} == set(kinds)


class Mixer(nn.Module):
    """As Mamba's, whose kernels read the weights of some of its linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.dt_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv1d, self.D = nn.Conv1d(WIDTH, WIDTH, 3), nn.Parameter(torch.ones(WIDTH))


def unadaptable() -> nn.Module:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9, bias=False)
    model.head.weight = model.embed.weight
    model.gate, model.up, model.mixer = nn.Linear(WIDTH, R - 1), nn.Linear(WIDTH, WIDTH), Mixer()
    model.tied, model.attention = Tied(), nn.MultiheadAttention(WIDTH, 2)
    return model


def test_all_linear_leaves_out_what_it_cannot_adapt(caplog: pytest.LogCaptureFixture) -> None:
    bank = loradrop.inject(unadaptable(), config(target_modules="all-linear"))
    assert names(bank) == ["up", "mixer.in_proj"] and caplog.text.count("leaves out") == 1
    for name in ("head", "gate", "tied.first", "tied.second", "attention.out_proj", "dt_proj"):
        assert f"{name} (each" in caplog.text
    for name in ("head", "gate", "attention.out_proj"):
        with pytest.raises(ValueError, match=name):
            loradrop.inject(unadaptable(), config(name))
    with pytest.raises(ValueError, match=r"all-linear.*matches no"):
        loradrop.inject(Net(), LoRAConfig(target_modules="all-linear", r=WIDTH + 1))


def test_all_linear_names_the_experts_that_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 4}
    mixtral = build("MixtralForCausalLM", "MixtralConfig", **sizes, **LM)
    bank = loradrop.inject(mixtral, LoRAConfig(r=2, target_modules="all-linear"))
    assert {target.kind for target in bank.targets} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "layers.0.mlp.experts.gate_up_proj" in caplog.text
    assert "layers.1.mlp.experts.down_proj (each is one parameter of all experts" in caplog.text


def test_a_sharded_model(tmp_path: Path) -> None:
    """Its adapters would not be sharded, nor their gradients summed."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), Net()
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=r"Net is sharded.*inject first"):
            loradrop.inject(model, config())
        sharded, expected = injected(modules_to_save=[]), output(injected())
        fully_shard(sharded, mesh=mesh)
        torch.testing.assert_close(output(sharded), expected)
        sharded(IDS).sum().backward()
        assert all(p.grad is not None for p in sharded.lora_bank.parameters())
        sharded.reshard()
        with pytest.raises(ValueError, match=r"is a DTensor.*before it is sharded"):
            loradrop.merge(sharded)
        loradrop.save(injected(modules_to_save=[]), tmp_path / "same")
        loradrop.load(sharded, tmp_path / "same")
        other = injected(modules_to_save=[])
        loradrop.share(other, [])
        loradrop.save(other, tmp_path / "other")
        for call in (loradrop.share, lambda m, _: loradrop.load(m, tmp_path / "other")):
            with pytest.raises(ValueError, match=r"adapters are sharded.*before fully_shard"):
                call(sharded, [])
        parallel = injected(modules_to_save=[])
        parallelize_module(parallel, mesh, {"layers.0.query": ColwiseParallel()})
        with pytest.raises(RuntimeError, match=r"DTensor.*tensor parallelism.*not served.*FSDP2"):
            parallel(IDS)
    finally:
        distributed.destroy_process_group()


def test_what_zero_3_takes_apart() -> None:
    """DeepSpeed marks a parameter by ds_id, and leaves its shape at (0,) between uses."""
    model = Net()
    model.embed.weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"ZeRO-3 takes parameters apart.*ZeRO-1 or 2.*FSDP2"):
        loradrop.inject(model, config())
    model = injected(modules_to_save=[])
    for parameter in model.lora_bank.parameters():
        parameter.ds_id, parameter.data = 1, parameter.data.new_empty(0)
    for call in (loradrop.share, loradrop.merge, loradrop.remove):
        with pytest.raises(ValueError, match="ZeRO-3"):
            call(model)
    with pytest.raises(ValueError, match="ZeRO-3"):
        model(IDS)


def test_what_is_not_refused() -> None:
    assert len(loradrop.inject(part(), config(strict=False)).targets) == 5
    head = LoRAConfig(target_modules="all-linear", exclude_modules=["classifier", "dense"])
    kinds = {target.kind for target in loradrop.inject(bert(), head).targets}
    assert kinds == {"query", "key", "value"}
    assert loradrop.inject(Net(), config(rank_pattern={"query": WIDTH})).targets[0].r == WIDTH
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert names(loradrop.inject(model, config("0", "2"))) == ["0", "2"]


@pytest.mark.parametrize("make", [nn.Sequential, nn.ModuleList, nn.ModuleDict])
def test_a_bare_container(make: Make) -> None:
    """A Sequential runs its bank as one more link, which passes its input on."""
    x, linear, model = torch.randn(3, WIDTH), nn.Linear(WIDTH, WIDTH), make()
    model.add_module("0", linear)
    expected = linear(x)
    bank = loradrop.inject(model, config("0", strict=False))
    nn.init.normal_(bank.B[0])
    y = model(x) if isinstance(model, nn.Sequential) else linear(x)
    torch.testing.assert_close(y, expected + x @ bank.delta(0).T)
    loradrop.remove(model)
    assert torch.equal(linear(x), expected) and len(model) == 1


class Chain(nn.Sequential):
    """As SentenceTransformer is: it saves itself link by link."""

    def save(self, path: str) -> None:
        for link in self:
            link.save(path)


def test_a_chain_that_saves_itself() -> None:
    link = nn.Module()
    link.auto_model = bert()
    refused(r"Chain.*inject its inner model, model\[0\]\.auto_model", Chain(link), "query")
    refused(r"model\[0\]", Chain(nn.Linear(WIDTH, WIDTH)), "0")


def test_a_bank_passes_on_what_it_gets() -> None:
    """As a link of any chain, also of one whose links take several values."""
    bank = injected().lora_bank
    assert bank(1) == 1 and bank(1, 2) == (1, 2)


def test_adapters_of_peft() -> None:
    """Neither goes on the other: the two could not be merged or saved rightly."""
    theirs = peft.LoraConfig(r=R, target_modules=["query"])
    model = peft.get_peft_model(Net(), theirs)
    for part in (model, model.base_model.model):
        refused("PEFT", part, "mix")
    with pytest.raises(ValueError, match="loradrop"):
        peft.get_peft_model(injected(), theirs)


def test_a_model_without_adapters() -> None:
    def disable(model: nn.Module) -> None:
        with loradrop.disabled(model):
            pass

    calls = loradrop.merge, loradrop.remove, loradrop.share, disable
    for call in (*calls, lambda model: loradrop.probe(model, [IDS])):
        with pytest.raises(ValueError, match=r"Net.*inject"):
            call(Net())


def test_injection_says_what_it_adapted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="loradrop"):
        loradrop.inject(Net(), config())
    assert "query (3)" in caplog.text and "value (3)" in caplog.text
    assert "classifier" in caplog.text
