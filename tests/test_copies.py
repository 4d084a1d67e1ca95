"""Adapters in x's dtype: copied once a pass, and never older than that."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loradrop.op.call import Call, Needs, Saved
from loradrop.op.linear import lora_linear

HALF = torch.bfloat16


def parts() -> tuple[Tensor, Tensor, nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    x = torch.randn(6, 32, dtype=HALF, requires_grad=True)
    weight = torch.randn(16, 32, dtype=HALF)
    return x, weight, nn.Parameter(torch.randn(4, 32)), nn.Parameter(torch.randn(16, 4))


class Casts(TorchDispatchMode):
    """Counts how often an adapter is rounded."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        half = function is torch.ops.aten._to_copy.default
        half = half and (kwargs or {}).get("dtype") == HALF
        self.count += half and tuple(args[0].shape) in ((4, 32), (16, 4))
        return function(*args, **(kwargs or {}))


def step(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, how: str) -> tuple[Tensor, ...]:
    def layer(x: Tensor) -> Tensor:
        y: Tensor = lora_linear(x, weight, None, A, B, 2.0)
        return y

    y = layer(x) if how == "plain" else checkpoint(layer, x, use_reentrant=how == "reentrant")
    y.float().square().sum().backward()
    grads = tuple(t.grad for t in (x, A, B))
    for t in (x, A, B):
        t.grad = None
    return y.detach(), *grads  # type: ignore[return-value]


@pytest.mark.parametrize(("how", "count"), [("plain", 2), ("again", 4), ("reentrant", 4)])
def test_a_pass_rounds_once(how: str, count: int) -> None:
    """With its backward pass; the second forward pass of a checkpoint is one of its own."""
    t = parts()
    with Casts() as casts:
        found = step(*t, how)
    assert casts.count == count
    for one, other in zip(found, step(*t, "plain"), strict=True):
        assert torch.equal(one, other) and one.isfinite().all() and one.any()


@pytest.mark.parametrize("grad", [True, False])
def test_the_next_step_reads_what_was_written(grad: bool) -> None:
    """Also by an optimiser that tells nobody: through .data no version changes. And also where the
    graph of an old loss is still there.
    """
    x, weight, A, B = parts()
    with torch.set_grad_enabled(grad):
        first = lora_linear(x, weight, None, A, B, 2.0)
        version = A._version
        A.data.mul_(3.0)
        again = lora_linear(x, weight, None, A, B, 2.0).detach()
    assert A._version == version
    fresh = lora_linear(x, weight, None, nn.Parameter(A.detach().clone()), B, 2.0).detach()
    assert torch.equal(again, fresh) and not torch.equal(again, first)


def test_a_backward_pass_reads_what_its_forward_pass_read() -> None:
    """Whatever was written since, by somebody who tells nobody."""
    x, weight, A, B = parts()
    wanted = step(x, weight, A, B, "plain")
    y = lora_linear(x, weight, None, A, B, 2.0)
    A.data.mul_(3.0)
    B.data.mul_(3.0)
    y.float().square().sum().backward()
    for one, other in zip((x.grad, A.grad, B.grad), wanted[1:], strict=True):
        assert one is not None and torch.equal(one, other)


@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize("of_A", [True, False])
def test_a_graph_keeps_the_copies_that_its_backward_pass_reads(of_x: bool, of_A: bool) -> None:
    """dx reads A and B, dA reads B, and dB neither."""
    x, weight, A, B = parts()
    x.requires_grad_(of_x)
    A.requires_grad_(of_A)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = lora_linear(x, weight, None, A, B, 2.0)
    shapes = {tuple(tensor.shape) for tensor in kept if tensor.dtype == HALF}
    assert ((4, 32) in shapes) == of_x and ((16, 4) in shapes) == (of_x or of_A)
    y.float().sum().backward()
    assert B.grad is not None and (A.grad is not None) == of_A and (x.grad is not None) == of_x


