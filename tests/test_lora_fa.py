"""LoRA with a frozen A: its start, what trains, and that the input of a target is not kept."""

import numpy as np
import pytest
import torch
from method_cases import ALPHA, R, X, adapted, awake, factors, gradcheck, grads, trained_elements

from loradrop.methods import LoRA
from loradrop.methods.lora_fa import LoRAFA


def test_the_delta_is_that_of_the_formula() -> None:
    _, bank = adapted(LoRAFA())
    awake(bank)
    for i in range(len(bank.targets)):
        A, B = bank.get_buffer(f"A_{i}").double().numpy(), bank.B[i].detach().double().numpy()
        np.testing.assert_allclose(bank.delta(i).numpy(), ALPHA / R * B @ A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start(dtype: torch.dtype) -> None:
    """A has orthonormal rows, or LoRA's bounds; B is zero; another seed draws another A."""
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    net_options = {"adapter_dtype": "base"} if dtype != torch.float32 else {}
    for init in ("orthonormal", "kaiming"):
        _, bank = adapted(LoRAFA(init=init), **net_options)
        for i, target in enumerate(bank.targets):
            A, B = (factor.detach().double().numpy() for factor in bank.factors(i))
            assert not B.any()
            gram = A @ A.T
            near = np.allclose(gram, np.eye(R), atol=rounding)
            assert near == (init == "orthonormal")
            if init == "kaiming":
                assert 0 < np.abs(A).max() <= target.in_features**-0.5
        (_, again), (_, other) = adapted(LoRAFA(init=init)), adapted(LoRAFA(init=init), seed=1)
        same = adapted(LoRAFA(init=init))[1]
        assert torch.equal(again.A_0, same.A_0) and not torch.equal(again.A_0, other.A_0)


def test_only_b_trains() -> None:
    model, bank = adapted(LoRAFA())
    expected = sum(R * target.out_features for target in bank.targets)
    assert bank.trainable == trained_elements(model) == expected
    assert all(not buffer.requires_grad for buffer in bank.buffers())
    assert len(list(bank.buffers())) == len(bank.targets)


def test_gradients_are_lora_s_gradients_of_b() -> None:
    one, bank = adapted(LoRAFA())
    two, plain = adapted(LoRA())
    awake(bank)
    with torch.no_grad():
        for copy, value in zip(factors_of(plain), factors(bank), strict=True):
            copy.copy_(value)
    names = [name for name, _ in plain.named_parameters()]
    of_b = [g for name, g in zip(names, grads(two), strict=True) if name.endswith("B")]
    torch.testing.assert_close(grads(one), of_b, rtol=1e-5, atol=1e-6)
    assert all(g.any() for g in of_b)


def factors_of(bank: object) -> list[torch.Tensor]:
    return [factor for i in range(len(bank.targets)) for factor in bank.factors(i)]


@pytest.mark.parametrize("method", [LoRAFA(), LoRA()], ids=["frozen", "trained"])
def test_the_input_of_a_target_is_kept_where_a_trains(method: LoRA) -> None:
    model, _ = adapted(method)
    x = X.clone().requires_grad_()
    y = model.last(x)
    kept = [t.untyped_storage().data_ptr() for t in y.grad_fn.saved_tensors if t is not None]
    assert (x.untyped_storage().data_ptr() in kept) == isinstance(method, LoRA)


def test_gradients_through_the_factors() -> None:
    assert gradcheck(adapted(LoRAFA(), ["layers.0.query", "last"])[1])


def test_an_unknown_start() -> None:
    with pytest.raises(ValueError, match=r"init='svd': choose one of orthonormal, kaiming"):
        LoRAFA(init="svd")
