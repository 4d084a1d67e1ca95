"""The op: every backend against float64 within PyTorch's own error, every option, every refusal."""

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

import loradrop.ops
from loradrop import dispatch, philox
from loradrop.ops import lora_add, lora_linear
from loradrop.testing import AWKWARD, Shape, assert_within, torch_delta

S = 1.3  # no power of two, so that scaling rounds
SEED = torch.tensor(81985529216486895)
BACKENDS = ["reference", "eager"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LEAVES = ("x", "A", "B")
Tensors = dict[str, Tensor]


def short(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)


def draw(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Inputs of ordinary sizes; the adapters are parameters in float32, in float64 for float64."""
    m, k, n, r = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": normal(m, k).to(dtype),
        "weight": (normal(n, k) / math.sqrt(k)).to(dtype),
        "bias": normal(n).to(dtype),
        "A": (normal(r, k) / math.sqrt(k)).to(wide),
        "B": (normal(n, r) / math.sqrt(r)).to(wide),
        "dy": normal(m, n).to(dtype),
    }


def leaves(t: Tensors) -> list[Tensor]:
    return [t[name].requires_grad_() for name in LEAVES]


def kept(t: Tensors, p: float) -> Tensor | None:
    rows = t["x"].shape[:-1].numel()
    mask = philox.keep_mask(SEED, rows, t["x"].shape[-1], p) if p else None
    return None if mask is None else mask.view(t["x"].shape)


def through_torch(t: Tensors, dtype: torch.dtype, p: float) -> list[Tensor]:
    """y, dx, dA, dB, norm by PyTorch's own path in `dtype`; the adapters rounded to x's dtype."""
    d = {name: tensor.detach().to(t["x"].dtype).to(dtype) for name, tensor in t.items()}
    inputs = leaves(d)
    delta = torch_delta(d["x"], d["A"], d["B"], S, kept(d, p), p)
    y = F.linear(d["x"], d["weight"], d["bias"]) + delta
    grads = torch.autograd.grad(y, inputs, d["dy"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [y.detach(), *grads, delta.detach().to(wide).square().sum()]


def through_op(t: Tensors, backend: str | None, p: float) -> list[Tensor]:
    t = {name: tensor.detach() for name, tensor in t.items()}
    inputs = leaves(t)
    y, norm = lora_linear(
        *(t[n] for n in ("x", "weight", "bias", "A", "B")),
        S,
        dropout=p,
        seed=SEED if p else None,
        return_sqnorm=True,
        backend=backend,
    )
    return [y.detach(), *torch.autograd.grad(y, inputs, t["dy"]), norm]


# Values and gradients


@pytest.mark.parametrize("p", [0.0, 0.25])
@each_dtype
@pytest.mark.parametrize("name", AWKWARD)
@each_backend
def test_error_is_within_that_of_pytorch(
    backend: str, name: str, dtype: torch.dtype, p: float
) -> None:
    m, k, _, r = AWKWARD[name]
    draws = 32 if m * r < 100 else 1 if k > 1000 else 5  # enough roundings to compare
    runs = []
    for seed in range(draws):
        t = draw(AWKWARD[name], dtype, seed)
        results = (
            through_op(t, backend, p),
            through_torch(t, dtype, p),
            through_torch(t, torch.float64, p),
        )
        runs.append([[value.flatten() for value in result] for result in results])
        assert [v.dtype for v in results[0]] == [dtype, dtype, *[t["A"].dtype] * 2, torch.float32]
    for i, what in enumerate(("y", "dx", "dA", "dB")):
        ours, pytorchs, exact = (torch.cat([run[j][i] for run in runs]) for j in range(3))
        try:
            assert_within(ours, pytorchs, exact)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None


@each_dtype
@pytest.mark.parametrize("name", ["one token", "rank 1", "rank 64"])
@each_backend
def test_error_of_the_norm_is_within_that_of_pytorch(
    backend: str, name: str, dtype: torch.dtype
) -> None:
    ours, pytorchs, exact = torch.tensor(
        [
            [
                float(through_op(t, backend, 0.0)[4]),
                *(float(through_torch(t, d, 0.0)[4]) for d in (dtype, torch.float64)),
            ]
            for t in (draw(AWKWARD[name], dtype, seed) for seed in range(32))
        ],
        dtype=torch.float64,
    ).T
    in_float32 = 2**-24 * exact.norm()
    assert (ours - exact).norm() <= 1.2 * (pytorchs - exact).norm() + in_float32


@pytest.mark.parametrize("wrong", ["zeros", "nan", "sign", "scale", "shape"])
def test_the_bound_is_a_bound(wrong: str) -> None:
    t = draw(AWKWARD["rank 8"], torch.bfloat16)
    dA, pytorchs, exact = (
        r[2]
        for r in (
            through_op(t, None, 0.0),
            *(through_torch(t, d, 0.0) for d in (torch.bfloat16, torch.float64)),
        )
    )
    assert_within(dA, pytorchs, exact)
    bad = {
        "zeros": torch.zeros_like(dA),
        "nan": dA.clone().index_fill_(0, torch.tensor([0]), math.nan),
        "sign": -dA,
        "scale": dA * 1.01,
        "shape": dA[:-1],
    }
    with pytest.raises(AssertionError):
        assert_within(bad[wrong], pytorchs, exact)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_gradients_of_half_inputs_are_summed_in_float32(backend: str, dtype: torch.dtype) -> None:
    """2049 ones: bfloat16 stops counting at 256, float16 at 2048."""
    x, one = torch.ones(2049, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    A, B = (torch.ones(1, 1, requires_grad=True) for _ in range(2))
    lora_linear(x, one, None, A, B, 1.0, backend=backend).sum().backward()
    assert A.grad is not None and B.grad is not None
    assert (float(A.grad), float(B.grad)) == (2049.0, 2049.0)


@each_backend
def test_scaling_does_not_overflow_float16(backend: str) -> None:
    """s·h is 96 000 here, beyond float16; h and y are not."""
    x, A = torch.full((2, 4), 100.0), torch.full((1, 4), 7.5)
    B, weight = torch.full((3, 1), 2.0**-6), torch.zeros(3, 4)
    half = [tensor.half() for tensor in (x, weight)]
    y, norm = lora_linear(*half, None, A, B, 32.0, return_sqnorm=True, backend=backend)
    assert torch.equal(y, torch.full((2, 3), 1500.0, dtype=torch.float16))
    assert float(norm) == 6 * 1500.0**2


@pytest.mark.parametrize("p", [0.0, 0.3])
@each_backend
def test_gradcheck(backend: str, p: float) -> None:
    t = draw(Shape(3, 5, 4, 2), torch.float64)
    more: dict[str, Any] = {"dropout": p, "seed": SEED if p else None, "backend": backend}

    def frozen(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, t["weight"], t["bias"], A, B, S, **more)

    def trained(x: Tensor, A: Tensor, B: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return lora_linear(x, weight, bias, A, B, S, **more)

    def added(x: Tensor, A: Tensor, B: Tensor, y0: Tensor) -> Tensor:
        return lora_add(y0, x, A, B, S, **more)

    inputs = leaves(t)
    weight, bias, y0 = (t[name].clone().requires_grad_() for name in ("weight", "bias", "dy"))
    assert torch.autograd.gradcheck(frozen, inputs)
    assert torch.autograd.gradcheck(trained, [*inputs, weight, bias])
    assert torch.autograd.gradcheck(added, [*inputs, y0])


@each_backend
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("entry", ["lora_linear", "lora_add"])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_subset_of_gradients(
    entry: str, needs: tuple[bool, ...], p: float, backend: str
) -> None:
    t = draw(Shape(5, 8, 6, 2), torch.float32)
    names = (*LEAVES, "y0" if entry == "lora_add" else "weight")
    t["y0"] = t["dy"] + 1

    def run(wanted: tuple[bool, ...]) -> list[Tensor | None]:
        d = {name: tensor.clone() for name, tensor in t.items()}
        for name, need in zip(names, wanted, strict=True):
            d[name].requires_grad_(need)
        base = (d["y0"], d["x"]) if entry == "lora_add" else (d["x"], d["weight"], None)
        function = lora_add if entry == "lora_add" else lora_linear
        y = function(*base, d["A"], d["B"], S, dropout=p, seed=SEED, backend=backend)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(t["dy"])
        return [d[name].grad for name in names]

    for need, grad, full in zip(needs, run(needs), run((True,) * 4), strict=True):
        assert (grad is not None) == need
        if grad is not None:
            torch.testing.assert_close(grad, full, rtol=1e-6, atol=1e-6)


@each_backend
def test_weight_that_is_trained_gets_its_gradient(backend: str) -> None:
    t = draw(AWKWARD["rank 4"], torch.float64)
    inputs = [t[name].requires_grad_() for name in ("x", "weight", "bias", "A", "B")]
    y = lora_linear(*inputs, S, backend=backend)
    expected = F.linear(*inputs[:3]) + torch_delta(t["x"], t["A"], t["B"], S)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(
        *(torch.autograd.grad(out, inputs, t["dy"]) for out in (y, expected)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_bias_alone_can_be_trained() -> None:
    t = draw(AWKWARD["rank 4"])
    bias = t["bias"].requires_grad_()
    lora_linear(t["x"], t["weight"], bias, t["A"], t["B"], S).backward(t["dy"])
    torch.testing.assert_close(bias.grad, t["dy"].sum(0))


def test_lora_add_is_the_op_over_any_base() -> None:
    t = draw(AWKWARD["rank 8"], torch.float64)
    x, A, B = leaves(t)
    y0 = torch.tanh(F.linear(x, t["weight"], t["bias"]))
    y, norm = lora_add(y0, x, A, B, S, return_sqnorm=True)
    delta = torch_delta(x, A, B, S)
    torch.testing.assert_close(y, y0 + delta, rtol=1e-12, atol=1e-12)
    assert float(norm) == pytest.approx(float(delta.detach().square().sum()), rel=1e-6)
    for got, want in zip(
        *(
            torch.autograd.grad(out, (x, A, B), t["dy"], retain_graph=True)
            for out in (y, y0 + delta)
        ),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# The norm


def factors_in_use(t: Tensors, backend: str, p: float) -> tuple[Tensor, Tensor]:
    """h as the backend rounds it, and B rounded to x's dtype, both in float64."""
    _, h = dispatch.get(backend).forward(
        t["x"], t["weight"], None, None, t["A"], t["B"], S, p, SEED if p else None
    )
    return h.double(), t["B"].to(t["x"].dtype).double()


@pytest.mark.parametrize("p", [0.0, 0.25])
@each_dtype
@pytest.mark.parametrize("B_is", ["random", "cancelling"])
@each_backend
def test_norm_accuracy(backend: str, B_is: str, dtype: torch.dtype, p: float) -> None:
    """Within 1e-5 of ‖|B||h|‖², also where B·h cancels almost to nothing."""
    t = draw(AWKWARD["rank 64"], dtype)
    if B_is == "cancelling":
        t["B"] = t["B"][:, :1].repeat(1, 64) * (1 + 2.0**-6 * torch.rand(130, 64))
        t["A"] = t["A"][:1] * torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0).unsqueeze(1)
        t["A"], t["B"] = (t[n].to(draw(Shape(0, 1, 1, 1), dtype)["A"].dtype) for n in "AB")
    _, norm = lora_linear(
        t["x"], t["weight"], None, t["A"], t["B"], S,
        dropout=p, seed=SEED, return_sqnorm=True, backend=backend,
    )  # fmt: skip
    h, B = factors_in_use(t, backend, p)
    exact = float((S * h @ B.T).square().sum())
    largest = float((S * h.abs() @ B.abs().T).square().sum())
    if B_is == "cancelling":
        assert exact < 1e-3 * largest
    assert abs(float(norm) - exact) <= 1e-5 * largest
    assert float(norm) == pytest.approx(exact, rel=1e-5)


@each_dtype
@each_backend
def test_norm_is_of_the_h_that_was_added(backend: str, dtype: torch.dtype) -> None:
    """With W = 0, B = 1 and s = 1, y is h itself."""
    t = draw(Shape(50, 40, 1, 1), dtype)
    one, zero = torch.ones(1, 1), torch.zeros(1, 40, dtype=dtype)
    for p in (0.0, 0.25):
        y, norm = lora_linear(
            t["x"], zero, None, t["A"], one, 1.0,
            dropout=p, seed=SEED, return_sqnorm=True, backend=backend,
        )  # fmt: skip
        assert float(norm) == pytest.approx(float(y.double().square().sum()), rel=2**-23)


@each_backend
def test_h_is_unscaled(backend: str) -> None:
    t = draw(AWKWARD["rank 8"], torch.float64)
    q = philox.quantize(0.25)
    for p, x in ((0.0, t["x"]), (q, t["x"] * kept(t, q) / (1 - q))):
        h, _ = factors_in_use(t, backend, p)
        torch.testing.assert_close(h, x @ t["A"].T, rtol=1e-12, atol=1e-12)


@each_dtype
@each_backend
def test_the_norm_changes_no_bit(backend: str, dtype: torch.dtype) -> None:
    t = draw(AWKWARD["rank 8"], dtype)
    weights = torch.ones(37)
    outcomes = []
    for more in (
        {},
        {"return_sqnorm": True},
        {"return_sqnorm": True, "token_weights": weights},
        {"statistic": torch.zeros((), dtype=torch.float64, requires_grad=True)},
    ):
        d = {name: tensor.clone() for name, tensor in t.items()}
        inputs = leaves(d)
        y = lora_linear(
            *(d[n] for n in ("x", "weight", "bias", "A", "B")), S,
            dropout=0.25, seed=SEED, backend=backend, **more,
        )  # fmt: skip
        y = y[0] if isinstance(y, tuple) else y
        outcomes.append([y, *torch.autograd.grad(y, inputs, t["dy"])])
    for other in outcomes[1:]:
        for one, two in zip(outcomes[0], other, strict=True):
            assert torch.equal(one, two)


@each_backend
def test_norm_is_a_float32_scalar_without_gradient(backend: str) -> None:
    for dtype in DTYPES:
        t = draw(AWKWARD["rank 4"], dtype)
        leaves(t)
        _, norm = lora_linear(
            t["x"], t["weight"], None, t["A"], t["B"], S, return_sqnorm=True, backend=backend
        )
        assert (norm.dtype, norm.shape) == (torch.float32, ())
        assert not norm.requires_grad


WEIGHTS = {
    "bool": torch.tensor([True, False, True, True, False]),
    "int64": torch.tensor([1, 0, 1, 2, 0]),
    "float32": torch.tensor([0.5, 0.0, 1.0, 2.25, 0.0]),
    "bfloat16": torch.tensor([0.5, 0.0, 1.0, 2.25, 0.0], dtype=torch.bfloat16),
    "float64": torch.tensor([0.1, 0.0, 1e-3, 7.0, 0.0], dtype=torch.float64),
    "all zero": torch.zeros(5),
}


@each_backend
@pytest.mark.parametrize("padding", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_token_weights(weights: Tensor, padding: float, backend: str) -> None:
    t = draw(Shape(5, 12, 9, 3))
    per_token = torch_delta(*(t[n].double() for n in LEAVES), S).square().sum(1)
    t["x"][weights == 0] = padding
    _, norm = lora_linear(
        t["x"], t["weight"], None, t["A"], t["B"], S,
        token_weights=weights, return_sqnorm=True, backend=backend,
    )  # fmt: skip
    assert float(norm) == pytest.approx(float((per_token * weights.double()).sum()), rel=1e-5)


@each_backend
def test_statistic_receives_the_norm_once_per_backward(backend: str) -> None:
    t = draw(AWKWARD["rank 8"])
    leaves(t)
    statistic = torch.zeros((), dtype=torch.float64, requires_grad=True)
    weights = (torch.arange(37) % 3).float()
    y, norm = lora_linear(
        *(t[n] for n in ("x", "weight", "bias", "A", "B")), S,
        token_weights=weights, return_sqnorm=True, statistic=statistic, backend=backend,
    )  # fmt: skip
    assert statistic.grad is None and float(norm) > 0
    for times in (1, 2, 3):
        (1000.0 * y).sum().backward(retain_graph=True)  # the loss's scale says nothing
        assert float(statistic.grad) == times * float(norm)
        assert float(statistic.detach()) == 0.0


def test_statistic_of_frozen_inputs() -> None:
    t = draw(AWKWARD["rank 8"])
    statistic = torch.zeros((), dtype=torch.float64, requires_grad=True)
    args = [t[n] for n in ("x", "weight", "bias", "A", "B")]
    lora_linear(*args, S, statistic=statistic).sum().backward()
    _, norm = lora_linear(*args, S, return_sqnorm=True)
    assert float(statistic.grad) == float(norm)


# Layouts


def strided(tensor: Tensor, how: str) -> Tensor:
    """The values of `tensor` (2-D) in another layout."""
    if how == "transposed":
        return tensor.T.contiguous().T
    if how == "every other":
        wide = torch.full((tensor.shape[0], 2 * tensor.shape[1]), 99.0, dtype=tensor.dtype)
        wide[:, ::2] = tensor
        return wide[:, ::2]
    if how == "offset":
        wide = torch.full((tensor.shape[0] + 2, tensor.shape[1] + 3), 99.0, dtype=tensor.dtype)
        wide[2:, 3:] = tensor
        return wide[2:, 3:]
    return tensor


LAYOUTS = ["transposed", "every other", "offset"]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "weight", "A", "B", "dy"])
def test_strides(which: str, how: str, dtype: torch.dtype, backend: str) -> None:
    t = draw(AWKWARD["rank 4"], dtype)
    for p in (0.0, 0.25):
        plain = through_op(t, backend, p)
        other = through_op(t | {which: strided(t[which], how)}, backend, p)
        near = 1e-5 if dtype == torch.float32 else 2e-2
        for one, two in zip(plain, other, strict=True):
            torch.testing.assert_close(one, two, rtol=near, atol=near)


