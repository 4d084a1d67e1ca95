"""The op: every backend against float64 within PyTorch's own error, for every option."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    DEVICE,
    DTYPES,
    EIGHTHS,
    HALF,
    HALVES,
    INTERPRETED,
    KERNELS,
    LAYOUTS,
    LEAVES,
    PLAIN,
    S,
    Tensors,
    assert_each_within,
    draw,
    each_backend,
    each_dtype,
    each_size,
    factors_in_use,
    kept,
    leaves,
    near,
    op,
    plain_backend,
    short,
    strided,
    through_op,
    through_torch,
    widest,
)
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.testing import assert_close

from loradrop.op import philox
from loradrop.op.linear import lora_linear
from loradrop.testing import AWKWARD, Shape, assert_within, torch_delta

pytestmark = pytest.mark.numbers

# Values and gradients


@pytest.mark.product
@pytest.mark.parametrize("p", [0.0, 0.25])
@each_dtype
@pytest.mark.parametrize("name", AWKWARD)
@each_backend
def test_error_is_within_that_of_pytorch(
    backend: str, name: str, dtype: torch.dtype, p: float
) -> None:
    m, k, n, r = AWKWARD[name]
    draws = 32 if m * r < 100 else 1 if k > 1000 else 5  # enough roundings to compare
    if INTERPRETED:  # slow
        draws = min(draws, 8 if m == 1 else 2)
    drawn = [draw(AWKWARD[name], dtype, seed) for seed in range(draws)]
    ours = [through_op(t, backend, p) for t in drawn]
    pytorchs, exact = ([through_torch(t, d, p) for t in drawn] for d in (dtype, torch.float64))
    wide = drawn[0]["A"].dtype
    assert [v.dtype for v in ours[0]] == [dtype, dtype, wide, wide, torch.float64]
    assert_each_within(ours, pytorchs, exact, (k + r, n + r, m + n, m + k))


@pytest.mark.product
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", HALVES, ids=short)
@pytest.mark.parametrize("name", EIGHTHS)
@each_backend
def test_sizes_in_eighths(
    backend: str, name: str, dtype: torch.dtype, p: float, bias: bool
) -> None:
    """y, the gradients and the norm, where every backend can serve."""
    m, k, n, r = EIGHTHS[name]
    drawn = [draw(EIGHTHS[name], dtype, seed) for seed in range(2 if INTERPRETED else 8)]
    for t in drawn if not bias else ():
        del t["bias"]
    ours = [through_op(t, backend, p) for t in drawn]
    pytorchs, exact = ([through_torch(t, d, p) for t in drawn] for d in (dtype, torch.float64))
    assert_each_within(ours, pytorchs, exact, (k + r, n + r, m + n, m + k))
    for t, run in zip(drawn, ours, strict=True):
        h, B = factors_in_use(t, backend, p)
        assert float(run[4]) == pytest.approx(float((S * h @ B.T).square().sum()), rel=1e-5)


@pytest.mark.parametrize("wrong", ["zeros", "nan", "sign", "scale", "shape"])
def test_the_bound_is_a_bound(wrong: str) -> None:
    t = draw(AWKWARD["rank 8"], torch.bfloat16)
    dA = through_op(t, None, 0.0)[2]
    pytorchs, exact = (through_torch(t, d, 0.0)[2] for d in (torch.bfloat16, torch.float64))
    assert_within(dA, pytorchs, exact)
    bad = {
        "zeros": torch.zeros_like(dA),
        "nan": dA.clone().index_fill_(0, torch.tensor([0], device=DEVICE), math.nan),
        "sign": -dA,
        "scale": dA * 1.01,
        "shape": dA[:-1],
    }
    with pytest.raises(AssertionError):
        assert_within(bad[wrong], pytorchs, exact)


@pytest.mark.parametrize("terms", [16, 500])
def test_an_order_of_summation_is_within_the_bound(terms: int) -> None:
    """Where PyTorch is as good as its dtype, every order of the sum passes and no other error."""
    products = torch.randn(400, terms, generator=torch.Generator().manual_seed(0))
    exact, best = products.double().sum(1), products.double().sum(1).float()
    one_by_one = torch.zeros(400)
    for product in products.T:
        one_by_one += product
    assert_within(one_by_one, best, exact, terms)
    halves = products.bfloat16().float().double().sum(1).float()
    for wrong in (halves, products[:, 1:].sum(1), best * (1 + 2e-6), best.bfloat16().float()):
        with pytest.raises(AssertionError, match="relative error"):
            assert_within(wrong, best, exact, terms)
    with pytest.raises(AssertionError, match="relative error"):
        assert_within(one_by_one + best * 1e-6, best, exact)


@each_backend
@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_gradients_of_half_inputs_are_summed_in_float32(backend: str, dtype: torch.dtype) -> None:
    """2049 ones: bfloat16 stops counting at 256, float16 at 2048."""
    x, one = (torch.ones(n, 1, dtype=dtype, device=DEVICE) for n in (2049, 1))
    A, B = (torch.ones(1, 1, requires_grad=True, device=DEVICE) for _ in range(2))
    lora_linear(x, one, None, A, B, 1.0, backend=backend).sum().backward()
    assert (float(A.grad), float(B.grad)) == (2049.0, 2049.0)


@each_backend
def test_scaling_does_not_overflow_float16(backend: str) -> None:
    """s·h is 96 000 here, beyond float16; h and y are not."""
    x, A = torch.full((2, 4), 100.0), torch.full((1, 4), 7.5)
    B, weight = torch.full((3, 1), 2.0**-6), torch.zeros(3, 4)
    x, weight, A, B = (tensor.to(DEVICE) for tensor in (x.half(), weight.half(), A, B))
    y, norm = lora_linear(x, weight, None, A, B, 32.0, return_sqnorm=True, backend=backend)
    assert torch.equal(y.cpu(), torch.full((2, 3), 1500.0, dtype=torch.float16))
    assert float(norm) == 6 * 1500.0**2


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("more", [(), ("weight", "bias"), ("y0",)], ids=str)
@plain_backend
def test_gradcheck(backend: str, more: tuple[str, ...], p: float) -> None:
    t = draw(Shape(3, 5, 4, 2), torch.float64)
    t |= {"y0": t["dy"]} if "y0" in more else {}
    names = (*LEAVES, *more)

    def function(*inputs: Tensor) -> Tensor:
        return op(t | dict(zip(names, inputs, strict=True)), backend, p)

    assert torch.autograd.gradcheck(function, [t[name].requires_grad_() for name in names])


@pytest.mark.product
@each_backend
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("entry", ["lora_linear", "lora_add"])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_subset_of_gradients(
    entry: str, needs: tuple[bool, ...], p: float, backend: str
) -> None:
    t = draw(Shape(5, 8, 6, 2), torch.float32)
    t |= {"y0": t["dy"] + 1} if entry == "lora_add" else {}
    names = (*LEAVES, "y0" if "y0" in t else "weight")

    def run(wanted: tuple[bool, ...]) -> list[Tensor | None]:
        d = {name: tensor.clone() for name, tensor in t.items()}
        for name, need in zip(names, wanted, strict=True):
            d[name].requires_grad_(need)
        y = op(d, backend, p)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(t["dy"])
        return [d[name].grad for name in names]

    full = [grad if need else None for grad, need in zip(run((True,) * 4), needs, strict=True)]
    assert_close(run(needs), full, **near(torch.float32))


@each_backend
def test_weight_that_is_trained_gets_its_gradient(backend: str) -> None:
    t = draw(AWKWARD["rank 4"], widest(backend))
    inputs = [t[name].requires_grad_() for name in ("x", "weight", "bias", "A", "B")]
    y = lora_linear(*inputs, S, backend=backend)
    expected = F.linear(*inputs[:3]) + torch_delta(t["x"], t["A"], t["B"], S)
    assert_close(y, expected, **near(y.dtype))
    got, want = (torch.autograd.grad(out, inputs, t["dy"]) for out in (y, expected))
    assert_close(got, want, **near(y.dtype))


def test_bias_alone_can_be_trained() -> None:
    t = draw(AWKWARD["rank 4"])
    bias = t["bias"].requires_grad_()
    lora_linear(t["x"], t["weight"], bias, t["A"], t["B"], S).backward(t["dy"])
    assert_close(bias.grad, t["dy"].sum(0))


@each_backend
def test_lora_add_is_the_op_over_any_base(backend: str) -> None:
    t = draw(AWKWARD["rank 8"], widest(backend))
    x, A, B = leaves(t)
    y0 = torch.tanh(F.linear(x, t["weight"], t["bias"]))
    y, norm = op(t | {"y0": y0}, backend, return_sqnorm=True)
    delta = torch_delta(x, A, B, S)
    assert_close(y, y0 + delta, **near(y.dtype))
    assert float(norm) == pytest.approx(float(delta.detach().square().sum()), rel=1e-6)
    got = torch.autograd.grad(y, (x, A, B), t["dy"], retain_graph=True)
    assert_close(got, torch.autograd.grad(y0 + delta, (x, A, B), t["dy"]), **near(y.dtype))


# Layouts


@pytest.mark.product
@each_backend
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (AWKWARD["rank 4"], torch.float32),
        (AWKWARD["rank 4"], HALF),
        (EIGHTHS["eighths, rank 8"], HALF),
    ],
    ids=short,
)
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "weight", "A", "B", "dy"])
def test_strides(size: Shape, which: str, how: str, dtype: torch.dtype, backend: str) -> None:
    t = draw(size, dtype)
    for p in (0.0, 0.25):
        other = through_op(t | {which: strided(t[which], how)}, backend, p)
        assert_close(other, through_op(t, backend, p), **near(dtype))


@pytest.mark.product
@each_backend
@each_size
@pytest.mark.parametrize("rows", [4, 37])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=short)
def test_biases_with_gaps(dtype: torch.dtype, rows: int, size: Shape, backend: str) -> None:
    """Every other number of a longer one, and one number for all columns."""
    t = draw(Shape(rows, *size[1:]), dtype)
    n = len(t["bias"])
    for bias in (torch.stack((t["bias"], t["bias"] + 1.0), 1)[:, 0], t["bias"][:1].expand(n)):
        with_gaps = through_op(t | {"bias": bias}, backend, 0.0)
        assert_close(with_gaps, through_op(t | {"bias": bias.contiguous()}, backend, 0.0))


@pytest.mark.product
@each_backend
@pytest.mark.parametrize("rows", [4, 37])
def test_adapters_of_float64(rows: int, backend: str) -> None:
    """They are rounded to x's dtype as any other, and their gradients are float64."""
    t = draw(Shape(rows, 104, 72, 8), HALF)
    wide = t | {name: t[name].double() for name in "AB"}
    for p in (0.0, 0.25):
        found, want = through_op(wide, backend, p), through_op(t, backend, p)
        assert found[2].dtype == found[3].dtype == torch.float64
        assert_close([one.double() for one in found], [one.double() for one in want], **near(HALF))


