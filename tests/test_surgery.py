"""Surgery: nothing changes at injection, only adapters and the head train, all can be undone."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

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
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.classifier = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x.mean(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def config(*targets: str, **options: Any) -> LoRAConfig:
    return LoRAConfig(r=R, target_modules=list(targets or ("query", "value")), **options)


IDS = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(0))


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=11, num_attention_heads=2, max_position_embeddings=8, **size)
    )


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2))


def wake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for B in model.lora_bank.B:
            B.copy_(torch.randn(B.shape, generator=generator) / 4)


def output(model: nn.Module) -> Tensor:
    """In eval mode, and the mode kept."""
    training = model.training
    with torch.no_grad():
        y = model.eval()(IDS)
    model.train(training)
    return y if isinstance(y, Tensor) else y.logits


def train(model: nn.Module, steps: int = 3) -> None:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        y = model(IDS)
        (y if isinstance(y, Tensor) else y.logits).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "net": (net, ["query", "value"]),
    "bert": (bert, ["query", "value", "dense"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
}
each_model = pytest.mark.parametrize(("make", "targets"), MODELS.values(), ids=MODELS)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that `remove` must bring back."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "identity": {k: id(p) for k, p in model.named_parameters()},
        "classes": {k: type(m) for k, m in model.named_modules()},
        "attributes": {k: set(m.__dict__) for k, m in model.named_modules()},
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert list(after["state"]) == list(before["state"])
    for key, tensor in after["state"].items():
        assert torch.equal(tensor, before["state"][key]), key
    for what in ("requires_grad", "identity", "classes", "attributes"):
        assert after[what] == before[what], what


# Injection


@each_model
def test_nothing_changes_at_injection(make: Callable[[], nn.Module], targets: list[str]) -> None:
    model = make()
    expected, before = output(model), snapshot(model)
    bank = loradrop.inject(model, config(*targets))
    assert torch.equal(output(model), expected)
    assert bank is model.lora_bank and len(bank.targets) >= 4
    state = model.state_dict()
    base = {k: v for k, v in state.items() if not k.startswith("lora_bank.")}
    assert list(base) == list(before["state"])
    assert all(torch.equal(base[k], v) for k, v in before["state"].items())
    assert len(state) == len(base) + 2 * len(bank.targets)
    assert not any(B.any() for B in bank.B) and all(A.any() for A in bank.A)


@each_model
def test_only_adapters_and_the_head_train(make: Callable[[], Any], targets: list[str]) -> None:
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


def test_embedded_base_parameters_get_no_gradient() -> None:
    model = net()
    loradrop.inject(model, config())
    model(IDS).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_modules_to_save() -> None:
    model = net()
    loradrop.inject(model, config(modules_to_save=["norm"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_bank" not in n} == {
        f"layers.{i}.norm.{part}" for i in range(3) for part in ("weight", "bias")
    }
    other = net()
    loradrop.inject(other, config(modules_to_save=[]))
    assert all("lora_bank" in n for n, p in other.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["query"], [f"layers.{i}.query" for i in range(3)]),
        (
            r"layers\.[02]\.(query|mix)",
            [f"layers.{i}.{m}" for i in (0, 2) for m in ("query", "mix")],
        ),
        ("all-linear", [f"layers.{i}.{m}" for i in range(3) for m in ("query", "value", "mix")]),
        (None, [f"layers.{i}.{m}" for i in range(3) for m in ("query", "value")]),
    ],
    ids=["suffix", "regex", "all-linear", "default"],
)
def test_which_modules_are_targets(targets: Any, names: list[str]) -> None:
    bank = loradrop.inject(net(), LoRAConfig(r=R, target_modules=targets, strict=False))
    assert [target.name for target in bank.targets] == names


def test_exclude_modules() -> None:
    bank = loradrop.inject(net(), config(exclude_modules=["layers.1.query"], strict=False))
    assert "layers.1.query" not in [t.name for t in bank.targets] and len(bank.targets) == 5


def test_rank_and_scaling_patterns() -> None:
    options = {"rank_pattern": {"value": 2}, "alpha_pattern": {r"layers\.1\.query": 9}}
    bank = loradrop.inject(net(), config(lora_alpha=6, **options))
    for target, s in zip(bank.targets, bank.scaling, strict=True):
        assert target.r == (2 if target.kind == "value" else R)
        alpha = 9 if target.name == "layers.1.query" else 6
        assert s == alpha / target.r
    assert loradrop.inject(net(), config(lora_alpha=6, use_rslora=True)).scaling[0] == 6 / R**0.5


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
    wake(model)
    h = model.first(x).tanh()
    seen = [
        (layer := model.first)(value) - nn.functional.linear(value, layer.weight, layer.bias)
        for value in (x, h)
    ]
    expected = sum(float(delta.detach().square().sum()) for delta in seen)
    assert loradrop.probe(model, [x])["first"] == pytest.approx(expected, rel=1e-5)
    loradrop.remove(model)
    assert_same(model, before)


# Removal and merging


@each_model
def test_remove_restores_the_model(make: Callable[[], nn.Module], targets: list[str]) -> None:
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
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.query = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(self.norm(x))

    model = Normed()
    before = snapshot(model)
    loradrop.inject(model, config("query"))
    model.train()(torch.randn(6, WIDTH) + 3.0)
    loradrop.remove(model)
    assert_same(model, before)


def test_remove_after_share() -> None:
    model = net()
    before = snapshot(model)
    loradrop.inject(model, config())
    loradrop.share(model, ["layers.0.query"])
    train(model)
    loradrop.remove(model)
    assert_same(model, before)


@each_model
def test_merge_computes_what_the_adapters_did(
    make: Callable[[], nn.Module], targets: list[str]
) -> None:
    model = make()
    before = snapshot(model)
    loradrop.inject(model, config(*targets, lora_alpha=7))
    wake(model)
    adapted = output(model)
    loradrop.merge(model)
    torch.testing.assert_close(output(model), adapted, rtol=1e-4, atol=1e-5)
    assert not hasattr(model, "lora_bank")
    after = snapshot(model)
    assert list(after["state"]) == list(before["state"])
    assert (after["classes"], after["identity"]) == (before["classes"], before["identity"])
    assert "save_pretrained" not in model.__dict__
    changed = {k for k, v in after["state"].items() if not torch.equal(v, before["state"][k])}
    assert changed and all(k.endswith(".weight") for k in changed)
    with pytest.raises(ValueError, match="keep_original"):
        loradrop.remove(model)


def test_merge_of_a_shared_and_of_a_dropped_adapter() -> None:
    for how in ("group", "none"):
        model = net()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        loradrop.inject(model, config())
        loradrop.share(model, ["layers.1.value"], share=how)
        wake(model)
        adapted = output(model)
        loradrop.merge(model)
        torch.testing.assert_close(output(model), adapted, rtol=1e-4, atol=1e-5)
        weight = "layers.0.query.weight"
        assert torch.equal(model.state_dict()[weight], before[weight]) == (how == "none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(WIDTH, 5, r=R, lora_alpha=7, dtype=dtype)
    wake(layer)
    A, B = (factor.detach().double() for factor in layer.lora_bank.factors(0))
    exact = layer.weight.detach().double() + 7 / R * B @ A
    loradrop.merge(layer)
    assert layer.weight.dtype == dtype
    limit = exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-6
    assert ((layer.weight.double() - exact).abs() <= limit).all()


def test_merge_can_be_undone() -> None:
    model = net()
    before = snapshot(model)
    loradrop.inject(model, config())
    wake(model)
    adapted = output(model)
    loradrop.merge(model, keep_original=True)
    torch.testing.assert_close(output(model), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.layers[0].query.weight, before["state"]["layers.0.query.weight"])
    with pytest.raises(ValueError, match="merged"):
        loradrop.merge(model)
    with pytest.raises(ValueError, match="merged"), loradrop.disabled(model):
        pass
    twin = copy.deepcopy(model)
    for each in (twin, model):
        loradrop.remove(each)
        assert torch.equal(output(each), output(net()))
    assert_same(model, before)


def test_a_merged_model_is_not_probed_by_another_reason() -> None:
    model = net()
    loradrop.inject(model, config())
    wake(model)
    loradrop.merge(model, keep_original=True)
    with pytest.raises((ValueError, RuntimeError), match="merged"):
        loradrop.probe(model, [IDS])


def test_merge_then_inject_again() -> None:
    model = net()
    loradrop.inject(model, config())
    wake(model)
    loradrop.merge(model)
    before, merged = snapshot(model), output(model)
    loradrop.inject(model, config("mix"))
    assert torch.equal(output(model), merged)
    train(model)
    loradrop.remove(model)
    assert_same(model, before)


class Tied(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("targets", [["first", "second"], ["second"]], ids=str)
def test_tied_weights_are_merged_rightly_or_not_at_all(targets: list[str]) -> None:
    model, x = Tied(), torch.randn(4, WIDTH)
    try:
        loradrop.inject(model, config(*targets))
        wake(model)
        adapted = model(x).detach()
        loradrop.merge(model)
    except ValueError as error:
        assert "second" in str(error)
    else:
        torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)


def test_disabled_is_the_base_and_ends_with_the_block() -> None:
    model = net()
    base = output(model)
    loradrop.inject(model, config())
    wake(model)
    adapted = output(model)
    with loradrop.disabled(model):
        assert torch.equal(output(model), base)
        with loradrop.disabled(model):
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), adapted)
    with pytest.raises(KeyError), loradrop.disabled(model):
        raise KeyError
    assert torch.equal(output(model), adapted)


# Refusals


def refused(message: str, model: nn.Module, *targets: str, **options: Any) -> str:
    """The text of the ValueError; the model is as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as raised:
        loradrop.inject(model, config(*targets, **options))
    assert_same(model, before)
    return str(raised.value)


