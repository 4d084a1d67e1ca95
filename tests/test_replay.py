"""Passes that are played again: the same results as the pass itself, and nothing else is played."""

import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from binaries import Binary, whole
from op_cases import INTERPRETED, S, call_of, draw
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("triton")

from loradrop.kernels.descriptors import descriptor, is_plain
from loradrop.kernels.launch import Kernel
from loradrop.kernels.watch import tell, watch
from loradrop.op.call import Needs, Saved
from loradrop.op.replay import Pass, Passes
from loradrop.testing import error

# ---- Which passes are played, with kernels in NumPy --------------------------------------------


class Result(NamedTuple):
    y: Tensor | None
    z: Tensor | None


class Twice:
    """A kernel f(X, Y, factor, size, bytes, FLAG): Y = 2·factor·X, of floats of so many bytes."""

    arg_names = ["X", "Y", "factor", "size", "bytes", "FLAG"]  # noqa: RUF012 - as Triton has it

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Binary:
            twice_at(*arguments, True)
            return Binary(twice_at)

        return run


def twice_at(*told: Any) -> None:
    """The last step of its launch, which PyTorch does not see."""
    *tensors, factor, size, width, _ = whole(told)[-6:]
    kind = {4: ctypes.c_float, 8: ctypes.c_double}[width]
    addresses = [of if isinstance(of, int) else of.data_ptr() for of in tensors]
    x, y = (np.ctypeslib.as_array((kind * size).from_address(of)) for of in addresses)
    y[...] = 2 * factor * x


twice = Kernel(Twice())


def doubled(x: Tensor, factor: float = 1.0) -> Tensor:
    y = x.new_empty(x.shape)
    twice((1,), (x, y), (factor, x.numel()), (x.element_size(),), FLAG=True)
    return y


def plain(x: Tensor, w: Tensor | None) -> Result:
    """A result, one of something that it made itself and of a view, and None."""
    return Result(
        doubled(doubled(x.view(-1)), 3.0).view(x.shape), None if w is None else doubled(w)
    )


def runs(passes: Passes, run: Callable[..., Any], *given: Tensor | None) -> tuple[Any, int]:
    """What the passes return, and how often `run` was called for it: no more than once."""
    calls = []

    def once() -> Any:
        calls.append(1)
        return run(*given)

    return passes(given, (), once), len(calls)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_third_pass_is_played() -> None:
    passes = Passes()
    for i in range(4):
        x, w = numbers(16, seed=i), numbers(4, seed=9 + i)
        (y, z), calls = runs(passes, plain, x, w)
        assert calls == (1 if i < 2 else 0)
        torch.testing.assert_close(y, 12 * x)
        torch.testing.assert_close(z, 2 * w)
    (y, z), calls = runs(passes, plain, numbers(16), None)  # another pass
    assert calls == 1 and z is None


def test_a_pass_holds_no_tensor() -> None:
    """Neither what it was given nor what it made, and so no graph of theirs."""
    passes, held = Passes(), []
    for i in range(4):
        x, w = numbers(16, seed=i), numbers(4, seed=9 + i)
        (y, z), calls = runs(passes, plain, x, w)
        assert calls == (1 if i < 2 else 0)
        torch.testing.assert_close(y, 12 * x)
        held += map(weakref.ref, (x, w, y, z))
    del x, w, y, z
    gc.collect()
    assert not any(one() is not None for one in held)


def strange_operation(x: Tensor, w: Tensor) -> Result:
    return Result(doubled(x), doubled(w).mul_(2.0))


OUTSIDE = numbers(16, seed=77)


def strange_tensor(x: Tensor, w: Tensor) -> Result:
    return Result(doubled(x), doubled(OUTSIDE))


def returns_what_it_was_given(x: Tensor, w: Tensor) -> Result:
    return Result(doubled(x), w)


def returns_a_part(x: Tensor, w: Tensor) -> Result:
    return Result(doubled(x)[:4], doubled(w))


def returns_a_transpose(x: Tensor, w: Tensor) -> Result:
    return Result(doubled(x.view(4, 4)).T, doubled(w))


@pytest.mark.parametrize(
    "run",
    [
        strange_operation, strange_tensor, returns_what_it_was_given, returns_a_part,
        returns_a_transpose,
    ],
)  # fmt: skip
def test_what_does_more_than_launch_is_not_played(run: Callable[..., Result]) -> None:
    passes = Passes()
    for i in range(4):
        x, w = numbers(16, seed=i), numbers(16, seed=9 + i)
        result, calls = runs(passes, run, x, w)
        assert calls == 1
        torch.testing.assert_close(result, run(x, w))


