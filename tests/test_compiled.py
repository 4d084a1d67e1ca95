"""The custom ops and torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import (
    DEVICE,
    EIGHTHS,
    HALF,
    INTERPRETED,
    KERNELS,
    SAME_BITS,
    SEED,
    SINKS,
    S,
    all_sinks,
    draw,
    each_backend,
    leaves,
    op,
    short,
    strided,
)
from torch import Tensor
from torch.testing import assert_close

from loradrop.kernels.tiles import row_bytes
from loradrop.op import dispatch
from loradrop.op.call import Backend, Call
from loradrop.op.function import LoRAFunction
from loradrop.op.linear import lora_add, lora_linear
from loradrop.testing import AWKWARD, Shape

pytestmark = pytest.mark.numbers

OPTIONS = {
    "plain": {},
    "dropout, weights, norm": {"p": 0.25, "weights": True, "norm": True},
    "sinks": {"sinks": True, "weights": True, "norm": True},
    "y0": {"y0": True},
    "no token": {"m": 0, "norm": True},
    "no token, dropout": {"m": 0, "p": 0.25},
    "strided": {"strided": True, "p": 0.25},
    "strided y0": {"y0": True, "turned": True},
}


def op_arguments(dtype: torch.dtype, backend: str, **given: Any) -> tuple[Any, ...]:
    """The fields of `Call`, the sinks, the backend's name, and that there is a backward pass."""
    t = draw(Shape(given.get("m", 5), 8, 6, 3), dtype)
    if given.get("strided"):
        t["x"], t["weight"] = strided(t["x"], "transposed"), strided(t["weight"], "every other")
    x, A, B = leaves(t)
    y0 = strided(t["dy"], "transposed" if given.get("turned") else "plain")
    y0 = y0.requires_grad_() if given.get("y0") else None
    p = given.get("p", 0.0)
    call = Call(
        *(x, None if given.get("y0") else t["weight"], None, y0, A, B, S, p),
        SEED if p else None,
        torch.ones(5, device=DEVICE) if given.get("weights") else None,
        given.get("norm", False),
        given.get("sinks", False),
    )
    return *call, *(all_sinks(8, 3) if given.get("sinks") else (None,) * 4), backend, True


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(name, torch.float16) for name in KERNELS]
    if INTERPRETED
    else [("reference", torch.float64), ("eager", torch.float32), ("eager", torch.bfloat16)],
    ids=short,
)
@pytest.mark.parametrize("given", OPTIONS.values(), ids=OPTIONS)
def test_opcheck_of_the_forward(given: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
    torch.library.opcheck(
        torch.ops.loradrop.lora_linear.default, op_arguments(dtype, backend, **given), **loose
    )


@pytest.mark.parametrize(
    ("needs", "backend"),
    [([True] * 4, name) for name in KERNELS]
    if INTERPRETED
    else [
        ([True] * 4, "reference"),
        ([True] * 4, "eager"),
        ([False, True, False, False], "eager"),
        ([False, False, True, False], "eager"),
        ([False, False, False, True], "eager"),
    ],
    ids=str,
)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_opcheck_of_the_backward(p: float, needs: list[bool], backend: str) -> None:
    t = draw(Shape(5, 8, 6, 3), HALF)
    h, seed = torch.randn(5, 3, device=DEVICE).to(HALF), SEED if p else None
    shape = (5, row_bytes(8)) if p else (0,)
    mask = torch.full(shape, 0b10110111, dtype=torch.uint8, device=DEVICE)
    for weight, token_weights in ((t["weight"], None), (None, torch.rand(5, device=DEVICE))):
        operands = (t["dy"], t["x"], weight, t["A"], t["B"], h, mask, seed)
        torch.library.opcheck(
            torch.ops.loradrop.lora_linear_backward.default,
            (*operands, S, p, token_weights, needs, backend),
        )


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def both_ways(
    step: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], dy: Tensor
) -> list[list[Tensor]]:
    """What a step gives, and the gradients of its first result: as it is, and compiled."""
    outcomes = []
    for function in (step, compiled(step)):
        y, *rest = function(*inputs)
        outcomes.append([y, *rest, *torch.autograd.grad(y, inputs, dy)])
    return outcomes


