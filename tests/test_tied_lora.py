"""Tied-LoRA against NumPy, for every choice of what trains; with A and B frozen it is VeRA."""

from itertools import combinations

import numpy as np
import pytest
import torch
from method_cases import (
    ALPHA,
    KINDS,
    LAYERS,
    R,
    adapted,
    awake,
    equal,
    factors,
    gradcheck,
    grads,
    train,
    trained_elements,
)

from loradrop.methods.tied_lora import PARTS, TiedLoRA
from loradrop.methods.vera import VeRA

CHOICES = ["".join(some) for count in (1, 2, 3, 4) for some in combinations(PARTS, count)]
each_choice = pytest.mark.parametrize("trained", CHOICES)


def elements(trained: str) -> int:
    """A and B once for each kind, u and v for each target; and those of the target alone."""
    total = 0
    for k, n, targets in [(*size, LAYERS) for size in KINDS.values()] + [(6, 4, 1)]:
        sizes = {"A": R * k, "B": R * n, "u": targets * R, "v": targets * n}
        total += sum(sizes[part] for part in trained)
    return total


@each_choice
def test_what_trains(trained: str) -> None:
    model, bank = adapted(TiedLoRA(trained=trained))
    assert bank.trainable == trained_elements(model) == elements(trained)
    names = {name[0] for name, _ in bank.named_parameters()}
    assert names == set(trained) and {n[0] for n, _ in bank.named_buffers()} == set(PARTS) - names
    before = {name: value.clone() for name, value in bank.named_parameters()}
    frozen = {name: value.clone() for name, value in bank.named_buffers()}
    assert all(not bank.delta(i).any() for i in range(len(bank.targets)))
    train(model)
    assert all(not torch.equal(value, before[name]) for name, value in bank.named_parameters())
    assert equal(list(bank.buffers()), list(frozen.values()))
    assert all(bank.delta(i).any() for i in range(len(bank.targets)))


def test_the_start() -> None:
    _, bank = adapted(TiedLoRA(u_initial=0.5))
    names = dict(bank.named_parameters())
    for name, value in names.items():
        value = value.detach()
        if name[0] == "A":
            assert 0 < value.abs().max() <= value.shape[1] ** -0.5
        else:
            assert (value == {"B": 0.0, "u": 0.5, "v": 1.0}[name[0]]).all()
    _, again = adapted(TiedLoRA())
    _, other = adapted(TiedLoRA(), seed=1)
    assert torch.equal(again.A_0, bank.A_0) and not torch.equal(again.A_0, other.A_0)


@pytest.mark.parametrize("trained", ["uv", "v", "Au"])
def test_what_is_frozen_is_drawn(trained: str) -> None:
    """Within LoRA's bounds by the fan-in, and no two rows alike."""
    _, bank = adapted(TiedLoRA(trained=trained))
    for part in {"A", "B"} - {*trained}:
        for g in set(bank.groups):
            matrix = getattr(bank, f"{part}_{g}")
            assert 0 < matrix.abs().max() <= matrix.shape[1] ** -0.5
            assert len(matrix.unique()) == matrix.numel()


def test_the_delta_is_that_of_the_formula() -> None:
    """ΔW_i = s·diag(v_i)·B·diag(u_i)·A, with the A and B of the target's kind."""
    _, bank = adapted(TiedLoRA())
    awake(bank)
    kinds = list(dict.fromkeys(target.kind for target in bank.targets))
    for i, target in enumerate(bank.targets):
        g = kinds.index(target.kind)
        names = f"A_{g}", f"B_{g}", f"u_{i}", f"v_{i}"
        A, B, u, v = (bank.get_parameter(n).detach().double().numpy() for n in names)
        expected = ALPHA / R * np.diag(v) @ B @ np.diag(u) @ A
        np.testing.assert_allclose(bank.delta(i).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_with_a_frozen_pair_it_is_vera() -> None:
    """Targets of one kind, s = 1, the same A and B, u at VeRA's d: the same training."""
    model, bank = adapted(TiedLoRA(trained="uv", u_initial=0.1), ["query"], lora_alpha=R)
    other, vera = adapted(VeRA(), ["query"])
    bank.A_0.copy_(vera.A)
    bank.B_0.copy_(vera.B)
    assert equal(factors(bank), factors(vera)) and bank.trainable == vera.trainable
    for _ in range(3):
        ours = dict(zip((n for n, _ in bank.named_parameters()), grads(model), strict=True))
        theirs = dict(zip((n for n, _ in vera.named_parameters()), grads(other), strict=True))
        for i in range(LAYERS):
            assert torch.equal(ours[f"u_{i}"], theirs[f"d.{i}"])
            assert torch.equal(ours[f"v_{i}"], theirs[f"b.{i}"]) and ours[f"v_{i}"].any()
        train(model), train(other)
        assert equal(factors(bank), factors(vera))


@pytest.mark.parametrize("trained", ["ABuv", "uv", "Bu", "Av"])
def test_gradients_through_the_factors(trained: str) -> None:
    assert gradcheck(adapted(TiedLoRA(trained=trained), ["query", "last"])[1])


@pytest.mark.parametrize("trained", ["", "ABx", "AAB", None])
def test_parts_that_are_not_there(trained: str) -> None:
    with pytest.raises(ValueError, match=rf"trained={trained!r}: choose letters of 'ABuv'"):
        TiedLoRA(trained=trained)


def test_a_start_without_gradients() -> None:
    with pytest.raises(ValueError, match=r"u_initial=0\.0: choose a finite number other than 0"):
        TiedLoRA(u_initial=0.0)
