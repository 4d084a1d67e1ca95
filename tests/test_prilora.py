"""PRILoRA against NumPy: ranks by depth, the moving average of the inputs, and which entries go."""

import numpy as np
import pytest
import torch
from torch import nn

import loradrop
from loradrop import LoRAConfig
from loradrop.collector import Collector
from loradrop.methods.prilora import PRILoRA
from loradrop.scores import Target

WIDTH, R = 12, 4


def targets(layers: int, r: int = 8) -> list[Target]:
    names = [f"encoder.layer.{i}.{kind}" for i in range(layers) for kind in ("query", "value")]
    return [Target(name, name[-5:], 64, 64, r) for name in [*names, "pooler.dense"]]


@pytest.mark.parametrize(
    ("options", "layers", "ranks"),
    [
        ({"r_start": 4, "r_end": 12}, 12, [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]),
        ({}, 12, [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]),  # a half and one and a half of 8
        ({"r_start": 9, "r_end": 3}, 3, [9, 6, 3]),
        ({"r_start": 5, "r_end": 7}, 1, [5]),
    ],
)
def test_ranks_grow_with_depth(options: dict[str, int], layers: int, ranks: list[int]) -> None:
    found = PRILoRA(**options).ranked(targets(layers))
    assert [target.r for target in found] == [r for r in ranks for _ in range(2)] + [8]


def test_stacks_count_on() -> None:
    """Layers are those of the model, in its order: a decoder's come after the encoder's."""
    names = [f"{stack}.block.{i}.q" for stack in ("encoder", "decoder") for i in range(2)]
    found = PRILoRA(r_start=2, r_end=8).ranked([Target(n, "q", 64, 64, 4) for n in names])
    assert [target.r for target in found] == [2, 4, 6, 8]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def config(**options: float) -> LoRAConfig:
    return LoRAConfig(r=R, target_modules=["0", "2"], method=PRILoRA(**options))


def test_pruning_is_that_of_the_formula() -> None:
    """S_ij = |A_ij|·X̄_j with X̄ <- β·X̄ + (1 − β)·‖x_j‖₂, over batches whose columns differ."""
    net, beta, ratio = model(), 0.75, 0.4
    options = config(beta=beta, prune_ratio=ratio, prune_every=3)
    bank = loradrop.inject(net, options)
    collector = Collector(net, bank, online=True, statistics=["moment"], mask=None)
    average = np.zeros(WIDTH)
    scales = torch.logspace(-2, 2, WIDTH)
    for step in range(1, 4):
        x = torch.randn(9, WIDTH) * scales.roll(step)
        net(x).square().sum().backward()
        before = bank.A[0].detach().numpy().copy()
        options.method.on_step_end(bank, step, collector.close_row())
        average = beta * average + (1 - beta) * np.sqrt((x.double().numpy() ** 2).sum(0))
        np.testing.assert_allclose(bank.input_norm(0).numpy(), average, rtol=1e-5)
        if step < 3:
            assert np.array_equal(bank.A[0].detach().numpy(), before)
    count = int(ratio * WIDTH)
    expected = before.copy()
    for row in expected:
        row[np.argsort(np.abs(row) * average)[:count]] = 0.0
    assert np.array_equal(bank.A[0].detach().numpy(), expected)
    assert ((expected == 0).sum(1) == count).all() and not np.array_equal(before, expected)
    assert bank.B[0].shape == (WIDTH, bank.targets[0].r)


def test_pruned_entries_may_grow_again() -> None:
    net = model()
    options = config(prune_every=1)
    bank = loradrop.inject(net, options)
    collector = Collector(net, bank, online=True, statistics=["moment"], mask=None)
    with torch.no_grad():
        bank.B[0].normal_()
    optimizer = torch.optim.SGD([bank.A[0]], lr=0.1)
    for step in (1, 2):
        net(torch.randn(9, WIDTH)).square().sum().backward()
        optimizer.step()
        grown = (bank.A[0] != 0).all()
        assert grown  # before the pruning of this step
        options.method.on_step_end(bank, step, collector.close_row())
        assert (bank.A[0] == 0).sum() == bank.targets[0].r * (WIDTH // 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_start": 0}, "r_start=0"),
        ({"r_end": 2.5}, r"r_end=2\.5"),
        ({"prune_every": 0}, "prune_every=0"),
        ({"prune_ratio": 1.0}, r"prune_ratio=1\.0.*\[0, 1\)"),
        ({"beta": -0.1}, r"beta=-0\.1.*\[0, 1\)"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRILoRA(**options)


def test_a_rank_that_grows_beyond_a_layer() -> None:
    with pytest.raises(ValueError, match=rf"r={WIDTH + 1} for 2.*r <= {WIDTH}"):
        loradrop.inject(model(), config(r_end=WIDTH + 1))