def test_a_target_that_matches_nothing() -> None:
    text = refused("'no_such'", net(), "query", "no_such")
    for part in ("query: 3", "no_such: 0", "value (3)", "mix (3)"):
        assert part in text


def without_a_query() -> nn.Module:
    model = net()
    model.layers[1].other = model.layers[1].query
    del model.layers[1].query
    return model


def test_a_target_in_some_layers_only() -> None:
    model = without_a_query()
    text = refused(r"'query'.*2 of 3", model, "query", "value")
    for part in ("query: 2", "value: 3", "layers.1", "strict=False"):
        assert part in text
    assert len(loradrop.inject(model, config(strict=False)).targets) == 5


@pytest.mark.parametrize("names", [["layers.1.query"], ["layers.2.value", "layers.0.query"]])
def test_a_full_name_stands_for_itself(names: list[str]) -> None:
    bank = loradrop.inject(net(), config(*names))
    assert [target.name for target in bank.targets] == sorted(names)
    refused(r"'query'.*matches only 2 of 3", without_a_query(), "layers.2.value", "query")


def test_numbers_of_a_sequential() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    bank = loradrop.inject(model, config("0", "2"))
    assert [target.name for target in bank.targets] == ["0", "2"]
    refused(r"'4'.*matches nothing", nn.Sequential(nn.Linear(8, 8)), "0", "4")


