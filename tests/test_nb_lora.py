"""NB-LoRA against its formula: the Cayley map, and the bound on every singular value of ΔW."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import loradrop
from loradrop import LoRAConfig
from loradrop.injection import plan_of
from loradrop.methods import LoRA
from loradrop.methods.nb_lora import NBLoRA
from loradrop.plan import Plan

R = 3
SHAPES = {"wide": (10, 6), "tall": (6, 9), "thin": (9, 3)}  # thin has its greatest rank


def injected(method: Any = None, r: int = R, **options: Any) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    chain = nn.Sequential()
    for name, shape in SHAPES.items():
        chain.add_module(name, nn.Linear(*shape))
    method = method or NBLoRA(**options)
    config = LoRAConfig(r=r, lora_alpha=48, target_modules=[*SHAPES], method=method)
    return chain, loradrop.inject(chain, config)


def drawn(bank: Any, scale: float, seed: int = 0) -> Any:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in bank.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=random, dtype=torch.float64))
    return bank


def cayley(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """The orthonormal columns (K + N, r) of the stacked parameters, as the paper writes it."""
    stacked = np.concatenate((A.T, B), 0)
    r = stacked.shape[1]
    X, Y, eye = stacked[:r], stacked[r:], np.eye(r)
    Z = X - X.T + Y.T @ Y
    return np.concatenate(((eye - Z) @ np.linalg.inv(eye + Z), -2 * Y @ np.linalg.inv(eye + Z)), 0)


def allowance(bank: Any, i: int, eps: float) -> float:
    """What rounding may add to the map, in units of its results: sums of K + N terms, an r x r
    elimination, and how large the parameters are.
    """
    A, B = bank.A[i].detach().double(), bank.B[i].detach().double()
    size = (1.0 + float(A.square().sum() + B.square().sum()) ** 0.5) ** 2
    return 4 * eps * (A.shape[1] + B.shape[0] + len(A) ** 3) * size


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_the_delta_is_that_of_the_formula(scale: float) -> None:
    """2·Bᵀ·S·A, without any other scale, and orthonormal columns."""
    s = (1.5, 0.7, 0.2)
    bank = drawn(injected(s=s)[1].double(), scale)
    assert torch.equal(bank.s, torch.tensor(s).double())
    for i, (K, N) in enumerate(SHAPES.values()):
        Q = cayley(bank.A[i].detach().numpy(), bank.B[i].detach().numpy())
        np.testing.assert_allclose(Q.T @ Q, np.eye(R), atol=1e-10)
        A, B = Q[:K].T, Q[K:].T
        expected = 2 * B.T @ np.diag(np.float32(s).astype(float)) @ A
        assert expected.shape == (N, K)
        np.testing.assert_allclose(bank.delta(i).numpy(), expected, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "scales"), [("float32", (0.1, 0.3, 1)), ("float64", (0.3, 1, 9))]
)
@pytest.mark.parametrize("s", [0.5, (2.0, 0.5, 0.125)])
def test_every_singular_value_is_bounded(dtype: str, scales: Any, s: Any) -> None:
    """σ_j <= s_j over random draws, and some come near it."""
    kind = getattr(torch, dtype)
    bank = injected(s=s)[1].to(kind)
    bounds, nearest = np.broadcast_to(np.array(s), R), 0.0
    for scale in scales:
        for seed in range(40):
            drawn(bank, scale, seed)
            for i in range(len(SHAPES)):
                A, B = (factor.detach().double() for factor in bank.factors(i))
                assert A.isfinite().all() and B.isfinite().all()
                values = np.linalg.svd((2.0 * B @ A).numpy(), compute_uv=False)[:R]
                assert (values <= bounds * (1 + allowance(bank, i, torch.finfo(kind).eps))).all()
                nearest = max(nearest, (values / bounds).max())
    assert nearest > 0.9


def test_float32_keeps_the_columns_orthonormal() -> None:
    bank = drawn(injected()[1], 1.0)
    for i in range(len(SHAPES)):
        A, B = (factor.detach().double() for factor in bank.factors(i))
        gram = A @ A.T + B.T @ B
        assert float((gram - torch.eye(R)).abs().max()) < allowance(bank, i, 2.0**-23)


@pytest.mark.parametrize("adapter", ["float32", "base"])
def test_neither_autocast_nor_bfloat16_parameters_spoil_it(adapter: str) -> None:
    """The map is computed in float32: off by its results' rounding to bfloat16 at most."""
    chain = nn.Sequential(nn.Linear(24, 16, dtype=torch.bfloat16))
    config = LoRAConfig(r=R, target_modules=["0"], adapter_dtype=adapter, method=NBLoRA(s=0.5))
    bank = drawn(loradrop.inject(chain, config), 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        A, B = (factor.detach() for factor in bank.factors(0))
    narrow = torch.bfloat16 if adapter == "base" else torch.float32
    assert A.dtype == B.dtype == narrow == bank.A[0].dtype
    values = torch.linalg.svdvals(2.0 * B.double() @ A.double())
    eps = 2.0**-8 if adapter == "base" else 0.0
    assert float(values.max()) <= 0.5 * (1 + 8 * eps + allowance(bank, 0, 2.0**-23))


def test_the_start() -> None:
    """The free A is LoRA's, the free B and ΔW are zero, and A has orthonormal rows already."""
    chain, bank = injected()
    lora = injected(LoRA())[1]
    for i in range(len(SHAPES)):
        assert torch.equal(bank.A[i], lora.A[i]) and not bank.B[i].any()
        A, B = bank.factors(i)
        assert not B.any() and not bank.delta(i).any()
        torch.testing.assert_close(A @ A.T, torch.eye(R), atol=1e-5, rtol=0)
    assert bank.scaling == (2.0,) * len(SHAPES)
    assert bank.trainable == lora.trainable == R * sum(K + N for K, N in SHAPES.values())
    assert [name for name, _ in bank.named_buffers()] == ["s"]
    chain(torch.randn(8, 10)).square().sum().backward()
    assert all(B.grad.any() for B in bank.B)


def test_every_direction_within_the_bound_can_be_reached() -> None:
    """Trained towards a matrix of the spectral norm s, ΔW comes near it; of twice s, it stops."""
    torch.manual_seed(0)
    layer = loradrop.LoRALinear(6, 6, bias=False, r=2, method=NBLoRA(s=0.5))
    bank = layer.lora_bank
    U, V = (torch.linalg.qr(torch.randn(6, 2))[0] for _ in "UV")
    optimizer = torch.optim.Adam(bank.parameters(), lr=0.05)
    for size, near in ((0.45, 0.0), (1.0, 0.5)):
        for _ in range(150):
            optimizer.zero_grad()
            A, B = bank.factors(0)
            (2.0 * B @ A - size * U @ V.T).square().sum().backward()
            optimizer.step()
        off = torch.linalg.matrix_norm(bank.delta(0) - size * U @ V.T, 2)
        assert abs(float(off) - near) < 0.02


def test_gradients_through_the_composition() -> None:
    bank = drawn(injected(s=(1.5, 0.7, 0.2))[1].double(), 0.5)
    for i in range(len(SHAPES)):
        inputs = (bank.A[i], bank.B[i])
        assert gradcheck(lambda *_, i=i: bank.factors(i), inputs)


@pytest.mark.parametrize(
    ("s", "message"),
    [
        (0.0, r"s=0\.0: choose a positive bound"),
        (float("nan"), "s=nan: choose a positive bound"),
        ([], r"s=\(\): choose a positive bound, or one for each rank"),
        ([0.5, 1.0, 1.0], r"s=\(0\.5, 1\.0, 1\.0\): choose the largest bound first"),
        ([1.0, 0.5], r"s=\(1\.0, 0\.5\) has 2 bounds, and wide the rank 3: choose as many, or one"),
    ],
)
def test_options_out_of_range(s: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        injected(s=s)


def test_bounds_survive_a_configuration_file() -> None:
    config = LoRAConfig(method=NBLoRA(s=[1.0, 0.5]))
    data = config.to_dict()
    data["method"]["s"] = list(data["method"]["s"])  # as JSON and YAML give it back
    assert LoRAConfig.from_dict(data) == config


def test_bounds_survive_a_plan() -> None:
    plan = plan_of(injected(s=[1.0, 0.5, 0.25])[0])
    data = plan.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert Plan.from_dict(data) == plan and plan.config.method == NBLoRA(s=(1.0, 0.5, 0.25))