# ---- Those of the kernels, by one launch --------------------------------------------------------


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, bool, float]]]:
    """Of each launch whether it copied A, and B, and by what it scaled B."""
    pytest.importorskip("triton")
    from loradrop.kernels import tiles
    from loradrop.op import cuda, fused

    seen: list[tuple[bool, bool, float]] = []

    def cast(A: Any, B: Any, scale: float, to: torch.dtype) -> tuple[Any, Any]:
        if A is not None or B is not None:
            seen.append((A is not None, B is not None, scale))
        a = None if A is None else tiles.new_rows(A, *A.shape, to).copy_(A)
        b = None if B is None else tiles.new_rows(B, *B.shape, to).copy_(scale * B)
        return a, b

    monkeypatch.setattr(fused, "cast", cast)
    monkeypatch.setattr(cuda, "streams", lambda *sizes: 4)
    yield seen


@pytest.mark.parametrize("name", ["thin", "triton", "cuda", "overlap"])
@pytest.mark.parametrize("rows", [6, 2048])
@pytest.mark.parametrize("r", [4, 64])
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["float32", "half"])
def test_a_step_copies_at_most_once(
    name: str, rows: int, r: int, base: bool, p: float, dtype: torch.dtype,
    casts: list[tuple[bool, bool, float]],
) -> None:  # fmt: skip
    """In the forward pass, whose copies the backward pass reads, or in that alone: dropout keeps
    copies from the former.
    """
    from loradrop.op import fused

    of = getattr(fused, name.upper())
    x, weight = torch.zeros(rows, 128, dtype=HALF), torch.zeros(64, 128, dtype=HALF)
    A, B = torch.zeros(r, 128, dtype=dtype), torch.zeros(64, r, dtype=dtype)
    y0, h = torch.zeros(rows, 64, dtype=HALF), torch.zeros(rows, r, dtype=HALF)
    call = Call(x, weight if base else None, None, None if base else y0, A, B, 2.0, p)
    near = of._near(call, x, p > 0.0)
    forward = len(casts)
    saved = Saved(x, call.weight, A, B, h, None, None, 2.0, p, a=near.a, b=near.b)
    again = of._near(saved, h)

    must, many = name in ("cuda", "overlap") and base, rows == 2048 and r == 64
    wide = dtype == torch.float32
    assert casts == ([(wide, True, 2.0)] if must else [(True, True, 2.0)] if many and wide else [])
    as_they_are = rows == 6 and r == 64 and p == 0.0 and not wide  # by the kernel for few rows
    assert forward == (len(casts) if (must and not as_they_are) or (many and p == 0.0) else 0)
    if casts:
        assert again.a is near.a or forward == 0
        assert (again.a is None) == (not wide) and again.b is not None and again.scale == 1.0
    else:
        assert again == (None, None, 2.0)


@pytest.mark.parametrize("s", [1.0, 2.0, 0.25, 1.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scale_is_taken_over_where_that_is_exact(
    s: float, dtype: torch.dtype, casts: list[tuple[bool, bool, float]]
) -> None:
    from loradrop.op import fused

    x, weight, A, B = (t.detach() for t in parts())
    call = Call(x.to(dtype), weight.to(dtype), None, None, A, B, s)
    near = fused.CUDA._near(call, call.x)
    exact = s == 0.0 or (dtype == torch.bfloat16 and s != 1.5)
    assert near.b is not None and near.b.dtype == dtype
    assert near.scale == (1.0 if exact else s) and casts == [(True, True, s if exact else 1.0)]


def test_gradients_that_nobody_wants_cost_no_copy(casts: list[tuple[bool, bool, float]]) -> None:
    """dB = s·dyᵀh reads no adapter."""
    from loradrop.op import fused

    seen: list[Any] = []
    x, weight, A, B = (t.detach() for t in parts())
    saved = Saved(x, weight, A, B, x[:, :4].contiguous(), None, None, 2.0, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "outer", lambda *given: seen.append(given) or _Outer(B))
        grads = fused.CUDA._backward(saved, weight.new_zeros(6, 16), Needs(False, False, True))
    assert casts == [] and len(seen) == 1 and grads.B is B


class _Outer:
    def __init__(self, out: Tensor) -> None:
        self.out = out