@each_backend
def test_expanded_input(backend: str) -> None:
    t = draw(AWKWARD["rank 4"])
    t["x"] = t["x"][:1].expand(37, -1)
    copied = t | {"x": t["x"].contiguous()}
    assert_close(through_op(t, backend, 0.25), through_op(copied, backend, 0.25))


@pytest.mark.product
@each_backend
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("rows", [(), (1,), (6,), (2, 3), (1, 2, 3), (2, 0), (0,)], ids=str)
def test_leading_axes(rows: tuple[int, ...], p: float, backend: str) -> None:
    m = math.prod(rows)
    t = draw(Shape(m, 10, 7, 3))
    weights = torch.arange(m, dtype=torch.float32, device=DEVICE)
    y, dx, *rest, _ = through_op(t, backend, p)
    t["x"] = t["x"].view(*rows, 10)
    inputs = leaves(t)
    got, norm = op(t, backend, p, token_weights=weights.view(rows), return_sqnorm=True)
    grads = torch.autograd.grad(got, inputs, t["dy"].view(*rows, 7))
    assert_close([got, *grads], [y.view(*rows, 7), dx.view(*rows, 10), *rest])
    if m == 0:
        assert not any(grad.any() for grad in grads)
        assert float(norm) == 0.0


@each_backend
def test_permuted_batch(backend: str) -> None:
    t = draw(Shape(12, 10, 7, 3))
    x = t["x"].view(3, 4, 10).transpose(0, 1)
    copied = t | {"x": x.contiguous()}
    assert_close(op(t | {"x": x}, backend), op(copied, backend))


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
    weights = draw_(st.none() | mask.map(lambda values: torch.tensor(values, device=DEVICE)))
    return t, p, weights, draw_(st.sampled_from(KERNELS if INTERPRETED else PLAIN))