def test_a_tensor_in_two_places_is_not_taken_for_both() -> None:
    """Watched with x as w, the pass could not tell them apart afterwards."""
    passes, x = Passes(), numbers(16)
    for _ in range(3):
        assert runs(passes, plain, x, x)[1] == 1


def test_other_layouts_numbers_and_odd_addresses_are_other_passes() -> None:
    passes, w = Passes(), numbers(4)
    for _ in range(3):
        found = runs(passes, plain, numbers(16), w)
    assert found[1] == 0
    odd = numbers(17)[1:]
    for x in (numbers(20), numbers(16).double(), numbers(32)[::2].contiguous().view(2, 8), odd):
        result, calls = runs(passes, plain, x, w)
        assert calls == 1
        torch.testing.assert_close(result.y, 12 * x)
    assert passes((numbers(16), w), ("other",), lambda: "ran") == "ran"


# ---- The passes of `triton`, in Triton's interpreter --------------------------------------------


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter as a device is to PyTorch: launches do nothing that it sees, and are made
    again of addresses.
    """
    launch = Kernel.__call__

    def out_of_sight(self: Kernel, grid: Any, tensors: Any, *numbers: Any, **options: Any) -> None:
        with _disable_current_modes(), watch(lambda *told: None):
            launch(self, grid, tensors, *numbers, **options)
        bases = tuple(of if is_plain(of) else of.base for of in tensors)

        def again(stream: int, addresses: Sequence[int]) -> None:
            others = [like(*pair) for pair in zip(tensors, addresses, strict=True)]
            out_of_sight(self, grid, tuple(others), *numbers, **options)

        tell(bases, again)

    monkeypatch.setattr(Kernel, "__call__", out_of_sight)
    yield


def like(argument: Any, address: int) -> Any:
    """A tensor or a descriptor as this one, at another address; None for None."""
    if argument is None:
        return None
    if not is_plain(argument):
        return descriptor(like(argument.base, address), *argument.block_shape)
    of: Tensor = argument
    steps = sum((n - 1) * step for n, step in zip(of.shape, of.stride(), strict=True))
    raw = (ctypes.c_uint8 * (of.element_size() * (1 + steps))).from_address(address)
    return torch.frombuffer(raw, dtype=of.dtype).as_strided(of.shape, of.stride())


@pytest.mark.interpreter
@pytest.mark.product
@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter has a process of its own")
@pytest.mark.parametrize("rows", [4, 96], ids=["few", "many"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("measured", ["", "norm", "gram"])
@pytest.mark.usefixtures("hidden")
def test_passes_of_triton(rows: int, bias: bool, p: float, measured: str) -> None:
    from loradrop.op import fused

    passes, plain = Passes(), fused.Fused(fused.by_triton, fused.small_m_triton)
    played = replace(plain, passes=passes)
    norm, gram = measured == "norm", measured == "gram"
    needs = Needs(True, True, True, moment=norm)
    for seed in range(4):
        t = draw((rows, 64, 48, 8), torch.float16, seed)
        weights = torch.arange(rows, dtype=torch.float32) if measured else None
        call = call_of(t, p)._replace(sqnorm=norm, gram=gram, token_weights=weights)
        call = call if bias else call._replace(bias=None)
        out, wanted = played.forward(call), plain.forward(call)
        torch.testing.assert_close(out, wanted, rtol=0.0, atol=0.0)
        saved = Saved(
            call.x, call.weight, call.A, call.B, out.h, out.mask, call.seed, S, p, weights,
            a=out.a, b=out.b,
        )  # fmt: skip
        grads = played.backward(saved, t["dy"], needs)
        exact = plain.backward(saved, t["dy"], needs)
        torch.testing.assert_close(grads, exact, rtol=0.0, atol=0.0)
        assert all(bool(one.any()) for one in grads[: 3 + norm])
        assert not gram or bool(out.gram.any())
    assert [type(known) for known in passes._known.values()] == [Pass, Pass]


# ---- Those of `cuda` and `overlap`, whose kernels are told addresses ----------------------------


def at(pointer: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """The float16 numbers there, (rows, columns) or (n,)."""
    size = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    raw = np.ctypeslib.as_array((ctypes.c_uint16 * size).from_address(pointer)).view(np.float16)
    return np.lib.stride_tricks.as_strided(raw, shape, [2 * step for step in strides])


def matrix(numbers: tuple[int, ...] | None) -> Any:
    """That of (address, rows, columns, strides): rows, or columns, at whole 16 bytes."""
    assert numbers is None or (1 in numbers[3:] and max(numbers[3:]) % 8 == numbers[0] % 16 == 0)
    return None if numbers is None else at(numbers[0], numbers[1:3], numbers[3:])


def wide(x: Any) -> Any:
    return x.astype(np.float32)


def gemm_ext(
    device: int, stream: int, out: Any, p: Any, q: Any, h: Any, l: Any, a: Any, bias: int,
    ready: int, dtype: str, scaling: float, h_scale: float, *_: Any,
) -> None:  # fmt: skip
    """The extension's, in NumPy."""
    y, p, q, h, l, a = map(matrix, (out, p, q, h, l, a))
    found = wide(p) @ wide(q)
    if bias:
        found += at(bias, (y.shape[1],), (1,))
    if a is not None:
        assert ready
        h[...] = h_scale * (wide(p) @ wide(a))
    y[...] = found if h is None else found + scaling * (wide(h) @ wide(l))


