"""The layers: drop-in, also where PyTorch and transformers do more than call a forward."""

import copy
import inspect
import pickle
import tempfile
from abc import ABC
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from models import WIDTH, Make, Net, assert_same, gpt2, llama, net, snapshot, wake
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

import loradrop
from loradrop.collector import Collector
from loradrop.config import LoRAConfig
from loradrop.layers import LoRALinear

pytestmark = pytest.mark.numbers

K, N, R = WIDTH, 10, 4
each_p = pytest.mark.parametrize("p", [0.0, 0.4])
each_mode = pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad]
)


def inject(model: nn.Module, *targets: str, **options: Any) -> loradrop.AdapterBank:
    config = loradrop.LoRAConfig(r=R, target_modules=list(targets), strict=False, **options)
    return loradrop.inject(model, config)


def base_of(layer: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight, layer.bias)


# One on its own


def test_standalone_layer() -> None:
    """It starts as nn.Linear does, and its adapter alone trains."""
    torch.manual_seed(0)
    plain = nn.Linear(K, N)
    torch.manual_seed(0)
    layer = LoRALinear(K, N, r=R, lora_alpha=6)
    assert torch.equal(layer.weight, plain.weight) and torch.equal(layer.bias, plain.bias)
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (K, N)
    pair = ("lora_bank.pairs.0.A", "lora_bank.pairs.0.B")
    keys = ["weight", "bias", "lora_bank._extra_state", *pair]
    assert list(layer.state_dict()) == keys
    assert [k for k, p in layer.named_parameters() if p.requires_grad] == keys[3:]
    x = torch.randn(3, 5, K)
    base = base_of(layer, x)
    assert torch.equal(layer(x), base)
    A, B = wake(layer).lora_bank.factors(0)
    torch.testing.assert_close(layer(x), base + 1.5 * x @ A.T @ B.T)
    layer(x).sum().backward()
    assert A.grad.any() and B.grad.any() and layer.weight.grad is None


def test_standalone_layer_takes_the_arguments_of_linear() -> None:
    layer = LoRALinear(K, N, False, dtype=torch.bfloat16, r=R)
    assert layer.bias is None and layer.weight.dtype == torch.bfloat16
    assert layer.lora_bank.A[0].dtype == torch.float32
    assert layer(torch.ones(2, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_standalone_layers_in_a_model(how: Callable[[Any], Any]) -> None:
    model = nn.Sequential(LoRALinear(K, N, r=R), nn.Tanh(), LoRALinear(N, K, r=R))
    wake(model[0])
    twin, x = how(model), torch.randn(2, K)
    assert torch.equal(twin(x), model(x))
    assert twin[0]._lora.bank is twin[0].lora_bank is not model[0].lora_bank


@pytest.mark.parametrize("end", [loradrop.merge, loradrop.remove], ids=["merge", "remove"])
def test_standalone_layer_becomes_a_linear(end: Callable[[nn.Module], None]) -> None:
    layer, x = wake(LoRALinear(K, N, r=R)), torch.randn(2, K)
    expected = layer(x) if end is loradrop.merge else base_of(layer, x)
    end(layer)
    assert type(layer) is nn.Linear and list(layer.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("r", [0, -1, N + 1])
def test_standalone_layer_refuses_a_rank(r: int) -> None:
    with pytest.raises(ValueError, match=f"r={r}"):
        LoRALinear(K, N, r=r)


# What a call needs


@pytest.mark.parametrize("shape", [(K,), (1, K), (1, 1, K), (0, K), (2, 3, K)], ids=str)
@each_mode
def test_any_batch_in_any_mode(mode: Any, shape: tuple[int, ...]) -> None:
    model, x = net(), torch.randn(shape)
    expected = model(x).detach()
    with mode():
        y = model(x)
    assert y.shape == shape and torch.equal(y, expected)
    with loradrop.disabled(model):
        assert torch.equal(model(x), Net()(x))


def test_layers_of_a_sequential() -> None:
    torch.manual_seed(0)
    model = Holder(nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, N)))
    x = torch.randn(2, K)
    expected = model(x)
    inject(model, "0", "2")
    assert torch.equal(model(x), expected)
    assert not torch.equal(wake(model)(x), expected)


def test_eval_and_p_zero_draw_no_random_number() -> None:
    model, without = net(lora_dropout=0.5).eval(), net()
    x, before = torch.randn(2, K), torch.get_rng_state()
    first = model(x)
    assert torch.equal(model(x), first) and torch.equal(without(x), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model.train()(x), first)
    assert not torch.equal(torch.get_rng_state(), before)


def test_dropout_is_repeated_by_the_seed_and_not_between_layers() -> None:
    model = net(lora_dropout=0.5)
    x, outputs = torch.randn(2, K), []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    layer = wake(LoRALinear(K, K, r=R, lora_dropout=0.5))
    assert not torch.equal(layer(x), layer(x))


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = wake(LoRALinear(K, N, r=R, lora_dropout=0.3))
    x = torch.randn(1, K)
    with torch.no_grad():
        expected = layer.eval()(x) - base_of(layer, x)
        drawn = layer.train()(x.expand(40_000, K)) - base_of(layer, x)
    deviation = drawn.std(0) / 40_000**0.5
    assert (drawn.mean(0) - expected).abs().div(deviation).max() < 5


def test_hooks_and_identity_survive() -> None:
    model = Net()
    layer, weight, seen = model.layers[0].query, model.layers[0].query.weight, []
    layer.register_forward_hook(lambda *_: seen.append(1))
    inject(model, "query", "value")
    assert model.layers[0].query is layer and layer.weight is weight
    assert type(layer) is LoRALinear and isinstance(layer, nn.Linear)
    model(torch.randn(1, K))
    loradrop.remove(model)
    model(torch.randn(1, K))
    assert seen == [1, 1] and layer.weight is weight


# Activation checkpointing


def gradients(model: Net, seed: int = 3) -> list[Tensor]:
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.lora_bank.parameters())]