@pytest.mark.interpreter
@settings(max_examples=40 if INTERPRETED else 150, deadline=None, derandomize=True)
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

    _, norm = op(t, backend, p, token_weights=weights, return_sqnorm=True)
    h, B = factors_in_use(t, backend, p)
    per_token = (S * h @ B.T).square().sum(1)
    want = float(per_token.sum() if weights is None else (weights.double() * per_token).sum())
    assert float(norm) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("mean", [0.0, 10.0])
@pytest.mark.parametrize("scaling", [2.0, 0.25, 1.7, -0.5])
def test_a_bias_on_many_half_precision_rows(scaling: float, mean: float) -> None:
    """Added by oneDNN; y is no worse than PyTorch's, also where the bias takes away the mean."""
    x, weight, bias, A, B, _ = draw(Shape(640, 48, 40, 8), torch.bfloat16).values()
    x, bias = x + mean, bias - mean * weight.sum(1)
    y = lora_linear(x, weight, bias, A, B, scaling, backend="eager")
    a, b = A.bfloat16(), B.bfloat16()
    h = (x.double() @ a.double().T).bfloat16()
    exact = x.double() @ weight.double().T + bias.double() + scaling * (h.double() @ b.double().T)
    assert_within(y, F.linear(x, weight, bias) + F.linear(h, b) * scaling, exact)