@each_backend
def test_expanded_input(backend: str) -> None:
    t = draw(AWKWARD["rank 4"])
    t["x"] = t["x"][:1].expand(37, -1)
    copied = t | {"x": t["x"].contiguous()}
    for one, two in zip(
        through_op(t, backend, 0.25), through_op(copied, backend, 0.25), strict=True
    ):
        torch.testing.assert_close(one, two)


@each_backend
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("rows", [(), (1,), (6,), (2, 3), (1, 2, 3), (2, 0), (0,)], ids=str)
def test_leading_axes(rows: tuple[int, ...], p: float, backend: str) -> None:
    m = math.prod(rows)
    t = draw(Shape(m, 10, 7, 3))
    weights = torch.arange(m, dtype=torch.float32)
    flat = through_op(t, backend, p)
    inputs = [t["x"].view(*rows, 10), *(t[n] for n in ("weight", "bias", "A", "B"))]
    for i in (0, 3, 4):
        inputs[i] = inputs[i].detach().requires_grad_()
    y, norm = lora_linear(
        *inputs, S, dropout=p, seed=SEED,
        token_weights=weights.view(rows), return_sqnorm=True, backend=backend,
    )  # fmt: skip
    assert y.shape == (*rows, 7)
    grads = torch.autograd.grad(y, [inputs[i] for i in (0, 3, 4)], t["dy"].view(*rows, 7))
    assert grads[0].shape == inputs[0].shape
    for got, want in zip((y, *grads), flat, strict=False):
        torch.testing.assert_close(got.reshape(want.shape), want)
    if m == 0:
        assert not any(grad.any() for grad in grads)
        assert float(norm) == 0.0


