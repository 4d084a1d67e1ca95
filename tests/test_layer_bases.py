"""Layers over bases that are no plain nn.Linear, and past PyTorch's shortcuts."""

import copy
import pickle
from abc import ABC
from typing import Any

import pytest
import torch
from layer_cases import Holder, K, N, R, each_mode, inject
from models import Make, assert_same, snapshot, wake
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loradrop
from loradrop.injection import injection_of
from loradrop.layers import LoRALinear

pytestmark = pytest.mark.numbers


# Bases that are no plain nn.Linear


class Int8Linear(nn.Module):
    """As quantised layers are: whole numbers, a scale, no parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class Halved(Tensor):
    """A weight that only `linear` can use, as torchao's are."""

    @staticmethod
    def __new__(cls, half: Tensor) -> "Halved":
        return Tensor._make_wrapper_subclass(cls, half.shape, dtype=torch.float32)

    def __init__(self, half: Tensor) -> None:
        self.half_weight = half

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, bias = args
            return func(x, 2 * weight.half_weight, bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].half_weight.clone())
        if func is torch.ops.aten.equal.default:
            return torch.equal(*(arg.half_weight for arg in args))
        raise NotImplementedError(f"Halved has no {func}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return frozen, (self.half_weight,)

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        return frozen(self.half_weight.clone())


def frozen(half: Tensor) -> nn.Parameter:
    return nn.Parameter(Halved(half), False)


def halved() -> nn.Linear:
    linear = nn.Linear(K, N)
    linear.weight = frozen(linear.weight.detach() / 2)
    return linear


class Doubling(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor, times: float = 2.0, *, shift: float = 0.0) -> Tensor:
        return times * super().forward(x) + shift


BASES = {
    "int8": lambda: Int8Linear(nn.Linear(K, N)),
    "subclass": lambda: Doubling(K, N),
    "weight": halved,
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_over_any_base(base: Make) -> None:
    torch.manual_seed(0)
    model = Holder(base())
    original, before = copy.deepcopy(model), snapshot(model)
    inject(model, "layer", lora_alpha=2)
    x, dy = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    y0 = original(x)
    assert torch.equal(model(x), y0) and isinstance(model.layer, type(original.layer))
    names = [f"lora_bank.{name}" for name in ("_extra_state", "pairs.0.A", "pairs.0.B")]
    assert list(model.state_dict()) == [*before["state"], *names]
    A, B = wake(model).lora_bank.factors(0)
    assert A.dtype == torch.float32
    y, expected = model(x), y0 + 0.5 * x @ A.T @ B.T
    got, want = (torch.autograd.grad(out, (x, A, B), dy) for out in (y, expected))
    torch.testing.assert_close((y, *got), (expected, *want))
    scores = loradrop.probe(model, [x.detach()])
    assert scores["layer"] == pytest.approx(float((y - y0).detach().square().sum()), rel=1e-5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y) and twin.layer._lora.bank is twin.lora_bank
    with loradrop.disabled(model):
        assert torch.equal(model(x), y0)
    loradrop.remove(model)
    assert_same(model, before)
    assert torch.equal(model(x), y0)


def test_arguments_of_the_base_pass_through() -> None:
    model = Holder(Doubling(K, N))
    x = torch.randn(5, K)
    expected = model(x, 3.0, shift=1.0)
    inject(model, "layer")
    assert torch.equal(model(x, 3.0, shift=1.0), expected)


class ByHand(nn.Linear):
    """A plain linear map that says so itself, as Falcon's layers do."""

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_map_by_hand_is_merged(bias: bool) -> None:
    model, x = Holder(ByHand(K, N, bias)), torch.randn(5, K)
    inject(model, "layer")
    expected, state = wake(model)(x).detach(), torch.get_rng_state()
    loradrop.merge(model)
    torch.testing.assert_close(model(x), expected)
    assert type(model.layer) is ByHand and torch.equal(torch.get_rng_state(), state)


class Clipped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-20, 20))


class Silent(Doubling):
    """Zero, for now: no row of its own would tell it from a plain map."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


@pytest.mark.parametrize("base", [Clipped, Silent])
def test_a_map_that_is_plain_for_some_rows_is_not_merged(base: Any) -> None:
    model = Holder(base(K, N))
    inject(model, "layer")
    with pytest.raises(ValueError, match="whose forward is its own"):
        loradrop.merge(model)


@pytest.mark.parametrize("name", ["linear", "conv1d", *BASES])
def test_input_by_its_keyword(name: str) -> None:
    """As the base calls it."""
    if name == "conv1d":
        base, keyword = Conv1D(N, K), "x"
    else:
        base = nn.Linear(K, N) if name == "linear" else BASES[name]()
        keyword = "input" if name in ("linear", "weight") else "x"
    model, x = Holder(base), torch.randn(5, K)
    inject(model, "layer")
    layer = wake(model).layer
    more = {"shift": 1.0} if name == "subclass" else {}
    assert torch.equal(layer(**more, **{keyword: x}), layer(x, **more))


NOT_MERGED = [
    ("int8", r"layer.*dequantise"),
    ("subclass", r"layer is a .*, whose forward is its own"),
    ("weight", r"weight of layer is a Halved.*dequantise"),
]


@pytest.mark.parametrize(("base", "message"), NOT_MERGED)
def test_a_base_that_is_not_merged(base: str, message: str) -> None:
    """Int8 is no plain weight, and W + s·B·A under Doubling would count the delta twice."""
    model, x = Holder(BASES[base]()), torch.randn(5, K)
    inject(model, "layer")
    expected, weight = wake(model)(x).detach(), model.layer.weight.clone()
    with pytest.raises(ValueError, match=message):
        loradrop.merge(model)
    assert torch.equal(model.layer.weight, weight) and torch.equal(model(x), expected)


class Tracked(ABC):  # noqa: B024 - quanto has none either
    """As the mixin of quanto's layers: a base beside `nn.Module` that is not a plain object."""


