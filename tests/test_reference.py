"""The specification against the definition: autograd in float64, sums that float32 must hold."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from loradrop.op import philox, reference
from loradrop.op.call import Call, Needs, Saved
from loradrop.op.linear import lora_add, lora_linear
from loradrop.testing import torch_delta

pytestmark = pytest.mark.numbers

S, P = 1.3, 0.3
SEED = torch.tensor(20240601)


def double(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(m: int = 6, k: int = 9, n: int = 7, r: int = 3) -> dict[str, Tensor]:
    return {
        "x": double(m, k),
        "weight": double(n, k, seed=1),
        "bias": double(n, seed=2),
        "A": double(r, k, seed=3),
        "B": double(n, r, seed=4),
    }


def options(p: float) -> tuple[float, Tensor | None]:
    q = philox.quantize(p)
    return q, SEED if q else None


def kept(x: Tensor, p: float) -> Tensor | None:
    return philox.keep_mask(SEED, *x.shape, p) if p else None


def call_of(t: dict[str, Tensor], q: float, **more: Any) -> Call:
    weight, bias = t["weight"], t["bias"]
    return Call(t["x"], weight, bias, None, t["A"], t["B"], S, q, SEED if q else None, **more)


def definition(t: dict[str, Tensor], q: float, y0: Tensor | None = None) -> Tensor:
    base = t["x"] @ t["weight"].T + t["bias"] if y0 is None else y0
    return base + torch_delta(t["x"], t["A"], t["B"], S, kept(t["x"], q), q)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("base", ["weight", "weight without bias", "y0"])
def test_forward(base: str, p: float) -> None:
    t, (q, seed) = problem(), options(p)
    y0 = double(6, 7, seed=5) if base == "y0" else None
    weight = None if base == "y0" else t["weight"]
    bias = t["bias"] if base == "weight" else None
    y, h, bits, norm = reference.forward(Call(t["x"], weight, bias, y0, t["A"], t["B"], S, q, seed))
    assert bits is None and norm is None
    if base == "weight without bias":
        t["bias"] = torch.zeros(7, dtype=torch.float64)
    torch.testing.assert_close(y, definition(t, q, y0), rtol=1e-13, atol=1e-13)
    mask = kept(t["x"], q)
    masked = t["x"] if mask is None else t["x"] * mask
    torch.testing.assert_close(h, masked @ t["A"].T / (1 - q), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("with_weight", [True, False], ids=["weight", "y0"])
def test_backward_equals_autograd(with_weight: bool, p: float, needs: Any) -> None:
    t, (q, seed) = problem(), options(p)
    y0, dy = double(6, 7, seed=5), double(6, 7, seed=6)
    leaves = [t[name].requires_grad_() for name in ("x", "A", "B")]
    y = definition(t, q, None if with_weight else y0)
    expected = torch.autograd.grad(y, leaves, dy)

    with torch.no_grad():
        weight = t["weight"] if with_weight else None
        y0 = None if with_weight else y0
        h = reference.forward(Call(t["x"], weight, None, y0, t["A"], t["B"], S, q, seed)).h
        saved = Saved(t["x"], weight, t["A"], t["B"], h, None, seed, S, q)
        grads = reference.backward(saved, dy, Needs(*needs))
    for need, grad, want in zip(needs, grads, expected, strict=True):
        assert (grad is not None) == need
        if grad is not None:
            torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [0.0, P])
def test_gradcheck(p: float) -> None:
    t, (q, seed) = problem(3, 5, 4, 2), options(p)
    leaves = [t[name].requires_grad_() for name in ("x", "A", "B")]

    def through_weight(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(
            x, t["weight"], t["bias"], A, B, S, dropout=q, seed=seed, backend="reference"
        )

    def through_y0(x: Tensor, A: Tensor, B: Tensor, y0: Tensor) -> Tensor:
        return lora_add(y0, x, A, B, S, dropout=q, seed=seed, backend="reference")

    assert torch.autograd.gradcheck(through_weight, leaves)
    y0 = double(3, 4, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(through_y0, [*leaves, y0])


def test_sqnorm_is_the_norm_of_the_delta() -> None:
    t = problem()
    call = call_of(t, 0.0, sqnorm=True)
    _, h, _, given = reference.forward(call)
    delta = torch_delta(t["x"], t["A"], t["B"], S)
    norm = reference.sqnorm(h, t["B"], S, None)
    assert given is not None and torch.equal(given, norm)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert float(norm) == pytest.approx(float(delta.square().sum()), rel=2**-24)
    weights = torch.tensor([0.0, 1.0, 0.5, 2.0, 0.0, 3.0])
    expected = float((weights * delta.square().sum(1)).sum())
    assert float(reference.sqnorm(h, t["B"], S, weights)) == pytest.approx(expected, rel=2**-24)
    given = reference.forward(call._replace(token_weights=weights)).sqnorm
    assert float(given) == pytest.approx(expected, rel=2**-24)


def test_sqnorm_leaves_out_whatever_a_padded_token_holds() -> None:
    h = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [float("inf"), 0.0]])
    B = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for weights in (torch.tensor([True, False, False]), torch.tensor([1, 0, 0])):
        assert float(reference.sqnorm(h, B, 2.0, weights)) == 4 * 5


def test_moment() -> None:
    """The definition, in float64 sums; rows of weight 0 are left out whatever they hold."""
    x = torch.tensor([[1.0, -2.0], [math.nan, 3.0], [0.5, math.inf]])
    assert reference.moment(x[:1], None).tolist() == [1.0, 4.0]
    weights = torch.tensor([0.5, 0.0, 0.0])
    assert reference.moment(x, weights).tolist() == [0.5, 2.0]
    assert reference.moment(x, weights > 0).tolist() == [1.0, 4.0]
    ones = torch.ones(2049, 1, dtype=torch.bfloat16)
    assert reference.moment(ones, None).tolist() == [2049.0]
    large = torch.full((2, 1), 60000.0, dtype=torch.float16)  # its square overflows float16
    assert reference.moment(large, None).tolist() == [7.2e9]
    assert reference.moment(x[:0], None).tolist() == [0.0, 0.0]
    assert reference.moment(x, weights).dtype == torch.float64


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(x_dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    t = problem()
    x, weight = t["x"].to(x_dtype), t["weight"].to(x_dtype)
    A, B = t["A"].to(adapter_dtype), t["B"].to(adapter_dtype)
    y, h, _, _ = reference.forward(Call(x, weight, None, None, A, B, S))
    assert (y.dtype, h.dtype) == (x_dtype, x_dtype)
    saved = Saved(x, weight, A, B, h, None, None, S, 0.0)
    grads = reference.backward(saved, y, Needs(True, True, True))
    assert [g.dtype for g in grads if g is not None] == [x_dtype, *[adapter_dtype] * 2]


def test_adapters_are_rounded_to_the_dtype_of_x() -> None:
    t = problem()
    half = {name: tensor.to(torch.bfloat16) for name, tensor in t.items()}
    wide = {name: half[name].float() if name in "AB" else half[name] for name in t}
    fine = {name: t[name].float() if name in "AB" else half[name] for name in t}
    assert not torch.equal(wide["A"], fine["A"])
    y = [reference.forward(call_of(d, 0.0)) for d in (half, wide, fine)]
    for got in y[1:]:
        assert torch.equal(got[0], y[0][0]) and torch.equal(got[1], y[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_held_in_float32(dtype: torch.dtype) -> None:
    """2049 ones: bfloat16 stops counting at 256, float16 at 2048."""
    m = 2049
    x, one = torch.ones(m, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    A = B = torch.ones(1, 1)
    h = reference.forward(Call(x, one, None, None, A, B, 1.0)).h
    saved = Saved(x, one, A, B, h, None, None, 1.0, 0.0)
    _, dA, dB = reference.backward(saved, x, Needs(False, True, True))
    assert dA is not None and dB is not None
    assert (float(dA), float(dB)) == (m, m)
    y, h, _, _ = reference.forward(Call(x.T, x.T, None, None, x.float().T, B, 1.0))
    assert torch.equal(h, torch.full((1, 1), m, dtype=dtype))
    assert torch.equal(y, torch.tensor([[m + float(h)]]).to(dtype))
