"""The layers: on their own, in any mode, checkpointed, compiled and exported."""

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import Holder, K, N, R, each_mode, inject
from models import Net, net, wake
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import loradrop
from loradrop.config import LoRAConfig
from loradrop.layers import LoRALinear
from loradrop.statistics.collector import Collector

pytestmark = pytest.mark.numbers

each_p = pytest.mark.parametrize("p", [0.0, 0.4])


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


def test_the_layer_answers_what_is_asked() -> None:
    """PEFT alone is told why it cannot wrap it."""
    layer = LoRALinear(K, N, r=R)
    assert (
        not hasattr(layer, "base_layer") and dict(inspect.getmembers(layer))["weight"] is not None
    )
    with pytest.raises(AttributeError, match="base_layer"):
        _ = layer.base_layer


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


# Compiled and exported


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
