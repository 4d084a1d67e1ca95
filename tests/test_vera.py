"""VeRA against its formula: one frozen random pair, two trained vectors for each target."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import loradrop
from loradrop import LoRAConfig
from loradrop.methods.vera import VeRA

R = 6


class Net(nn.Module):
    """Targets of three shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall, self.square = nn.Linear(16, 8), nn.Linear(8, 20), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.wide(x))
        return self.tall(torch.tanh(self.square(x)))


def injected(start: int = 0, **options: object) -> tuple[Net, loradrop.AdapterBank]:
    torch.manual_seed(start)
    net = Net()
    names = ["wide", "tall", "square"]
    config = LoRAConfig(r=R, lora_alpha=48, target_modules=names, method=VeRA(**options))
    return net, loradrop.inject(net, config)


def test_the_delta_is_that_of_the_formula() -> None:
    """ΔW_i = diag(b_i)·B·diag(d_i)·A, without any scale, with A and B cut to the target."""
    net, bank = injected(d_initial=0.3)
    with torch.no_grad():
        for vector in (*bank.d, *bank.b):
            vector.copy_(torch.randn(vector.shape))
    A, B = bank.A.numpy(), bank.B.numpy()
    assert (A.shape, B.shape) == ((R, 16), (20, R))
    x = torch.randn(5, 16)
    with loradrop.disabled(net):
        base = net.wide(x)
    for i, target in enumerate(bank.targets):
        d, b = bank.d[i].detach().numpy(), bank.b[i].detach().numpy()
        expected = np.diag(b) @ B[: target.out_features] @ np.diag(d) @ A[:, : target.in_features]
        np.testing.assert_allclose(bank.delta(i).numpy(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.wide(x), base + x @ bank.delta(0).T, rtol=1e-4, atol=1e-5)


def test_the_method_of_the_docs_is_this_one(tmp_path: Path) -> None:
    """The method in one file that docs/methods.md shows, in at most 40 lines; it is saved and read
    by its name, which has to be its own.
    """
    text = (Path(__file__).resolve().parent.parent / "docs" / "methods.md").read_text("utf-8")
    code = text.split("## A method in one file")[1].split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 40
    shown = types.ModuleType("shown")
    sys.modules["shown"] = shown  # where dataclasses look for annotations
    exec(code, vars(shown))
    del sys.modules["shown"]
    torch.manual_seed(0)
    net, names = Net(), ["wide", "tall", "square"]
    bank = loradrop.inject(net, LoRAConfig(r=R, target_modules=names, method=shown.VeRA()))
    _, ours = injected()
    x = torch.randn(5, 16)
    before = net(x).detach()
    for one, other in zip(bank.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other)
        with torch.no_grad():
            other.copy_(one.normal_())
    for i in range(len(bank.targets)):
        assert torch.equal(bank.delta(i), ours.delta(i))
    assert not torch.allclose(net(x), before)
    loradrop.save(net, tmp_path)
    torch.manual_seed(0)
    again = Net()
    loradrop.load(again, tmp_path)
    assert torch.equal(again(x), net(x))
    taken = type("Taken", (shown.VeRA,), {"name": "vera", "__module__": "shown"})
    with pytest.raises(ValueError, match=r"Taken\.name is 'vera'.*another name"):
        loradrop.inject(Net(), LoRAConfig(r=R, target_modules=names, method=taken()))


def test_the_start() -> None:
    _, bank = injected()
    assert all((d == 0.1).all() and len(d) == R for d in bank.d)
    assert all((b == 0).all() for b in bank.b)
    assert bank.A.abs().max() > 0 and bank.B.abs().max() > 0
    assert not bank.A.requires_grad and not bank.B.requires_grad
    assert bank.trainable == sum(R + n for n in (8, 20, 8))


def test_the_frozen_pair_depends_on_its_own_seed_alone() -> None:
    (_, one), (_, two), (_, other) = injected(0), injected(1), injected(0, seed=5)
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)
    assert not torch.equal(one.A, other.A) and not torch.equal(one.B, other.B)


def test_gradients_reach_both_vectors() -> None:
    net, bank = injected()
    with torch.no_grad():
        for vector in bank.b:
            vector.fill_(0.5)
    net(torch.randn(7, 16)).square().sum().backward()
    assert all(v.grad.abs().max() > 0 for v in (*bank.d, *bank.b))


def test_a_is_the_frozen_one_itself() -> None:
    """So there is no gradient of it, and no x is kept for one."""
    _, bank = injected()
    for i in range(len(bank.targets)):
        A, B = bank.factors(i)
        assert A.data_ptr() == bank.A.data_ptr() and not A.requires_grad and B.requires_grad


def test_a_start_without_gradients() -> None:
    with pytest.raises(ValueError, match=r"d_initial=0\.0"):
        VeRA(d_initial=0.0)
