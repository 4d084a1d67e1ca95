"""MoS against its formula: what is in the pools, who picks it, and what is put together of it."""

from typing import Any

import numpy as np
import pytest
import torch
from method_cases import awake
from torch import nn
from torch.autograd import gradcheck

import loradrop
from loradrop import LoRAConfig
from loradrop.methods import LoRA, Method
from loradrop.methods.mos import MoS

K, N, R, LAYERS = 12, 8, 4, 5


class Net(nn.Module):
    """In each of five layers a target `up` and a target `down`: even and odd ones."""

    def __init__(self) -> None:
        super().__init__()
        pairs = ({"up": nn.Linear(K, N), "down": nn.Linear(N, K)} for _ in range(LAYERS))
        self.layers = nn.ModuleList(map(nn.ModuleDict, pairs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return x


def injected(method: Method, r: int = R, seed: int = 0) -> tuple[Net, Any]:
    torch.manual_seed(seed)
    net = Net()
    config = LoRAConfig(r=r, lora_alpha=2 * r, target_modules=["up", "down"], method=method)
    return net, loradrop.inject(net, config)


@pytest.mark.parametrize(("shards", "cost", "private"), [(4, 2, 1), (2, 3, 2), (1, 1, 0)])
def test_the_delta_is_that_of_the_formula(shards: int, cost: int, private: int) -> None:
    method = MoS(shards=shards, equivalent_rank=cost, private_rank=private)
    bank = awake(injected(method)[1])
    for i, target in enumerate(bank.targets):
        g, member = i % 2, i // 2
        picks = bank.get_buffer(f"picks_{g}")[member].numpy()
        rows = []
        for pool, picked in zip((bank.A[g], bank.B[g]), picks, strict=True):
            vectors = picked.reshape(R, shards)
            values = pool.detach().double().numpy()
            rows.append(np.stack([np.concatenate([values[p] for p in v]) for v in vectors]))
        A, B = rows[0], rows[1].T
        assert (A.shape, B.shape) == ((R, target[2]), (target[3], R))
        np.testing.assert_allclose(bank.delta(i).numpy(), 2.0 * B @ A, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shards", "cost", "private"), [(4, 2, 1), (2, 3, 2), (1, 1, 0), (2, 4, 4)]
)
def test_who_picks_what(shards: int, cost: int, private: int) -> None:
    """Nobody twice the same, A apart from B, targets apart, and nobody another's private shard."""
    bank = injected(MoS(shards=shards, equivalent_rank=cost, private_rank=private))[1]
    common = (cost - private) * LAYERS * shards
    for g in range(2):
        assert len(bank.A[g]) == len(bank.B[g]) == cost * LAYERS * shards
        picks = bank.get_buffer(f"picks_{g}").numpy()
        assert picks.shape == (LAYERS, 2, R * shards) and picks.min() >= 0
        drawn, own = np.split(picks, [(R - private) * shards], axis=2)
        assert ((drawn < common).all(), (own >= common).all()) == (True, True)
        for of in picks.reshape(-1, R * shards):
            assert len(set(of)) == len(of)
        assert np.array_equal(own[:, 0], own[:, 1])  # A and B have the same private ones
        assert np.array_equal(own[:, 0].flatten(), np.arange(common, cost * LAYERS * shards))
        if drawn.size and shards > 1:  # else there are too few to be all different
            kinds = {tuple(of) for of in drawn.reshape(2 * LAYERS, -1)}
            assert len(kinds) == 2 * LAYERS


def test_the_picks_depend_on_their_own_seed_alone() -> None:
    one, two = injected(MoS(), seed=0)[1], injected(MoS(), seed=1)[1]
    other = injected(MoS(seed=5))[1]
    assert torch.equal(one.picks_0, two.picks_0) and torch.equal(one.picks_1, two.picks_1)
    assert not torch.equal(one.A[0], two.A[0])
    assert not torch.equal(one.picks_0, other.picks_0)
    assert {name for name, _ in one.named_buffers()} == {"picks_0", "picks_1"}


@pytest.mark.parametrize(("shards", "cost", "private"), [(4, 2, 1), (2, 3, 2), (1, 1, 0)])
def test_what_is_trained(shards: int, cost: int, private: int) -> None:
    bank = injected(MoS(shards=shards, equivalent_rank=cost, private_rank=private))[1]
    assert bank.trainable == 2 * LAYERS * cost * (K + N)


@pytest.mark.parametrize(("r", "cost"), [(8, 3), (4, 2), (1, 1)])
def test_the_cost_unless_you_say_otherwise(r: int, cost: int) -> None:
    """A quarter of r, but here 5 targets need as many as let each pick r − 1 of them."""
    assert injected(MoS(), r)[1].trainable == 2 * LAYERS * cost * (K + N)


def test_defaults_for_any_shapes() -> None:
    """A group of one is LoRA; 4, 3 and 1 divide the sides."""
    for sides, shards in (((12, 8), 4), ((9, 6), 3), ((7, 5), 1)):
        layer = loradrop.LoRALinear(*sides, r=3, method=MoS())
        assert layer.lora_bank.trainable == 3 * sum(sides)
        assert layer.lora_bank.A[0].shape == (3 * shards, sides[0] // shards)


def test_the_start() -> None:
    """A is within ± 1/√K, with the K of a whole vector; B is zero."""
    layer = loradrop.LoRALinear(1024, 64, r=16, method=MoS(shards=16, private_rank=16))
    bank = layer.lora_bank
    assert 0.95 / 32 < float(bank.A[0].detach().abs().max()) <= 1 / 32
    np.testing.assert_allclose(float(bank.A[0].detach().square().mean()), 1 / 32**2 / 3, rtol=0.1)
    assert not bank.B[0].any()


@pytest.mark.parametrize("shards", [1, 4])
def test_all_private_is_lora(shards: int) -> None:
    """From equal values come equal outputs and gradients."""
    plain, lora = injected(LoRA())
    net, bank = injected(MoS(shards=shards, equivalent_rank=R, private_rank=R))
    awake(lora)
    with torch.no_grad():
        for g in range(2):
            bank.A[g].copy_(torch.cat([*lora.A[g::2]]).view_as(bank.A[g]))
            bank.B[g].copy_(torch.cat([B.T for B in lora.B[g::2]]).reshape(bank.B[g].shape))
    assert bank.trainable == lora.trainable
    x = torch.randn(6, K).double()
    for model in (plain.double(), net.double()):
        model(x).square().sum().backward()
    torch.testing.assert_close(net(x), plain(x))
    for g in range(2):
        for pool, own in (
            (bank.A[g], [A.grad for A in lora.A[g::2]]),
            (bank.B[g], [B.grad.T for B in lora.B[g::2]]),
        ):
            torch.testing.assert_close(pool.grad, torch.cat(own).reshape(pool.shape))


def test_a_shard_s_gradient_is_the_sum_over_those_who_picked_it() -> None:
    bank = awake(injected(MoS(shards=2, equivalent_rank=2))[1])
    for i in range(0, 2 * LAYERS, 2):
        A, B = bank.factors(i)
        (A.sum() + 2.0 * B.sum()).backward()
    counts = torch.stack(
        [bank.picks_0[:, side].flatten().bincount(minlength=20) for side in (0, 1)]
    )
    assert counts.max() > 1
    for pool, weight, count in zip((bank.A[0], bank.B[0]), (1.0, 2.0), counts, strict=True):
        assert torch.equal(pool.grad, weight * count.unsqueeze(1).expand_as(pool).float())


def test_gradients_through_the_composition() -> None:
    bank = awake(injected(MoS(shards=2, equivalent_rank=2))[1].double())
    inputs = (bank.A[0], bank.B[0])
    assert gradcheck(lambda *_: torch.matmul(*reversed(bank.factors(2))), inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 0}, "shards=0: choose a whole number from 1 up, or None"),
        ({"equivalent_rank": 0}, "equivalent_rank=0: choose a whole number from 1 up, or None"),
        ({"private_rank": -1}, "private_rank=-1: choose a whole number from 0 up"),
        (
            {"shards": 3},
            r"shards=3 does not divide the 8 features of layers\.0\.up \(12 -> 8\).*None",
        ),
        ({"private_rank": 5}, r"private_rank=5 for layers\.0\.up of rank 4: choose at most 4"),
        ({"equivalent_rank": 1}, r"equivalent_rank=1 .*private_rank=1, its group of 5.*2 to 4"),
        ({"equivalent_rank": 5}, r"equivalent_rank=5 .*beyond 4 it costs more than LoRA.*2 to 4"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        injected(MoS(**options))