@each_p
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_changes_no_bit(reentrant: bool, p: float) -> None:
    plain = gradients(net(lora_dropout=p))
    checkpointed = gradients(net(reentrant, lora_dropout=p))
    assert all(tensor.abs().max() > 0 for tensor in plain)
    assert all(map(torch.equal, plain, checkpointed)) and len(plain) == len(checkpointed)
    if p:
        assert not torch.equal(plain[0], gradients(net(lora_dropout=p), seed=4)[0])


@each_p
def test_compiled_model(p: float) -> None:
    """For one mask y is linear in A and in B of the last layer: <dA, A> = <dy, delta> = <dB, B>."""
    model = wake(LoRALinear(K, N, r=R, lora_dropout=p))
    torch.compiler.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(9, K), torch.randn(9, N)
    y = fast(x)
    y.backward(dy)
    inner = float((dy * (y.detach() - base_of(model, x))).sum())
    roundings = 1e-5 * float((dy * y.detach()).abs().sum())  # of delta and of the sums
    for factor in model.lora_bank.factors(0):
        found = float((factor.grad * factor).detach().sum())
        assert abs(found - inner) <= roundings < 1e-3 * abs(inner)
    if p == 0.0:
        torch.testing.assert_close(y, model(x))
    else:
        assert not torch.equal(y, fast(x))
    model.eval()
    torch.testing.assert_close(fast(x), model(x))


def test_exported_program(tmp_path: Path) -> None:
    """It has the op, takes another number of rows, and is read back from a file."""
    model = wake(LoRALinear(K, N, r=R)).eval()
    rows = {"input": {0: torch.export.Dim("rows")}}
    program = torch.export.export(model, (torch.randn(9, K),), dynamic_shapes=rows)
    assert "loradrop.lora_linear.default" in [str(node.target) for node in program.graph.nodes]
    torch.export.save(program, tmp_path / "layer.pt2")
    x = torch.randn(5, K)
    for found in (program, torch.export.load(tmp_path / "layer.pt2")):
        torch.testing.assert_close(found.module()(x), model(x))