@each_backend
def test_permuted_batch(backend: str) -> None:
    t = draw(Shape(12, 10, 7, 3))
    x = t["x"].view(3, 4, 10).transpose(0, 1)
    y = lora_linear(x, t["weight"], None, t["A"], t["B"], S, backend=backend)
    copied = lora_linear(x.contiguous(), t["weight"], None, t["A"], t["B"], S, backend=backend)
    torch.testing.assert_close(y, copied)


# Autocast


@each_backend
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_autocast_does_what_autocast_does(backend: str, p: float) -> None:
    ours, pytorchs, exact = [], [], []
    for seed in range(6):
        t = draw(AWKWARD["rank 8"], torch.float32, seed)
        for results, run in ((ours, "op"), (pytorchs, "torch"), (exact, "exact")):
            dtype = torch.float64 if run == "exact" else torch.float32
            d = {n: tensor.detach().to(dtype) for n, tensor in t.items()}
            inputs = leaves(d)
            with torch.autocast("cpu", torch.bfloat16, enabled=run != "exact"):
                if run == "op":
                    y = lora_linear(
                        *(d[n] for n in ("x", "weight", "bias", "A", "B")), S,
                        dropout=p, seed=SEED, backend=backend,
                    )  # fmt: skip
                else:
                    y = F.linear(d["x"], d["weight"], d["bias"])
                    y = y + torch_delta(d["x"], d["A"], d["B"], S, kept(d, p), p)
            assert y.dtype == (torch.float64 if run == "exact" else torch.bfloat16)
            grads = torch.autograd.grad(y, inputs, d["dy"].to(y.dtype))
            assert all(g.dtype == dtype for g in grads)
            results.append([y.detach(), *grads])
    for i in range(4):
        assert_within(*(torch.cat([run[i] for run in runs]) for runs in (ours, pytorchs, exact)))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_autocast_around_backward_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    """The forward decides; a loss.backward() inside the block computes what one outside does."""
    t = draw(AWKWARD["rank 8"], dtype)
    outside = through_op(t, backend, 0.25)
    inputs = leaves(t)
    y = lora_linear(
        *(t[n] for n in ("x", "weight", "bias", "A", "B")), S,
        dropout=0.25, seed=SEED, backend=backend,
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, inputs, t["dy"])
    for one, two in zip(outside[1:4], inside, strict=True):
        assert torch.equal(one, two)