class Outer(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.a, self.b = model, nn.Linear(4, 4), nn.Linear(4, 4)


def test_nothing_by_default() -> None:
    with pytest.raises(ValueError, match=r"target_modules.*a \(1\), b \(1\)"):
        loradrop.inject(Outer(nn.Identity()), LoRAConfig(r=R))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(WIDTH, WIDTH)),
        nn.ModuleList([nn.Linear(WIDTH, WIDTH)]),
        nn.ModuleDict({"0": nn.Linear(WIDTH, WIDTH)}),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_bare_container(model: nn.Module) -> None:
    """A Sequential runs its bank as one more link, which passes its input on."""
    x, linear = torch.randn(3, WIDTH), model.get_submodule("0")
    expected = linear(x)
    bank = loradrop.inject(model, config("0", strict=False))
    nn.init.normal_(bank.B[0])
    y = model(x) if isinstance(model, nn.Sequential) else linear(x)
    torch.testing.assert_close(y, expected + x @ bank.delta(0).T)
    loradrop.remove(model)
    assert torch.equal(linear(x), expected) and len(model) == 1


@pytest.mark.parametrize("r", [0, -4])
def test_a_rank_that_is_none(r: int) -> None:
    with pytest.raises(ValueError, match=f"r={r}"):
        LoRAConfig(r=r)


def test_a_rank_beyond_the_layer() -> None:
    text = refused("r=9", net(), "mix", rank_pattern={"mix": WIDTH + 1})
    assert "layers.0.mix" in text and f"r <= {WIDTH}" in text
    assert loradrop.inject(net(), config(rank_pattern={"query": WIDTH})).targets[0].r == WIDTH


@pytest.mark.parametrize("target", ["norm", "embed"])
def test_a_target_that_is_no_linear_map(target: str) -> None:
    text = refused("linear", net(), target, strict=False)
    assert target in text and ("LayerNorm" in text or "Embedding" in text)


def test_a_tied_embedding() -> None:
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    text = refused(r"lm_head.*tied", model, "lm_head")
    assert "transformer.wte" in text


def test_a_module_to_save_that_is_not_there() -> None:
    assert "classifier" in refused("'no_head'", net(), modules_to_save=["no_head"])


def test_a_second_injection() -> None:
    model = net()
    loradrop.inject(model, config())
    with pytest.raises(ValueError, match="remove"):
        loradrop.inject(model, config("mix"))
    with pytest.raises(ValueError, match="remove"):
        loradrop.inject(Outer(model), config("a"))


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "its base"])
def test_a_model_of_peft(wrapped: bool) -> None:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=R, target_modules=["query"]))
    model = theirs if wrapped else theirs.base_model.model
    with pytest.raises(ValueError, match="PEFT"):
        loradrop.inject(model, config("mix"))


def test_peft_refuses_an_injected_model() -> None:
    """Else its adapters would stand on ours, and neither could be merged or saved rightly."""
    model = net()
    loradrop.inject(model, config())
    with pytest.raises(ValueError, match="loradrop"):
        peft.get_peft_model(model, peft.LoraConfig(r=R, target_modules=["query"]))


@pytest.mark.parametrize("call", [loradrop.merge, loradrop.remove, loradrop.share])
def test_a_model_without_adapters(call: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ValueError, match=r"Net.*inject"):
        call(net())
    with pytest.raises(ValueError, match=r"Net.*inject"):
        loradrop.probe(net(), [IDS])
    with pytest.raises(ValueError, match=r"Net.*inject"), loradrop.disabled(net()):
        pass


def test_injection_says_what_it_adapted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="loradrop"):
        loradrop.inject(net(), config())
    assert "query (3)" in caplog.text and "value (3)" in caplog.text
    assert "classifier" in caplog.text
