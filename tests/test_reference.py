"""The specification against the definition: autograd in float64, sums that float32 must hold."""

import itertools
import math
from typing import Any

import pytest
import torch
from op_cases import DEVICE, S, Tensors, call_of, draw, kept
from torch import Tensor
from torch.testing import assert_close

from loradrop.op import philox, reference
from loradrop.op.call import Call, Needs, Saved
from loradrop.testing import Shape, torch_delta

pytestmark = pytest.mark.numbers

P = philox.quantize(0.3)
BASES: dict[str, dict[str, Any]] = {
    "weight": {"y0": None},
    "weight without bias": {"y0": None, "bias": None},
    "y0": {"weight": None, "bias": None},
}
each_base = pytest.mark.parametrize("absent", BASES.values(), ids=BASES)
each_p = pytest.mark.parametrize("p", [0.0, P])


def problem(absent: dict[str, None]) -> Tensors:
    """Inputs in float64, of which some are not there."""
    t = draw(Shape(6, 9, 7, 3), torch.float64)
    return t | {"y0": t["dy"].flip(0)} | absent


def definition(t: Tensors, p: float) -> Tensor:
    base = t["y0"] if t["weight"] is None else t["x"] @ t["weight"].T
    base = base if t["bias"] is None else base + t["bias"]
    return base + torch_delta(t["x"], t["A"], t["B"], S, kept(t, p), p)


@each_p
@each_base
def test_forward(absent: dict[str, None], p: float) -> None:
    t = problem(absent)
    y, h, bits, norm, *_ = reference.forward(call_of(t, p))
    assert bits is None and norm is None
    assert_close(y, definition(t, p), rtol=1e-13, atol=1e-13)
    mask = kept(t, p)
    masked = t["x"] if mask is None else t["x"] * mask
    assert_close(h, masked @ t["A"].T / (1 - p), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@each_p
@each_base
def test_backward_equals_autograd(absent: dict[str, None], p: float, needs: Any) -> None:
    t = problem(absent)
    inputs = [t[name].requires_grad_() for name in ("x", "A", "B")]
    expected = torch.autograd.grad(definition(t, p), inputs, t["dy"])
    wanted = [grad if need else None for need, grad in zip(needs, expected, strict=True)]
    with torch.no_grad():
        call = call_of(t, p)
        h = reference.forward(call).h
        saved = Saved(call.x, call.weight, call.A, call.B, h, None, call.seed, S, p)
        grads = reference.backward(saved, t["dy"], Needs(*needs))
    assert_close(grads[:3], tuple(wanted), rtol=1e-12, atol=1e-12)


def test_sqnorm_is_the_norm_of_the_delta() -> None:
    t = problem({"y0": None})
    call = call_of(t, sqnorm=True)
    _, h, _, given, *_ = reference.forward(call)
    delta = torch_delta(t["x"], t["A"], t["B"], S)
    norm = reference.sqnorm(h, t["B"], S, None)
    assert given is not None and torch.equal(given, norm)
    assert (norm.dtype, norm.shape) == (torch.float64, ())
    assert float(norm) == pytest.approx(float(delta.square().sum()), rel=1e-14)
    weights = torch.tensor([0.0, 1.0, 0.5, 2.0, 0.0, 3.0], device=DEVICE)
    expected = float((weights * delta.square().sum(1)).sum())
    assert float(reference.sqnorm(h, t["B"], S, weights)) == pytest.approx(expected, rel=1e-14)
    given = reference.forward(call._replace(token_weights=weights)).sqnorm
    assert float(given) == pytest.approx(expected, rel=1e-14)


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
    t = draw(Shape(6, 9, 7, 3), x_dtype)
    x, weight, A, B = t["x"], t["weight"], t["A"].to(adapter_dtype), t["B"].to(adapter_dtype)
    y, h, *_ = reference.forward(Call(x, weight, None, None, A, B, S))
    assert (y.dtype, h.dtype) == (x_dtype, x_dtype)
    saved = Saved(x, weight, A, B, h, None, None, S, 0.0)
    grads = reference.backward(saved, y, Needs(True, True, True))
    assert [g.dtype for g in grads if g is not None] == [x_dtype, *[adapter_dtype] * 2]


def test_adapters_are_rounded_to_the_dtype_of_x() -> None:
    t = problem({"y0": None})
    half = {name: tensor.to(torch.bfloat16) for name, tensor in t.items() if name != "y0"}
    wide = {name: half[name].float() if name in "AB" else half[name] for name in half}
    fine = {name: t[name].float() if name in "AB" else half[name] for name in half}
    assert not torch.equal(wide["A"], fine["A"])
    want, *found = (reference.forward(call_of(d)) for d in (half, wide, fine))
    for y, h, *_ in found:
        assert torch.equal(y, want.y) and torch.equal(h, want.h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_k_and_r_are_held_in_float32(dtype: torch.dtype) -> None:
    """2049 ones: bfloat16 stops counting at 256, float16 at 2048."""
    x, B = torch.ones(1, 2049, dtype=dtype), torch.ones(1, 1)
    y, h, *_ = reference.forward(Call(x, x, None, None, x.float(), B, 1.0))
    assert torch.equal(h, torch.full((1, 1), 2049, dtype=dtype))
    assert torch.equal(y, torch.tensor([[2049 + float(h)]]).to(dtype))