def decode(
    device: int, stream: int, x: Any, w: Any, a: Any, b: Any, y: int, h: int, bias: int,
    weights: int, planes: int, sqnorm: int, dtype: str, scaling: float, *_: Any,
) -> None:  # fmt: skip
    x, w, a, b = map(matrix, (x, w, a, b))
    low = at(h, (len(x), len(a)), (len(a), 1))
    low[...] = wide(x) @ wide(a).T
    found = wide(x) @ wide(w).T + scaling * (wide(low) @ wide(b).T)
    at(y, found.shape, (len(w), 1))[...] = found + (at(bias, (len(w),), (1,)) if bias else 0.0)


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    from loradrop.op import cuda

    kernels = SimpleNamespace(gemm_ext=gemm_ext, decode=decode)
    monkeypatch.setattr(cuda, "_extension", lambda: kernels)
    for name in ("_why_not", "why_not_placed"):
        monkeypatch.setattr(cuda, name, lambda *given: None)
    monkeypatch.setattr(cuda, "streams", lambda *sizes: 4)
    monkeypatch.setattr(cuda, "_plan", lambda *given: (16, 1, 4))


@pytest.mark.interpreter
@pytest.mark.product
@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter has a process of its own")
@pytest.mark.parametrize("backend", ["cuda", "overlap"])
@pytest.mark.parametrize("rows", [4, 96], ids=["few", "many"])
@pytest.mark.parametrize("s", [2.0, S], ids=["s in B", "s"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(("narrow", "r"), [(True, 8), (True, 5), (False, 5)])
@pytest.mark.usefixtures("hidden", "extension")
def test_passes_of_the_extension(
    backend: str, rows: int, s: float, p: float, narrow: bool, r: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Adapters of x's dtype, which need no copies unless their rows lie elsewhere than at whole 16
    bytes, and wider ones. An s of 2 goes into the copy of B, as where x is in bfloat16.
    """
    from loradrop.kernels import tiles
    from loradrop.op import fused, reference

    monkeypatch.setattr(tiles, "scale_mode", lambda s, _: "h" if s == 2.0 else "sum")
    passes, plain = Passes(), replace(getattr(fused, backend.upper()), passes=None)
    played = replace(plain, passes=passes)
    needs = Needs(True, True, True)
    for seed in range(4):
        t = draw((rows, 64, 48, r), torch.float16, seed)
        if narrow:
            t |= {"A": t["A"].half(), "B": t["B"].half()}
        call = call_of(t, p, s)
        out, wanted = played.forward(call), plain.forward(call)
        torch.testing.assert_close(out, wanted, rtol=0.0, atol=0.0)
        assert error(out.y, reference.forward(call).y) < 2e-3
        saved = Saved(
            call.x, call.weight, call.A, call.B, out.h, out.mask, call.seed, s, p,
            a=out.a, b=out.b,
        )  # fmt: skip
        grads = played.backward(saved, t["dy"], needs)
        torch.testing.assert_close(grads, plain.backward(saved, t["dy"], needs), rtol=0.0, atol=0.0)
        exact = reference.backward(saved, t["dy"], needs)
        for one, other in zip(grads[:3], exact[:3], strict=True):
            assert error(one, other) < 3e-3
    assert [type(known) for known in passes._known.values()] == [Pass, Pass]
