"""PRoLoRA against its formula: chunks that are copied, rotated and cut, and ranks of their own."""

from typing import Any

import numpy as np
import pytest
import torch
from method_cases import awake
from torch import Tensor, nn
from torch.autograd import gradcheck

import loradrop
from loradrop import LoRAConfig
from loradrop.methods import LoRA, Method
from loradrop.methods.prolora import PRoLoRA

R = 7
SHAPES = {"wide": (10, 8), "tall": (8, 13), "square": (13, 13)}


def injected(method: Method, r: int = R, seed: int = 0) -> tuple[nn.Sequential, Any]:
    """A chain of layers of three shapes; s = 2."""
    torch.manual_seed(seed)
    chain = nn.Sequential()
    for name, shape in SHAPES.items():
        chain.add_module(name, nn.Linear(*shape))
    config = LoRAConfig(r=r, lora_alpha=2 * r, target_modules=[*SHAPES], method=method)
    return chain, loradrop.inject(chain, config)


def composed(chunk: np.ndarray, width: int, count: int) -> np.ndarray:
    """(ranks, width) from the chunk (ranks, ⌈width/count⌉), element by element."""
    ranks, columns = chunk.shape
    stride = max(ranks // count, 1)
    whole = np.empty((ranks, width), chunk.dtype)
    for rank in range(ranks):
        for k in range(width):
            copy, column = divmod(k, columns)
            whole[rank, k] = chunk[(rank + copy * stride) % ranks, column]
    return whole


@pytest.mark.parametrize(("m", "n", "u"), [(3, 4, 1), (2, 2, 0), (4, 1, 3), (8, 8, 1)])
def test_the_delta_is_that_of_the_formula(m: int, n: int, u: int) -> None:
    """Widths that m and n do not divide, strides above 1, and more copies than ranks."""
    bank = awake(injected(PRoLoRA(m=m, n=n, u=u))[1])
    for i, (K, N) in enumerate(SHAPES.values()):
        A = composed(bank.A[i].detach().numpy(), K, m)
        B = composed(bank.B[i].detach().numpy().T, N, n).T
        if u:
            A = np.concatenate((A, bank.own_A[i].detach().numpy()), 0)
            B = np.concatenate((B, bank.own_B[i].detach().numpy()), 1)
        found = bank.factors(i)
        assert np.array_equal(found[0].detach().numpy(), A)
        assert np.array_equal(found[1].detach().numpy(), B)
        delta = 2.0 * B.astype(float) @ A
        np.testing.assert_allclose(bank.delta(i).numpy(), delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "n", "u"), [(3, 4, 1), (2, 2, 0), (4, 1, 3)])
def test_what_is_trained(m: int, n: int, u: int) -> None:
    bank = injected(PRoLoRA(m=m, n=n, u=u))[1]
    sizes = (
        u * (K + N) + (R - u) * (int(np.ceil(K / m)) + int(np.ceil(N / n)))
        for K, N in SHAPES.values()
    )
    assert bank.trainable == sum(sizes)


def test_a_quarter_of_the_ranks_is_unshared_unless_you_say_otherwise() -> None:
    for r, u in ((8, 2), (7, 1), (3, 0), (1, 0)):
        bank = injected(PRoLoRA(), r)[1]
        assert [len(A) for A in bank.A] == [r - u] * 3
        assert [len(A) for A in bank.own_A] == ([u] * 3 if u else [])


def test_ranks_that_differ() -> None:
    """Of rank 3 none is unshared, of rank 8 two are."""
    chain = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 13))
    config = LoRAConfig(r=8, rank_pattern={"0": 3}, target_modules=["0", "1"], method=PRoLoRA())
    bank = awake(loradrop.inject(chain, config))
    assert [tuple(f.shape) for f in bank.factors(0)] == [(3, 10), (8, 3)]
    A, B = bank.factors(1)
    assert torch.equal(A[6:], bank.own_A[0]) and torch.equal(B[:, 6:], bank.own_B[0])


def test_the_rectified_start() -> None:
    """A is within ± 1/√K, as LoRA's is, and not within ± 1/√⌈K/m⌉, four times as far."""
    layer = loradrop.LoRALinear(1024, 64, r=16, method=PRoLoRA(m=16, n=16, u=4))
    bank = layer.lora_bank
    for A in (bank.A[0].detach(), bank.own_A[0].detach()):
        assert 0.95 / 32 < float(A.abs().max()) <= 1 / 32
        np.testing.assert_allclose(float(A.square().mean()), 1 / 32**2 / 3, rtol=0.2)
    assert not bank.B[0].any() and not bank.own_B[0].any()


@pytest.mark.parametrize("u", [0, 1, 6])
def test_one_copy_is_lora_of_the_same_rank(u: int) -> None:
    """From equal values come equal outputs and gradients."""
    plain, lora = injected(LoRA())
    chain, bank = injected(PRoLoRA(m=1, n=1, u=u))
    awake(lora)
    with torch.no_grad():
        for i in range(len(SHAPES)):
            bank.A[i].copy_(lora.A[i][: R - u])
            bank.B[i].copy_(lora.B[i][:, : R - u])
            if u:
                bank.own_A[i].copy_(lora.A[i][R - u :])
                bank.own_B[i].copy_(lora.B[i][:, R - u :])
    assert bank.trainable == lora.trainable
    x = torch.randn(5, 10).double()
    for model in (plain.double(), chain.double()):
        model(x).square().sum().backward()
    torch.testing.assert_close(chain(x), plain(x))

    def gradients(name: str, i: int) -> list[Tensor]:
        own = [getattr(bank, f"own_{name}")[i].grad] if u else []
        return [getattr(bank, name)[i].grad, *own]

    for i in range(len(SHAPES)):
        torch.testing.assert_close(torch.cat(gradients("A", i), 0), lora.A[i].grad)
        torch.testing.assert_close(torch.cat(gradients("B", i), 1), lora.B[i].grad)


def test_one_copy_starts_as_lora_does() -> None:
    lora, bank = injected(LoRA())[1], injected(PRoLoRA(m=1, n=1, u=0))[1]
    for ours, theirs in zip(bank.A, lora.A, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_through_the_composition() -> None:
    bank = awake(injected(PRoLoRA(m=3, n=4, u=1))[1].double())
    for i in range(len(SHAPES)):
        inputs = (bank.A[i], bank.B[i], bank.own_A[i], bank.own_B[i])
        assert gradcheck(lambda *_, i=i: torch.matmul(*reversed(bank.factors(i))), inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 0}, "m=0: choose a whole number from 1 up"),
        ({"n": 1.5}, r"n=1\.5: choose a whole number from 1 up"),
        ({"u": -1}, "u=-1: choose a whole number from 0 up, or None"),
        ({"m": 11}, r"m=11 for wide \(10 -> 8\).*m <= 10.*exclude_modules"),
        ({"n": 9}, r"n=9 for wide \(10 -> 8\).*n <= 8.*exclude_modules"),
        ({"u": R}, rf"u={R} for wide .*of rank {R}.*u < {R}.*LoRA\(\)"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        injected(PRoLoRA(**options))