class TrackedLinear(Tracked, nn.Linear):
    pass


def test_a_class_that_cannot_be_extended_is_refused() -> None:
    model = nn.Sequential(nn.Linear(K, K), TrackedLinear(K, N))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'1' is a TrackedLinear.*extend in place.*another"):
        inject(model, "0", "1")
    assert_same(model, before)
    inject(model, "0")
    assert type(model[0]) is LoRALinear


# PyTorch's shortcuts


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(K, 2, 2 * K, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


@each_mode
@pytest.mark.parametrize("padded", [False, True], ids=["no mask", "padding mask"])
def test_encoder_layer_never_skips_its_adapters(padded: bool, mode: Any) -> None:
    """Eval mode's fused path reads the weights directly."""
    model, x = Encoder(), torch.randn(3, 5, K)
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]]) if padded else None
    inject(model, "linear1", "linear2")
    expected = wake(model).train()(x, padding).detach()
    with mode():
        y = model.eval()(x, padding)
    real = slice(None) if padding is None else ~padding
    torch.testing.assert_close(y[real], expected[real], rtol=1e-4, atol=1e-4)
    assert all(value > 0 for value in loradrop.probe(model, [x]).values())


@pytest.mark.parametrize("targets", [["out_proj"], r".*\.out_proj"], ids=["name", "regex"])
def test_out_proj_of_multihead_attention_is_refused(targets: Any) -> None:
    model = Encoder()
    with pytest.raises(ValueError, match=r"out_proj.*MultiheadAttention"):
        loradrop.inject(model, loradrop.LoRAConfig(r=R, target_modules=targets))
    assert not hasattr(model, "lora_bank")
    assert all(p.requires_grad for p in model.parameters())


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("kind", [nn.Linear, Doubled])
def test_a_class_that_another_library_extends(kind: type[nn.Linear]) -> None:
    """It computes, and is not taken apart until the other has undone its own."""
    model = nn.Sequential(kind(K, N))
    before, x = model(torch.ones(2, K)), torch.ones(2, K)
    wake(inject_into(model))
    adapted = model(x)
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    torch.testing.assert_close(model(x), adapted)
    for verb in (loradrop.remove, loradrop.merge):
        with pytest.raises(ValueError, match=r"0 is a Parametrized.*remove_parametrizations"):
            verb(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    loradrop.remove(model)
    assert type(model[0]) is kind and torch.equal(model(x), before)


def inject_into(model: nn.Module) -> nn.Module:
    loradrop.inject(model, loradrop.LoRAConfig(r=R, target_modules=["0"], modules_to_save=[]))
    return model


def test_weights_in_buffers_are_not_copied() -> None:
    """Nor whole numbers elsewhere; what a batch norm counts comes back."""
    linear = Int8Linear(nn.Linear(K, N))
    model = nn.Sequential(linear, nn.BatchNorm1d(N), Int8Linear(nn.Linear(N, N)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_into(model)
    kept = injection_of(model).buffers
    weights = [name for name, tensor in before.items() if tensor.dtype == torch.int8]
    assert len(weights) == 2 and not kept.keys() & {*weights}
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= kept.keys()
    model.train()(torch.randn(4, K))
    loradrop.remove(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_layer_made_without_memory() -> None:
    layer = LoRALinear(K, N, r=R, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    A, B = layer.lora_bank.factors(0)
    assert 0 < A.abs().max() <= K**-0.5 and not B.any()
    assert 0 < layer.weight.abs().max() <= K**-0.5


def test_a_model_without_memory(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(K, N))
    inject_into(model)
    assert "the model is on the meta device, and so are the adapters" in caplog.text
    base, x = nn.Linear(K, N), torch.randn(2, K)
    state = {f"0.{name}": tensor for name, tensor in base.state_dict().items()}
    model.load_state_dict(state, strict=False, assign=True)
    with pytest.raises(ValueError, match=r"adapters are on the meta device.*reset_parameters"):
        model(x)
    model.lora_bank.to_empty(device="cpu")
    for module in model.lora_bank.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(model(x), base(x)) and model.lora_bank.factors(0)[0].any()


class WithBias(nn.Linear):
    """Returns its bias beside the output, as Megatron's layers do."""

    def forward(self, input: Tensor) -> Any:
        return nn.functional.linear(input, self.weight), self.bias


def test_a_base_that_returns_something_else_is_named() -> None:
    model = inject_into(nn.Sequential(WithBias(K, N)))
    with pytest.raises(TypeError, match=r"a WithBias, made a tuple of .*to which no adapter"):
        model(torch.randn(2, K))