@each_backend
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (AWKWARD["rank 8"], torch.float32),
        (AWKWARD["rank 8"], HALF),
        (EIGHTHS["eighths, rank 8"], HALF),
    ],
    ids=short,
)
def test_compile_equals_eager(size: Shape, dtype: torch.dtype, p: float, backend: str) -> None:
    def step(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, A, B, *leaves = inputs
        y, norm = lora_linear(
            x * 1.0, t["weight"], t["bias"], A, B, S, dropout=p, seed=SEED, token_weights=weights,
            return_sqnorm=True, **dict(zip(SINKS, leaves, strict=True)), backend=backend,
        )  # fmt: skip
        return y.tanh(), norm

    t = draw(size, dtype)
    weights = (torch.arange(size.m, device=DEVICE) % 2).float()
    plain, quick = both_ways(step, [*leaves(t), *all_sinks(size.k, size.r)], t["dy"])
    _, norm, *_, of_sqnorm, of_moment, gram_in, core = plain
    assert float(of_sqnorm) == float(norm) > 0
    assert of_moment.all() and gram_in.all() and core.all()
    assert_close(quick, plain, rtol=1e-6, atol=1e-6)


def test_compile_with_dynamic_shapes() -> None:
    def step(x: Tensor, A: Tensor, B: Tensor, *leaves: Tensor) -> Tensor:
        sinks = dict(zip(SINKS, leaves, strict=True))
        return lora_linear(x, t["weight"], t["bias"], A, B, S, **sinks)

    t = draw(AWKWARD["rank 8"])
    fast = compiled(step, dynamic=True)
    for m in (37, 5, 12, 30):
        inputs = [*leaves(draw(AWKWARD["rank 8"]._replace(m=m))), *all_sinks(100, 8)]
        with torch._dynamo.config.patch(error_on_recompile=m != 37):
            one, two = (torch.autograd.grad(f(*inputs).sum(), inputs) for f in (step, fast))
        assert_close(two, one)


def test_compile_of_lora_add() -> None:
    def step(*inputs: Tensor) -> tuple[Tensor]:
        return (lora_add(*inputs, S),)

    t = draw(AWKWARD["rank 8"])
    inputs = [t["dy"].clone().requires_grad_(), *leaves(t)]
    assert_close(*both_ways(step, inputs, t["dy"]))


def test_compile_under_autocast() -> None:
    def step(x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16):
            return (lora_linear(x, t["weight"], t["bias"], A, B, S),)

    t = draw(AWKWARD["rank 8"])
    plain, quick = both_ways(step, leaves(t), t["dy"].bfloat16())
    assert plain[0].dtype == torch.bfloat16
    assert_close(quick, plain, **SAME_BITS)


def test_compiled_code_uses_the_custom_op() -> None:
    graphs = []

    def spy(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    t = draw(AWKWARD["rank 8"])
    torch.compiler.reset()
    torch.compile(op, backend=spy, fullgraph=True)(t)
    assert "torch.ops.loradrop.lora_linear" in graphs[0]
    assert LoRAFunction.__name__ not in graphs[0]


def test_the_dispatcher_hears_whether_there_is_a_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which backend is fastest depends on it, compiled or not."""
    asked = []

    def serving(call: Call, name: str | None, grad: bool = True) -> Backend:
        asked.append(grad)
        return dispatch.BACKENDS["eager"]

    monkeypatch.setattr(dispatch, "serving", serving)
    t = draw(AWKWARD["rank 8"])
    leaves(t)
    for run in (op, compiled(op)):
        run(t)
        torch.no_grad()(run)(t)
    assert asked == [True, False] * 2