def test_autocast_leaves_float64_alone() -> None:
    t = draw(AWKWARD["rank 4"], torch.float64)
    plain = through_op(t, None, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        under = through_op(t, None, 0.0)
    for one, two in zip(plain, under, strict=True):
        assert torch.equal(one, two)


def test_autocast_of_lora_add() -> None:
    t = draw(AWKWARD["rank 4"])
    with torch.autocast("cpu", torch.bfloat16):
        y0 = F.linear(t["x"], t["weight"])
        assert lora_add(y0, t["x"], t["A"], t["B"], S).dtype == torch.bfloat16
    with torch.autocast("cpu", enabled=False):
        assert lora_add(t["dy"], t["x"], t["A"], t["B"], S).dtype == torch.float32


# What it must not do


@each_backend
@each_dtype
@pytest.mark.parametrize("entry", ["lora_linear", "lora_add"])
def test_nothing_is_mutated(entry: str, dtype: torch.dtype, backend: str) -> None:
    t = draw(AWKWARD["rank 8"], dtype)
    weights = (torch.arange(37) % 2).float()
    y0 = t["dy"].clone()
    everything = [*t.values(), weights, SEED, y0]
    before = [(tensor.clone(), tensor._version) for tensor in everything]
    inputs = leaves(t)
    base = (y0, t["x"]) if entry == "lora_add" else (t["x"], t["weight"], t["bias"])
    y, _ = (lora_add if entry == "lora_add" else lora_linear)(
        *base, t["A"], t["B"], S,
        dropout=0.25, seed=SEED, token_weights=weights, return_sqnorm=True, backend=backend,
    )  # fmt: skip
    assert y.untyped_storage().data_ptr() != y0.untyped_storage().data_ptr()
    torch.autograd.grad(y, inputs, t["dy"])
    for tensor, (value, version) in zip(everything, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


@each_backend
def test_the_output_may_be_changed_in_place(backend: str) -> None:
    t = draw(AWKWARD["rank 8"])
    expected = through_op(t, backend, 0.0)
    inputs = leaves(t)
    y = lora_linear(*(t[n] for n in ("x", "weight", "bias", "A", "B")), S, backend=backend)
    y.mul_(2.0)
    grads = torch.autograd.grad(y, inputs, t["dy"])
    for got, want in zip(grads, expected[1:4], strict=True):
        torch.testing.assert_close(got, 2 * want)


@each_backend
def test_retain_graph_twice(backend: str) -> None:
    t = draw(AWKWARD["rank 8"])
    inputs = leaves(t)
    y = lora_linear(
        *(t[n] for n in ("x", "weight", "bias", "A", "B")), S,
        dropout=0.25, seed=SEED, backend=backend,
    )  # fmt: skip
    first = torch.autograd.grad(y, inputs, t["dy"], retain_graph=True)
    second = torch.autograd.grad(y, inputs, t["dy"])
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs, t["dy"])


@each_backend
def test_double_backward_raises(backend: str) -> None:
    t = draw(AWKWARD["rank 8"], torch.float64)
    inputs = leaves(t)
    y = lora_linear(*(t[n] for n in ("x", "weight", "bias", "A", "B")), S, backend=backend)
    dx, dA, _ = torch.autograd.grad(y, inputs, t["dy"].requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (dx.square().sum() + dA.sum()).backward()


def test_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    through_op(draw(AWKWARD["rank 8"]), None, 0.25)
    assert torch.equal(torch.get_rng_state(), before)


@each_backend
def test_inference_mode(backend: str) -> None:
    t = draw(AWKWARD["rank 8"])
    expected = through_op(t, backend, 0.0)
    with torch.inference_mode():
        y, norm = lora_linear(
            *(t[n] for n in ("x", "weight", "bias", "A", "B")), S,
            return_sqnorm=True, backend=backend,
        )  # fmt: skip
    assert torch.equal(y, expected[0]) and torch.equal(norm, expected[4])


# Backends and refusals


@pytest.mark.parametrize("part", ["forward", "backward", "sqnorm"])
def test_signatures_are_identical(part: str) -> None:
    signatures = {
        b.name: [
            (p.name, p.kind, p.default)
            for p in inspect.signature(getattr(b, part)).parameters.values()
        ]
        for b in dispatch.backends()
        if b.available() is None
    }
    assert set(BACKENDS) <= set(signatures)
    assert all(signature == signatures["reference"] for signature in signatures.values())


def test_both_entries_take_the_same_options() -> None:
    one, two = (inspect.signature(f).parameters for f in (lora_linear, lora_add))
    keyword = [
        [(p.name, p.default) for p in s.values() if p.kind is p.KEYWORD_ONLY] for s in (one, two)
    ]
    assert keyword[0] == keyword[1]
    assert list(one)[:6] == ["x", "weight", "bias", "A", "B", "scaling"]
    assert list(two)[:5] == ["y0", "x", "A", "B", "scaling"]


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_cannot_serve_says_why(name: str) -> None:
    t = draw(AWKWARD["rank 4"])
    reason = dispatch.get(name).available() or dispatch.get(name).supports(
        dispatch.Problem("cpu", torch.float32, 37, 31, 17, 4, 0.0)
    )
    assert reason, "on the CPU there is a reason"
    with pytest.raises(RuntimeError) as raised:
        lora_linear(t["x"], t["weight"], None, t["A"], t["B"], S, backend=name)
    assert name in str(raised.value) and reason in str(raised.value)


def test_an_unknown_backend_lists_the_known() -> None:
    t = draw(AWKWARD["rank 4"])
    with pytest.raises(ValueError, match=r"no_such.*reference.*eager.*triton.*cuda"):
        lora_linear(t["x"], t["weight"], None, t["A"], t["B"], S, backend="no_such")


@each_dtype
def test_an_unnamed_backend_is_one_of_the_named(dtype: torch.dtype) -> None:
    t = draw(AWKWARD["rank 8"], dtype)
    problem = dispatch.Problem("cpu", dtype, 37, 100, 65, 8, 0.0)
    named = through_op(t, dispatch.choose(problem), 0.0)
    for one, two in zip(through_op(t, None, 0.0), named, strict=True):
        assert torch.equal(one, two)


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def valid() -> dict[str, Any]:
    return {
        "x": ones(5, 8),
        "weight": ones(6, 8),
        "bias": ones(6),
        "A": ones(3, 8),
        "B": ones(6, 3),
        "scaling": 1.0,
    }


FAR_SEED = torch.zeros((), dtype=torch.int64, device="meta")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "x of another K": ({"x": ones(5, 9)}, r"x .*\(5, 9\).*A .*\(3, 8\)"),
    "x without axes": ({"x": ones()}, r"x .*\(\)"),
    "weight transposed": ({"weight": ones(8, 6)}, r"weight.*\(8, 6\).*\(6, 8\)"),
    "weight 1-D": ({"weight": ones(8)}, r"weight.*\(8,\)"),
    "bias of another N": ({"bias": ones(7)}, r"bias.*\(7,\)"),
    "bias 2-D": ({"bias": ones(1, 6)}, r"bias.*\(1, 6\)"),
    "A of another K": ({"A": ones(3, 9)}, r"\(3, 9\)"),
    "A and B of other ranks": ({"B": ones(6, 4)}, r"A .*\(3, 8\).*B .*\(6, 4\)"),
    "B of another N": ({"B": ones(7, 3)}, r"weight.*\(6, 8\).*B \(7, 3\)"),
    "A 1-D": ({"A": ones(8)}, r"A .*\(8,\)"),
    "rank 0": ({"A": ones(0, 8), "B": ones(6, 0)}, r"A .*\(0, 8\)"),
    "x of integers": ({"x": ones(5, 8, dtype=torch.int64)}, "int64"),
    "x complex": ({"x": ones(5, 8, dtype=torch.complex64)}, "complex64"),
    "weight of another dtype": ({"weight": ones(6, 8, dtype=torch.bfloat16)}, "weight.*bfloat16"),
    "bias of another dtype": ({"bias": ones(6, dtype=torch.float64)}, "bias.*float64"),
    "A of integers": ({"A": ones(3, 8, dtype=torch.int32)}, "A .*int32"),
    "B complex": ({"B": ones(6, 3, dtype=torch.complex64)}, "B .*complex64"),
    "A elsewhere": ({"A": ones(3, 8, device="meta")}, "A .*meta"),
    "B elsewhere": ({"B": ones(6, 3, device="meta")}, "B .*meta"),
    "weight elsewhere": ({"weight": ones(6, 8, device="meta")}, "weight.*meta"),
    "bias elsewhere": ({"bias": ones(6, device="meta")}, "bias.*meta"),
    "dropout 1": ({"dropout": 1.0, "seed": SEED}, "dropout=1"),
    "dropout negative": ({"dropout": -0.1, "seed": SEED}, "dropout=-0.1"),
    "dropout NaN": ({"dropout": math.nan, "seed": SEED}, "dropout=nan"),
    "dropout without seed": ({"dropout": 0.5}, "seed"),
    "seed a vector": ({"dropout": 0.5, "seed": torch.tensor([1, 2])}, "seed"),
    "seed a float": ({"dropout": 0.5, "seed": torch.tensor(1.0)}, "seed"),
    "seed elsewhere": ({"dropout": 0.5, "seed": FAR_SEED}, "seed"),
    "weights of other rows": ({"token_weights": ones(4)}, r"token_weights.*\(4,\).*\(5,\)"),
    "weights with the last axis": ({"token_weights": ones(5, 1)}, r"token_weights.*\(5, 1\)"),
    "weights complex": ({"token_weights": ones(5, dtype=torch.complex64)}, "weights.*complex64"),
    "weights elsewhere": ({"token_weights": ones(5, device="meta")}, "token_weights.*meta"),
    "statistic of float32": ({"statistic": torch.zeros(())}, "statistic"),
    "statistic a vector": ({"statistic": ones(1, dtype=torch.float64)}, "statistic"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_what_is_wrong(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = valid() | {"return_sqnorm": True} | change
    with pytest.raises((ValueError, TypeError), match=message):
        lora_linear(**arguments)


@pytest.mark.parametrize(
    ("y0", "message"),
    [(ones(5, 7), r"y0.*\(5, 7\)"), (ones(6), "y0"), (ones(5, 6, dtype=torch.float64), "float64")],
    ids=["other N", "no rows", "other dtype"],
)
def test_lora_add_refuses_a_y0_that_does_not_fit(y0: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        lora_add(y0, ones(5, 8), ones(3, 8), ones(6, 3), 1.0)


def test_shapes_pass_through_a_meta_device() -> None:
    on_meta = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in valid().items()}
    y = lora_linear(**on_meta)
    assert (y.shape, y.device.type) == ((5, 6), "meta")


# The custom ops and torch.compile

OPTIONS = {
    "plain": {},
    "dropout, weights, norm": {"p": 0.25, "weights": True, "norm": True},
    "statistic": {"statistic": True, "norm": True},
    "y0": {"y0": True},
    "no token": {"m": 0, "norm": True},
    "strided": {"strided": True, "p": 0.25},
}


def op_arguments(dtype: torch.dtype, backend: str, **given: Any) -> tuple[Any, ...]:
    """As `ops._Call` lists them."""
    t = draw(Shape(given.get("m", 5), 8, 6, 3), dtype)
    if given.get("strided"):
        t["x"], t["weight"] = strided(t["x"], "transposed"), strided(t["weight"], "every other")
    x, A, B = leaves(t)
    y0 = t["dy"].requires_grad_() if given.get("y0") else None
    statistic = torch.zeros((), dtype=torch.float64, requires_grad=True)
    p = given.get("p", 0.0)
    return (
        *(x, None if given.get("y0") else t["weight"], None, y0, A, B),
        SEED if p else None,
        torch.ones(5) if given.get("weights") else None,
        statistic if given.get("statistic") else None,
        *(S, p, given.get("norm", False), backend),
    )


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("eager", torch.float32), ("eager", torch.bfloat16)],
    ids=short,
)
@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
def test_opcheck_of_the_forward(given: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(
        torch.ops.loradrop.lora_linear.default, op_arguments(dtype, backend, **given), **loose
    )


@pytest.mark.parametrize(
    ("needs", "backend"),
    [
        ([True, True, True], "reference"),
        ([True, True, True], "eager"),
        ([False, True, False], "eager"),
        ([False, False, True], "eager"),
    ],
    ids=str,
)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_opcheck_of_the_backward(p: float, needs: list[bool], backend: str) -> None:
    t = draw(Shape(5, 8, 6, 3), torch.bfloat16)
    h = torch.randn(5, 3).bfloat16()
    for weight in (t["weight"], None):
        torch.library.opcheck(
            torch.ops.loradrop.lora_linear_backward.default,
            (backend, t["dy"], t["x"], weight, t["A"], t["B"], h, S, p, SEED if p else None, needs),
        )


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@each_backend
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_compile_equals_eager(dtype: torch.dtype, p: float, backend: str) -> None:
    def step(x: Tensor, A: Tensor, B: Tensor, statistic: Tensor) -> tuple[Tensor, Tensor]:
        y, norm = lora_linear(
            x * 1.0, t["weight"], t["bias"], A, B, S, dropout=p, seed=SEED,
            token_weights=weights, return_sqnorm=True, statistic=statistic, backend=backend,
        )  # fmt: skip
        return y.tanh(), norm

    t = draw(AWKWARD["rank 8"], dtype)
    weights = (torch.arange(37) % 2).float()
    inputs = [*leaves(t), torch.zeros((), dtype=torch.float64, requires_grad=True)]
    outcomes = []
    for function in (step, compiled(step)):
        y, norm = function(*inputs)
        outcomes.append([y, norm, *torch.autograd.grad(y, inputs, t["dy"])])
    assert float(outcomes[0][-1]) == float(outcomes[0][1]) > 0
    for one, two in zip(*outcomes, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_compile_with_dynamic_shapes() -> None:
    def step(x: Tensor, A: Tensor, B: Tensor, statistic: Tensor) -> Tensor:
        return lora_linear(x, t["weight"], t["bias"], A, B, S, statistic=statistic)

    t = draw(AWKWARD["rank 8"])
    fast = compiled(step, dynamic=True)
    for m in (37, 5, 12, 30):
        x, A, B = leaves(draw(AWKWARD["rank 8"]._replace(m=m)))
        inputs = (x, A, B, torch.zeros((), dtype=torch.float64, requires_grad=True))
        with torch._dynamo.config.patch(error_on_recompile=m != 37):
            one, two = (torch.autograd.grad(f(*inputs).sum(), inputs) for f in (step, fast))
        for plain, quick in zip(one, two, strict=True):
            torch.testing.assert_close(plain, quick)


def test_compile_under_autocast() -> None:
    def step(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return lora_linear(x, t["weight"], t["bias"], A, B, S)

    t = draw(AWKWARD["rank 8"])
    inputs = leaves(t)
    outcomes = []
    for run in (step, compiled(step)):
        y = run(*inputs)
        assert y.dtype == torch.bfloat16
        outcomes.append([y, *torch.autograd.grad(y, inputs, t["dy"].bfloat16())])
    for one, two in zip(*outcomes, strict=True):
        assert torch.equal(one, two)


def test_compiled_code_uses_the_custom_op() -> None:
    graphs = []

    def spy(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    t = draw(AWKWARD["rank 8"])
    torch.compiler.reset()
    torch.compile(lora_linear, backend=spy, fullgraph=True)(
        *(t[n] for n in ("x", "weight", "bias", "A", "B")), S
    )
    assert "torch.ops.loradrop.lora_linear" in graphs[0]
    assert loradrop.ops.LoRAFunction.__name__ not in graphs[0]


# Properties over shapes, ranks, dtypes, strides and masks


def layouts(tensor: Tensor) -> st.SearchStrategy[Tensor]:
    return st.sampled_from(["plain", *LAYOUTS]).map(lambda how: strided(tensor, how))


@st.composite
def problems(draw_: Any) -> tuple[Tensors, float, Tensor | None, str]:
    size = st.integers(1, 40)
    shape = Shape(draw_(st.integers(0, 40)), draw_(size), draw_(size), draw_(st.integers(1, 20)))
    t = draw(shape, draw_(st.sampled_from(DTYPES)), draw_(st.integers(0, 2**31)))
    t = {n: v if v.ndim < 2 else draw_(layouts(v)) for n, v in t.items()}
    p = philox.quantize(draw_(st.sampled_from([0.0, 0.1, 0.5, 0.9])))
    mask = st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=shape.m, max_size=shape.m)
    weights = draw_(st.none() | mask.map(lambda values: torch.tensor(values)))
    return t, p, weights, draw_(st.sampled_from(BACKENDS))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_rounding_is_all_that_differs_from_the_equations(
    case: tuple[Tensors, float, Tensor | None, str],
) -> None:
    """Each result within a few roundings of the sum of absolute products that makes it."""
    t, p, weights, backend = case
    dtype = t["x"].dtype
    got = through_op(t, backend, p)
    e = {n: v.to(dtype).double() for n, v in t.items()}
    mask = kept(e, p)
    e["dropped"] = e["x"] if mask is None else torch.where(mask, e["x"], 0.0)

    def equations(e: Tensors, s: float) -> list[Tensor]:
        h, dh = e["dropped"] @ e["A"].T / (1 - p), s * e["dy"] @ e["B"]
        delta = dh @ e["A"] / (1 - p)
        return [
            e["x"] @ e["weight"].T + e["bias"] + s * h @ e["B"].T,
            e["dy"] @ e["weight"] + (delta if mask is None else delta * mask),
            dh.T @ e["dropped"] / (1 - p),
            s * e["dy"].T @ h,
        ]

    exact, largest = equations(e, S), equations({n: v.abs() for n, v in e.items()}, S)
    narrow, wide = torch.finfo(dtype).eps, torch.finfo(t["A"].dtype).eps
    roundings = 4 * narrow + 2 * wide * (sum(e["x"].shape) + 25)
    for value, want, size in zip(got, exact, largest, strict=False):
        assert value.shape == want.shape
        assert ((value.double() - want).abs() <= roundings * size + 1e-7 * narrow).all()

    _, norm = lora_linear(
        *(t[n] for n in ("x", "weight", "bias", "A", "B")), S, dropout=p, seed=SEED,
        token_weights=weights, return_sqnorm=True, backend=backend,
    )  # fmt: skip
    h, B = factors_in_use(t, backend, p)
    per_token = (S * h @ B.T).square().sum(1)
    want = float(per_token.sum() if weights is None else (weights.double() * per_token).sum())
    assert float(norm) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("scaling", [2.0, 0.25, 1.7, -0.5])
def test_a_bias_on_many_half_precision_rows(scaling: float) -> None:
    """Where the bias travels as a column of the thin product, y is no worse than PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).bfloat16() for s in ((640, 48), (40, 48)))
    bias = 3 * torch.randn(40, generator=generator).bfloat16()
    A, B = (torch.randn(s, generator=generator) for s in ((8, 48), (40, 8)))
    y = lora_linear(x, weight, bias, A, B, scaling, backend="eager")
    a, b = A.bfloat16(), B.bfloat16()
    h = (x.double() @ a.double().T).bfloat16()
    exact = x.double() @ weight.double().T + bias.double() + scaling * (h.double() @ b.double().T)
    base = torch.nn.functional.linear(x, weight, bias)
    torch_path = base + torch.nn.functional.linear(h, b) * scaling
    assert_within(y, torch_path, exact)
