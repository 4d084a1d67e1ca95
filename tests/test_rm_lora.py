"""RM-LoRA: the regulariser against autograd, the masks, and that a resume draws the same ones."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs as tiny
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig
from loradrop.methods import LoRA
from loradrop.methods.rm_lora import RMLoRA
from loradrop.pairs import LoRABank

pytestmark = pytest.mark.numbers

R = 4


def injected(method: Any, width: int = 24, inner: int = 48) -> tuple[nn.Module, LoRABank]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, width))
    config = LoRAConfig(r=R, lora_alpha=6, target_modules=["0", "2"], method=method)
    bank = loradrop.inject(net, config)
    assert isinstance(bank, LoRABank)
    return net, bank


def gradients(bank: LoRABank, value: float = 1.0) -> list[Tensor]:
    """Sets every gradient to one number, and returns them."""
    for parameter in bank.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return [parameter.grad for parameter in bank.parameters()]


def test_it_starts_as_lora_and_has_its_parameters() -> None:
    x = torch.randn(3, 24)
    (net, bank), (_, plain) = injected(RMLoRA()), injected(LoRA())
    with loradrop.disabled(net):
        base = net(x)
    assert torch.equal(net(x), base)
    assert all(
        torch.equal(a, b) for a, b in zip(bank.parameters(), plain.parameters(), strict=True)
    )
    assert bank.trainable == 2 * R * (24 + 48) and bank.scaling == (6 / R, 6 / R)


def test_the_gradient_is_that_of_the_regulariser() -> None:
    """λ·Σ (‖AAᵀ − I‖² + ‖BᵀB − I‖²), whose λ rises over the first quarter of the steps."""
    method = RMLoRA(penalty=0.25, rise=0.25, mask_ratio=0.0)
    _, bank = injected(method)
    bank.double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    for step, part in ((1, 0.2), (5, 1.0), (20, 1.0)):
        eye = torch.eye(R)
        gaps = [A @ A.T - eye for A in bank.A] + [B.T @ B - eye for B in bank.B]
        bank.zero_grad()
        sum(0.25 * part * gap.square().sum() for gap in gaps).backward()
        expected = [parameter.grad + 2.0 for parameter in bank.parameters()]
        found = gradients(bank, 2.0)
        method.before_step(bank, step, 20)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_b_of_zeros_is_not_pushed() -> None:
    """The gradient of ‖BᵀB − I‖² is zero there: the loss moves B first."""
    _, bank = injected(RMLoRA())
    found = gradients(bank, 0.0)
    RMLoRA(mask_ratio=0.0).before_step(bank, 10, 10)
    assert [bool(grad.any()) for grad in found] == [True, False, True, False]


def masks(method: RMLoRA, step: int) -> list[Tensor]:
    """Of four tensors of one size, each as (r, columns)."""
    _, bank = injected(method, 144, 144)
    found = gradients(bank)
    method.before_step(bank, step, 10)
    return [grad if len(grad) == R else grad.T for grad in found]


def test_masks_have_their_ratio_and_change() -> None:
    method = RMLoRA(penalty=0.0, mask_ratio=0.3)
    one, other = masks(method, 3), masks(method, 4)
    for mask in (*one, *other):
        assert ((mask == 0) | (mask == 1)).all()
    entries = torch.cat([mask.flatten() for mask in one])
    n = len(entries)  # 2,304 draws; six standard deviations
    assert abs(float(entries.mean()) - 0.7) < 6 * (0.3 * 0.7 / n) ** 0.5
    assert all(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(one, 2))
    again, seeded = masks(method, 3), masks(RMLoRA(penalty=0.0, mask_ratio=0.3, seed=1), 3)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, seeded, strict=True))


def test_masks_draw_nothing_from_the_random_state() -> None:
    method = RMLoRA()
    _, bank = injected(method)
    gradients(bank)
    before = torch.get_rng_state()
    method.before_step(bank, 1, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_masked_entries_stay_where_the_optimiser_has_no_momentum() -> None:
    method = RMLoRA(mask_ratio=0.5)
    net, bank = injected(method)
    before = [parameter.detach().clone() for parameter in bank.parameters()]
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.1)
    with torch.no_grad():
        before[1][:] = bank.B[0].normal_()
        before[3][:] = bank.B[1].normal_()
    net(torch.randn(9, 24)).square().sum().backward()
    method.before_step(bank, 1, 10)
    optimizer.step()
    for parameter, old in zip(bank.parameters(), before, strict=True):
        masked = parameter.grad == 0
        assert 0.2 < float(masked.float().mean()) < 0.8
        assert torch.equal(parameter[masked], old[masked])
        assert (parameter[~masked] != old[~masked]).float().mean() > 0.9


def test_without_both_it_is_lora() -> None:
    found = []
    for method in (RMLoRA(penalty=0.0, mask_ratio=0.0), LoRA()):
        net, bank = injected(method)
        optimizer = torch.optim.AdamW(bank.parameters(), lr=0.02)
        x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
        for step in range(1, 5):
            net(x).square().sum().backward()
            method.before_step(bank, step, 4)
            optimizer.step()
            optimizer.zero_grad()
        found.append([parameter.detach().clone() for parameter in bank.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_factor_without_a_gradient_is_left_alone() -> None:
    _, bank = injected(RMLoRA())
    RMLoRA().before_step(bank, 1, 10)
    assert all(parameter.grad is None for parameter in bank.parameters())


def test_the_regulariser_brings_the_factors_to_orthogonality() -> None:
    """What it is for: the singular values of what trained with it lie closer together."""
    spread = {}
    for penalty in (0.0, 1.0):
        method = RMLoRA(penalty=penalty, mask_ratio=0.0)
        net, bank = injected(method)
        optimizer = torch.optim.Adam(bank.parameters(), lr=0.02)
        x = torch.randn(32, 24, generator=torch.Generator().manual_seed(1))
        for step in range(1, 101):
            (net(x) - x.roll(1, 1)).square().mean().backward()
            method.before_step(bank, step, 100)
            optimizer.step()
            optimizer.zero_grad()
        values = torch.linalg.svdvals(bank.delta(0))[:R]
        spread[penalty] = float(values[0] / values[R - 1])
    assert spread[1.0] < 1.1 < 1.2 < spread[0.0]


def test_resumed_to_the_same_end(tmp_path: Path) -> None:
    config = LoRAConfig(**tiny.LORA, method=RMLoRA(penalty=0.01))
    tiny.run(tmp_path / "whole", config)
    tiny.interrupted(tmp_path / "part", "main", 6, config=config)
    tiny.run(tmp_path / "part", config, resume=True)
    assert tiny.outcome(tmp_path / "part") == tiny.outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": -1.0}, r"penalty=-1\.0: choose a number from 0 up"),
        ({"penalty": float("inf")}, r"penalty=inf: choose"),
        ({"rise": 1.5}, r"rise=1\.5: choose a part of all steps in \[0, 1\]"),
        ({"mask_ratio": 1.0}, r"mask_ratio=1\.0: choose 0, or a number between"),
        ({"mask_ratio": float("nan")}, r"mask_ratio=nan: choose"),
        ({"seed": -1}, r"seed=-1: choose a whole number from 0 to 32767"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RMLoRA(**options)
