"""LoRTA against its formula: one tensor of rank r over layers, projections and heads."""

from typing import Any

import numpy as np
import pytest
import torch
from method_cases import awake
from torch import nn
from torch.autograd import gradcheck

import loradrop
from loradrop import LoRAConfig
from loradrop.methods.lorta import LoRTA
from loradrop.scores import Target

D, R, LAYERS, HEADS = 12, 3, 4, 3
PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(D, D) for name in "qkvo"})
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.attn[name](x) for name in "qkv")
        x = x + self.attn["o"](torch.tanh(q) * torch.tanh(k) + v)
        return x + self.down(torch.relu(self.up(x)))


def injected(*names: str, heads: int = 1, r: int = R) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(*(Layer() for _ in range(LAYERS)), nn.Linear(D, D))
    config = LoRAConfig(
        r=r, lora_alpha=2 * r, target_modules=names or tuple("qkvo"), method=LoRTA(heads=heads)
    )
    return net, loradrop.inject(net, config)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_the_delta_is_a_tensor_of_rank_r(heads: int) -> None:
    """T[l, m, h, n, j] = Σ_ρ C_l[l, ρ]·C_m[m, ρ]·C_h[h, ρ]·A[n, ρ]·B[ρ, j], heads along K."""
    net, bank = injected(heads=heads)
    awake(bank)
    five = [getattr(bank, name) for name in ("C_l", "C_m", "C_h", "A", "B")]
    assert [len(factor) for factor in five] == [1] * 5
    values = [factor[0].detach().double().numpy() for factor in five]
    tensor = np.einsum("lp,mp,hp,np,pj->lmnhj", *values)
    assert tensor.shape == (LAYERS, 4, D, heads, D // heads)
    for i, target in enumerate(bank.targets):
        layer, _, module = target.name.partition(".")
        expected = tensor[int(layer), PROJECTIONS.index(module)].reshape(D, D)
        np.testing.assert_allclose(bank.delta(i).numpy(), 2.0 * expected, rtol=1e-4, atol=1e-5)
    x = torch.randn(5, D)
    with loradrop.disabled(net):
        base = net[0].attn["q"](x)
    torch.testing.assert_close(net[0].attn["q"](x), base + x @ bank.delta(0).T)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_what_is_trained(heads: int) -> None:
    assert injected(heads=heads)[1].trainable == R * (D + D // heads + heads + LAYERS + 4)


def test_a_number_above_the_layers_is_not_theirs() -> None:
    """Every layer has its row of C_l where a number stands above all of them."""
    net = nn.Sequential(nn.Identity(), injected()[0])
    loradrop.remove(net[1])
    config = LoRAConfig(r=R, target_modules=tuple("qkvo"), method=LoRTA())
    bank: Any = loradrop.inject(net, config)
    assert bank.targets[0].name == "1.0.attn.q"
    assert bank.C_l[0].shape == (LAYERS, R) and bank.C_m[0].shape == (4, R)
    assert bank.trainable == injected()[1].trainable


def test_the_paper_s_counts() -> None:
    """860 and 4,292 elements a rank for RoBERTa-base and Llama-2-7B."""
    for width, heads, layers, count in ((768, 12, 12, 860), (4096, 32, 32, 4292)):
        names = [f"layers.{i}.{name}" for i in range(layers) for name in PROJECTIONS]
        targets = [Target(name, name[-1], width, width, 2) for name in names]
        likes = [torch.empty(0)] * len(targets)
        bank = LoRTA(heads=heads).bank(targets, [1.0] * len(targets), likes)
        assert bank.trainable == 2 * count


def test_a_tensor_for_each_shape() -> None:
    """q and v, up, down, and the last layer, which has no number and the shape of q and v."""
    bank = awake(injected("q", "v", "up", "down", str(LAYERS))[1])
    counts = [D + D + 1 + (LAYERS + 1) + 3, *[D + 2 * D + 1 + LAYERS + 1] * 2]
    assert bank.trainable == R * sum(counts)
    deltas = [bank.delta(i) for i in range(len(bank.targets))]
    for i, one in enumerate(deltas):
        assert one.any()
        assert not any(one.shape == other.shape and torch.equal(one, other) for other in deltas[:i])


def test_modules_of_one_name_in_a_layer_are_apart() -> None:
    """As a decoder has them: `self` and `cross`, both with a query; and two stacks of layers."""
    names = [
        f"{s}.{i}.{a}.query" for s in ("enc", "dec") for i in (0, 1) for a in ("self", "cross")
    ]
    targets = [Target(name, "query", D, D, R) for name in [*names, "pooler"]]
    bank = LoRTA().bank(targets, [1.0] * len(targets), [torch.empty(0)] * len(targets))
    assert len(set(bank.places)) == len(targets)
    assert [len(factor[0]) for factor in (bank.C_m, bank.C_l)] == [3, 5]


def test_the_start() -> None:
    """A within ± 1/√r, the C within ± √(6/r), B zero."""
    bank = injected(heads=HEADS, r=9)[1]
    for factors, bound in ((bank.A, 1 / 3), (bank.C_h, 6**0.5 / 3), (bank.C_l, 6**0.5 / 3)):
        assert 0.8 * bound < float(factors[0].detach().abs().max()) <= 1.0001 * bound
    assert float(bank.C_m[0].detach().abs().max()) <= 1.0001 * 6**0.5 / 3
    assert not bank.B[0].any()


def test_the_first_step_moves_b_and_then_all() -> None:
    net, bank = injected(heads=HEADS)
    optimizer = torch.optim.SGD(bank.parameters(), lr=1.0)
    x = torch.randn(16, D)
    for moved in ({"B.0"}, {"A.0", "B.0", "C_h.0", "C_m.0", "C_l.0"}):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        assert {name for name, p in bank.named_parameters() if p.grad.any()} == moved
        optimizer.step()


@pytest.mark.parametrize("heads", [1, HEADS])
def test_gradients_through_the_composition(heads: int) -> None:
    bank = awake(injected(heads=heads)[1].double())
    inputs = tuple(bank.parameters())
    assert gradcheck(lambda *_: torch.matmul(*reversed(bank.factors(6))), inputs)


@pytest.mark.parametrize(
    ("heads", "names", "message"),
    [
        (0, "q", "heads=0: choose a whole number from 1 up"),
        (3, "up", r"heads=3 for 0\.up \(12 -> 24\): heads are of square.*exclude_modules.*heads=1"),
        (5, "q", r"heads=5 for 0\.attn\.q \(12 -> 12\): 12 is not divisible.*heads=1"),
    ],
)
def test_options_out_of_range(heads: int, names: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        injected(names, heads=heads)