def test_functional_call_takes_other_adapters() -> None:
    model = wake(net()).double()
    x = torch.randn(9, K, dtype=torch.float64)
    half = {name: p / 2 for name, p in model.named_parameters() if name.endswith(".B")}
    found = torch.func.functional_call(model, half, (x,))
    before, names = model(x), dict(model.named_parameters())
    with torch.no_grad():
        for name, value in half.items():
            names[name].copy_(value)
    torch.testing.assert_close(found, model(x))
    assert half and not torch.allclose(found, before)


def test_one_graph_serves_equal_blocks() -> None:
    """Also once they share; a block without an adapter has another."""
    blocks = [nn.Sequential(nn.Linear(K, K)) for _ in range(12)]
    model = nn.ModuleList(blocks)
    loradrop.inject(model, LoRAConfig(r=R, target_modules=r"\d+\.0"))
    wake(model)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    x = torch.randn(9, K, requires_grad=True)

    def check(graphs: int) -> None:
        for i, block in enumerate(blocks):
            y = block(x)
            y.sum().backward()
            torch.testing.assert_close(y, block[0](x))
            pair = model.lora_bank.factors(i)
            assert pair is None or pair[1].grad.any()
        assert counter.frame_count == graphs

    check(1)
    names = [target.name for target in model.lora_bank.targets]
    loradrop.share(model, names[:3], after_select="continue", init="mean")
    check(1)
    loradrop.share(model, names[:3], share="none", after_select="continue")
    check(2)  # and one for a block without an adapter


def test_one_graph_serves_equal_blocks_that_are_watched() -> None:
    """Each block reports to leaves of its own through the one graph; rows of weight 0 do not count.

    With Σ w h hᵀ of each block against float64: the bound is that of K and then 3 additions.
    """

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(K, K)) for _ in range(6))

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            self.seen = [x]
            for block in self.blocks:
                self.seen.append(block(self.seen[-1]))
                counts.append(counter.frame_count)
            return self.seen[-1]

    model = Chain()
    bank = loradrop.inject(model, LoRAConfig(r=R, target_modules="all-linear"))
    wake(model)
    collector = Collector(model, bank, online=True, statistics=("sqnorm", "gram_in", "core"))
    torch.compiler.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), list[int]()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for _ in range(2):
        model(torch.randn(2, 3, K, requires_grad=True), mask).sum().backward()
        found = collector.close_row()
        for i, x in enumerate(model.seen[:-1]):
            A, B = bank.factors(i)
            h = x.detach()[mask.bool()].double() @ A.detach().double().T
            torch.testing.assert_close(found["gram_in"][i], h.T @ h, rtol=1e-4, atol=1e-6)
            norm = bank.scaling[i] ** 2 * (h @ B.detach().double().T).square().sum()
            torch.testing.assert_close(found["sqnorm"][i], norm, rtol=1e-4, atol=1e-6)
            assert found["core"][i].any()
    assert len(counts) == 12 and len(set(counts)) == 1  # nothing was compiled after the first
    collector.detach()


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


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer(x, *args, **kwargs)


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


def test_the_layer_answers_what_is_asked() -> None:
    """PEFT alone is told why it cannot wrap it."""
    layer = LoRALinear(K, N, r=R)
    assert (
        not hasattr(layer, "base_layer") and dict(inspect.getmembers(layer))["weight"] is not None
    )
    with pytest.raises(AttributeError, match="base_layer"):
        _ = layer.base_layer


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


# accelerate's hooks, which give each module a forward of its own


