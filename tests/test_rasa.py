"""RaSA against NumPy: the pool, the weights of the ranks, and that k = 0 is LoRA."""

from pathlib import Path

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
    by_kind,
    equal,
    factors,
    gradcheck,
    grads,
    train,
    trained_elements,
)

import loradrop
from loradrop.extra_state import STATE
from loradrop.methods import LoRA
from loradrop.methods.rasa import RaSA


def elements(k: int) -> int:
    """LoRA's own, and d: one for each rank of each target."""
    total = 0
    for K, N, L in [(*size, LAYERS) for size in KINDS.values()] + [(6, 4, 1)]:
        total += L * R * (K + N) + (L * (R - k + L * k) if k else 0)
    return total


@pytest.mark.parametrize(("k", "used"), [(None, 1), (0, 0), (1, 1)])
def test_parameters_and_ranks(k: int | None, used: int) -> None:
    model, bank = adapted(RaSA(k=k))
    assert bank.trainable == trained_elements(model) == elements(used)
    for target in bank.targets:
        L = 1 if target.kind == "last" else LAYERS
        assert target.r == R - used + L * used


@pytest.mark.parametrize(("r", "k"), [(1, 0), (2, 1), (8, 1), (16, 2), (63, 7), (64, 8)])
def test_an_eighth_of_the_rank_is_shared(r: int, k: int) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(2)))
    config = loradrop.LoRAConfig(r=r, target_modules=["0", "1"], method=RaSA())
    bank = loradrop.inject(model, config)
    assert [len(A) for A in bank.A] == [r - k] * 2


def test_the_delta_is_that_of_the_formula() -> None:
    """[B_i B_S]·diag(d_i)·[A_i; A_S], rank by rank, with the pool of the target's kind."""
    _, bank = adapted(RaSA(k=1))
    awake(bank)
    for g, members in enumerate(by_kind(bank).values()):
        names = f"A_pool_{g}", f"B_pool_{g}"
        A_S, B_S = (bank.get_parameter(n).detach().double().numpy() for n in names)
        assert len(A_S) == len(members)
        for i, target in members:
            A, B, d = (
                p.detach().double().numpy()
                for p in (bank.A[i], bank.B[i], bank.get_parameter(f"d_{i}"))
            )
            assert (len(A), len(d)) == (R - 1, target.r)
            expected = np.zeros((target.out_features, target.in_features))
            for j in range(R - 1):
                expected += d[j] * np.outer(B[:, j], A[j])
            for j in range(len(members)):
                expected += d[R - 1 + j] * np.outer(B_S[:, j], A_S[j])
            np.testing.assert_allclose(bank.delta(i).numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_start(rslora: bool) -> None:
    """d is α/2 over the own ranks, and over those of the pool; A Kaiming-uniform, B zero."""
    _, bank = adapted(RaSA(k=1), use_rslora=rslora)
    alpha = ALPHA * R**0.5 if rslora else ALPHA
    for i, target in enumerate(bank.targets):
        L = 1 if target.kind == "last" else LAYERS
        d = bank.get_parameter(f"d_{i}").detach().numpy()
        expected = [0.5 * alpha / (R - 1)] * (R - 1) + [0.5 * alpha / L] * L
        np.testing.assert_allclose(d, expected, rtol=1e-6)
    assert set(bank.scaling) == {1.0}
    for name, value in bank.named_parameters():
        value = value.detach()
        if name[0] == "A":
            assert 0 < value.abs().max() <= value.shape[1] ** -0.5
        assert name[0] != "B" or not value.any()


def test_without_a_pool_it_is_lora() -> None:
    """The same start from the same seed, the same gradients, the same end."""
    (model, bank), (other, plain) = adapted(RaSA(k=0)), adapted(LoRA())
    assert bank.scaling == plain.scaling and bank.targets == plain.targets
    for _ in range(2):
        assert equal(factors(bank), factors(plain))
        of = [
            {id(p): g for p, g in zip(m.lora_bank.parameters(), grads(m), strict=True)}
            for m in (model, other)
        ]
        for i in range(len(bank.targets)):
            for a, b in zip(bank.factors(i), plain.factors(i), strict=True):
                assert torch.equal(of[0][id(a)], of[1][id(b)])
        train(model), train(other)
    assert equal(factors(bank), factors(plain)) and bank.delta(0).any()


@pytest.mark.parametrize(("here", "there"), [(0, 1), (1, 0), (1, 2), (None, 0)])
def test_a_file_of_another_k(here: int | None, there: int, tmp_path: Path) -> None:
    """It is refused, and so are its tensors alone; the model is as it was."""
    saved, other = adapted(RaSA(k=there), ["last"])
    loradrop.save(saved, tmp_path)
    model, bank = adapted(RaSA(k=here), ["last"])
    before = factors(awake(bank))
    with pytest.raises(ValueError, match=rf"another k \({there}, not {here}\).*loradrop\.remove"):
        loradrop.load(model, tmp_path)
    if 0 in (here, there):
        tensors = {k: v for k, v in other.state_dict().items() if k != STATE}
        lacks = "model" if there else "file"
        with pytest.raises(ValueError, match=rf"tensors than.*\n  A_pool_0: not in the {lacks}"):
            bank.restore(other.assignment, tensors)
    assert equal(factors(bank), before) and bank.targets[0].r == R
    train(model)


@pytest.mark.parametrize("k", [0, 1])
def test_gradients_through_the_factors(k: int) -> None:
    assert gradcheck(adapted(RaSA(k=k), ["query", "last"])[1])


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        (-1, {}, r"k=-1: choose a whole number from 0 up, or None"),
        (1.5, {}, r"k=1\.5: choose a whole number"),
        (3, {}, r"k=3 for layers\.0\.query of rank 3: choose k below the rank"),
        (2, {}, r"k=2 of r=3 for layers\.0\.query: .*3 targets its rank is 7, and beyond 6 .*k=0"),
        (1, {"rank_pattern": {"last": 1}}, r"k=1 for last of rank 1: choose k below the rank"),
    ],
)
def test_options_that_do_not_fit(k: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(RaSA(k=k), **options)
