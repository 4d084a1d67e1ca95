"""A frozen A has no gradient, and where nothing else reads x the backward pass does not keep it."""

from typing import Any

import pytest
import torch
from op_cases import (
    HALF,
    LAYOUTS,
    SAME_BITS,
    SINKS,
    S,
    Tensors,
    all_sinks,
    draw,
    each_backend,
    kept,
    near,
    op,
    plain_backend,
    short,
    strided,
)
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from loradrop.testing import AWKWARD, Shape, torch_delta

pytestmark = pytest.mark.numbers

EACH_P = pytest.mark.parametrize("p", [0.0, 0.25])
FROZEN = {"A": ("x", "B"), "A and x": ("B",), "A and B": ("x",)}


def trained(t: Tensors, names: tuple[str, ...]) -> list[Tensor]:
    return [t[name].requires_grad_() for name in names]


def keeps_x(y: Tensor, x: Tensor) -> bool:
    """Whether the node that made y has the storage of x."""
    storages = [s.untyped_storage().data_ptr() for s in y.grad_fn.saved_tensors if s is not None]
    assert storages
    return x.untyped_storage().data_ptr() in storages


@each_backend
@EACH_P
@pytest.mark.parametrize("base", ["weight", "y0"])
@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN)
def test_x_is_not_kept_and_gradients_are_the_same(
    names: tuple[str, ...], base: str, p: float, backend: str
) -> None:
    t = draw(AWKWARD["rank 8"])
    t |= {"y0": t["dy"] + 1.0} if base == "y0" else {}
    inputs = trained(t, names)
    y = op(t, backend, p)
    assert not keeps_x(y, t["x"])
    grads = torch.autograd.grad(y, inputs, t["dy"])
    t["A"].requires_grad_()
    whole = op(t, backend, p)
    assert keeps_x(whole, t["x"]) and torch.equal(whole, y)
    assert_close(grads, torch.autograd.grad(whole, inputs, t["dy"]), **SAME_BITS)
    assert all(grad.any() for grad in grads)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_and_half_precision(layout: str, backend: str) -> None:
    t = draw(Shape(40, 64, 48, 8), HALF)
    t["x"], t["dy"] = strided(t["x"], layout), strided(t["dy"], layout)
    inputs, found = trained(t, ("x", "B")), []
    for trains in (False, True):
        t["A"].requires_grad_(trains)
        found.append(torch.autograd.grad(op(t, backend, 0.25), inputs, t["dy"]))
    assert_close(*found, **SAME_BITS)


@each_backend
@pytest.mark.parametrize("sinks", [("sqnorm_sink", "gram_in_sink", "core_sink"), ("moment_sink",)])
def test_statistics(sinks: tuple[str, ...], backend: str) -> None:
    """Those of h need no x; the second moment of x does."""
    t, found = draw(AWKWARD["rank 8"]), []
    for trains in (False, True):
        t["A"].requires_grad_(trains)
        every = dict(zip(SINKS, all_sinks(100, 8), strict=True))
        leaves = {name: every[name] for name in sinks}
        inputs = [*trained(t, ("x", "B")), *leaves.values()]
        y = op(t, backend, **leaves)
        assert keeps_x(y, t["x"]) == (trains or sinks == ("moment_sink",))
        found.append(torch.autograd.grad(y, inputs, t["dy"]))
    if sinks == ("moment_sink",):  # a kernel makes it beside the gradient of A, and sums otherwise
        assert_close(found[0][2], found[1][2], rtol=1e-6, atol=0.0)
        assert found[0][2].all()
        found = [gradients[:2] for gradients in found]
    assert_close(*found, **SAME_BITS)
    assert all(value.any() for value in found[0])


@each_backend
@EACH_P
@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN)
def test_compiled(names: tuple[str, ...], p: float, backend: str) -> None:
    def step(*inputs: Tensor) -> Tensor:
        return op(t | dict(zip(names, inputs, strict=True)), backend, p)

    t = draw(AWKWARD["rank 8"])
    inputs = trained(t, names)
    plain = step(*inputs)
    torch.compiler.reset()
    quick = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert not keeps_x(quick, t["x"])
    grads = [torch.autograd.grad(y, inputs, t["dy"]) for y in (quick, plain)]
    assert_close(*grads, rtol=1e-6, atol=1e-6)


@each_backend
def test_activations_made_again(backend: str) -> None:
    t = draw(AWKWARD["rank 8"])
    inputs = trained(t, ("x", "B"))
    grads = torch.autograd.grad(op(t, backend, 0.25), inputs, t["dy"])
    for reentrant in (False, True):
        y = checkpoint(lambda x: op(t | {"x": x}, backend, 0.25), t["x"], use_reentrant=reentrant)
        t["x"].grad = t["B"].grad = None
        y.backward(t["dy"])
        assert_close([t["x"].grad, t["B"].grad], list(grads), **SAME_BITS)


@each_backend
@EACH_P
@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN)
def test_gradients_of_gradients(names: tuple[str, ...], p: float, backend: str) -> None:
    """dB depends on x through h, whose graph is kept where x itself is not."""
    t, found = draw(AWKWARD["rank 8"]), []
    inputs: Any = [*trained(t, names), t["dy"].requires_grad_()]
    for run in ("op", "torch"):
        y = op(t, backend, p)
        if run == "torch":
            y = F.linear(t["x"], t["weight"], t["bias"])
            y = y + torch_delta(t["x"], t["A"], t["B"], S, kept(t, p), p)
        firsts = torch.autograd.grad(y, inputs[:-1], t["dy"], create_graph=True)
        total = sum(first.square().mean() for first in firsts)
        found.append(torch.autograd.grad(total, inputs, allow_unused=True))
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None) or not (want if got is None else got).any()
        if got is not None and want is not None:
            assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@plain_backend
@EACH_P
def test_third_gradients(p: float, backend: str) -> None:
    """By finite differences of the second ones."""
    t = draw(Shape(4, 5, 3, 2), torch.float64)
    names = ("x", "B")

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        y = op(t | dict(zip(names, inputs, strict=True)), backend, p)
        return torch.autograd.grad(y.square().sum(), inputs, create_graph=True)

    inputs = trained(t, names)
    assert torch.autograd.gradcheck(gradients, inputs)
    assert torch.autograd.gradgradcheck(gradients, inputs)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=short)
def test_no_token(dtype: torch.dtype, backend: str) -> None:
    t = draw(Shape(0, 16, 8, 3), dtype)
    inputs = trained(t, ("x", "B"))
    dx, dB = torch.autograd.grad(op(t, backend), inputs, t["dy"])
    assert dx.shape == (0, 16)
    assert_close(dB, torch.zeros_like(dB), **near(dtype))