def hooked(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            accelerate.hooks.add_hook_to_module(module, AlignDevicesHook("cpu"))


def unhooked(model: nn.Module) -> None:
    hooked(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)


def dispatched(model: nn.Module) -> None:
    parts = {name: "cpu" for name, _ in model.named_children()}
    accelerate.dispatch_model(model, parts, main_device="cpu", force_hooks=True)


def offloaded(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def preloaded(model: nn.Module) -> None:
    cpu = torch.device("cpu")
    accelerate.cpu_offload(model, execution_device=cpu, preload_module_classes=["Layer"])


def on_disk(model: nn.Module) -> None:
    folder = tempfile.TemporaryDirectory()
    model.folder = folder  # it lives as long as the model
    accelerate.disk_offload(model, folder.name, execution_device=torch.device("cpu"))


OFFLOADS = [offloaded, preloaded, on_disk]
HOOKS = [hooked, unhooked, dispatched, *OFFLOADS]


@pytest.mark.parametrize("first", [True, False], ids=["hooks first", "adapters first"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_accelerate(hook: Callable[[nn.Module], None], first: bool, tmp_path: Any) -> None:
    """The same as without them; where weights are offloaded, merge and its like refuse."""
    x, plain, model = torch.randn(3, K), Net(), Net()
    inject(plain, "query", "value", lora_alpha=6)
    expected = wake(plain)(x).detach()
    if first:
        hook(model)
    inject(model, "query", "value", lora_alpha=6)
    if not first:
        hook(model)
    bank = loradrop.bank.bank_of(model)
    with torch.no_grad():
        for mine, theirs in zip(bank.parameters(), plain.lora_bank.parameters(), strict=True):
            mine.copy_(theirs)
    assert bank.device.type == "cpu"
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in bank.parameters())
    loradrop.save(model, tmp_path)
    loradrop.load(model, tmp_path)
    assert torch.equal(model(x), expected)
    if hook in OFFLOADS:
        with pytest.raises(ValueError, match=r"layers\.0\.query\.weight is offloaded"):
            loradrop.merge(model)
    else:
        loradrop.merge(model, keep_original=True)
        torch.testing.assert_close(model(x), expected)
    loradrop.remove(model)
    assert torch.equal(model(x), Net()(x))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), Net()(x))


# Language models


MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
}
TEXT = torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(0))
each_model = pytest.mark.parametrize(("make", "targets"), MODELS.values(), ids=MODELS)


def continued(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **options
    )


@each_model
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_with_cache(make: Make, targets: list[str], batch: int) -> None:
    model, ids = make().double(), TEXT[:batch]  # double: no rounding decides a tie of two tokens
    base = continued(model, ids)
    inject(model, *targets)
    assert torch.equal(continued(model, ids), base)
    adapted = continued(wake(model, 0.5), ids)
    assert adapted.shape == (batch, 18) and not torch.equal(adapted, base)
    assert torch.equal(continued(model, ids, use_cache=False), adapted)
    with torch.inference_mode():
        assert torch.equal(continued(model, ids), adapted)
    with loradrop.disabled(model):
        assert torch.equal(continued(model, ids), base)
    assert torch.equal(continued(model, ids), adapted)
    merged = copy.deepcopy(model)
    loradrop.merge(merged)
    assert torch.equal(continued(merged, ids), adapted)
    loradrop.remove(model)
    assert torch.equal(continued(model, ids), base)


@each_model
def test_definition_of_conv1d_and_linear(make: Make, targets: list[str]) -> None:
    model = make()
    bank = inject(model, *targets, lora_alpha=6)
    wake(model)
    for i, target in enumerate(bank.targets):
        layer = model.get_submodule(target.name)
        weight = layer.weight.T if "c_" in target.name else layer.weight
        x = torch.randn(2, 3, target.in_features)
        A, B = bank.factors(i)
        expected = nn.functional.linear(x, weight, layer.bias) + 1.5 * x @ A.T @ B.T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@each_model
def test_gradient_checkpointing_of_transformers(make: Make, targets: list[str]) -> None:
    outcomes = []
    for reentrant in (None, True, False):
        model = make()
        inject(model, *targets, lora_dropout=0.3)
        wake(model, 0.1)
        if reentrant is not None:
            model.enable_input_require_grads()
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(5)
        loss = model(input_ids=TEXT, labels=TEXT, use_cache=False).loss
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in model.lora_bank.parameters())])
    plain, *others = outcomes
    assert all(tensor.any() for tensor in plain)
    assert all(all(map(torch.equal, plain, other)) for other in others)
