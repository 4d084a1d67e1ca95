"""Adapters in x's dtype: once a step, and never older than that."""

import dataclasses
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loradrop.op import dispatch, rounded
from loradrop.op.call import Call, Output, Saved
from loradrop.op.linear import lora_linear


def parts() -> tuple[Tensor, Tensor, nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    x = torch.randn(6, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(16, 32, dtype=torch.bfloat16)
    return x, weight, nn.Parameter(torch.randn(4, 32)), nn.Parameter(torch.randn(16, 4))


class Casts(TorchDispatchMode):
    """Counts how often an adapter is rounded."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        half = function is torch.ops.aten._to_copy.default
        half = half and (kwargs or {}).get("dtype") == torch.bfloat16
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


@pytest.mark.parametrize(("how", "count"), [("plain", 2), ("again", 2), ("reentrant", 4)])
def test_a_step_rounds_once(how: str, count: int) -> None:
    """With its backward pass, and the second forward pass of a checkpoint; but one that has run
    without a graph leaves nothing.
    """
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


def test_a_version_counts_while_a_graph_lives() -> None:
    x, weight, A, B = parts()
    y = lora_linear(x, weight, None, A, B, 2.0)
    with torch.no_grad():
        A.mul_(3.0)
    again = lora_linear(x, weight, None, A, B, 2.0)
    fresh = lora_linear(x, weight, None, nn.Parameter(A.detach().clone()), B, 2.0)
    assert torch.equal(again, fresh) and not torch.equal(again, y)


def test_nothing_is_kept_after_the_graph() -> None:
    x, weight, A, B = parts()
    y = lora_linear(x, weight, None, A, B, 2.0)
    assert len(rounded._HELD) == 1
    del y
    gc.collect()
    assert len(rounded._HELD) == 0


@pytest.mark.parametrize("s", [1.0, 2.0, 0.25, 1.5])
def test_a_scale_is_taken_over_where_that_is_exact(s: float) -> None:
    _, _, A, B = parts()
    near = rounded.of(A, B, torch.bfloat16)
    with torch.no_grad():
        b, left = near.scaled(s)
    assert left == (1.5 if s == 1.5 else 1.0)
    assert torch.equal(b.double() * left, B.bfloat16().double() * s)
    with torch.no_grad():
        assert near.scaled(s)[0] is b
    assert near.a.dtype == b.dtype == torch.bfloat16


def test_a_forward_pass_that_fails_leaves_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds the error holds its graph, and an optimiser may write through `.data`."""
    x, weight, A, B = parts()

    def fails(call: Call) -> Output:
        rounded.near(call.A, call.B, call.x.dtype).a  # noqa: B018 - made on the way
        raise RuntimeError("out of memory")

    monkeypatch.setitem(
        dispatch.BACKENDS, "eager", dataclasses.replace(dispatch.BACKENDS["eager"], forward=fails)
    )
    with pytest.raises(RuntimeError, match="out of memory") as held:
        lora_linear(x, weight, None, A, B, 2.0, backend="eager")
    monkeypatch.undo()
    A.data.zero_()
    y = lora_linear(x, weight, None, A, B, 2.0, backend="eager")
    torch.testing.assert_close(y, x @ weight.T)
    assert held.value.args


@pytest.mark.parametrize("name", ["thin", "triton", "cuda", "overlap"])
@pytest.mark.parametrize("rows", [6, 2048])
@pytest.mark.parametrize("r", [4, 64])
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_graph_keeps_copies_where_a_pass_reads_them(
    name: str, rows: int, r: int, base: bool, p: float
) -> None:
    """The forward pass, or the backward pass alone: dropout keeps copies from the former."""
    pytest.importorskip("triton")
    from loradrop.op import fused

    of, half = getattr(fused, name.upper()), torch.bfloat16
    x, weight = torch.zeros(rows, 128, dtype=half), torch.zeros(64, 128, dtype=half)
    A, B = torch.zeros(r, 128), torch.zeros(64, r)
    y0, h = torch.zeros(rows, 64, dtype=half), torch.zeros(rows, r, dtype=half)
    call = Call(x, weight if base else None, None, None if base else y0, A, B, 2.0, p)
    saved = Saved(x, call.weight, A, B, h, None, None, 2.0, p)
    forward = of._near(call, x, masked=p > 0.0)
    read = [near.a is not None or near.b is not None for near in (forward, of._near(saved, h))]
    assert dispatch.BACKENDS[name].copies(call) == any(read)
    assert not dispatch.BACKENDS["reference"].copies(call)
    assert dispatch.BACKENDS["eager"].copies(call)
