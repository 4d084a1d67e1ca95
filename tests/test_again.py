"""Launches that are made again: Triton's last step is told what it would be told anyway, by two
versions of Triton.
"""

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from binaries import Binary, whole
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from loradrop.kernels import again as of_again
from loradrop.kernels.again import again_of
from loradrop.kernels.descriptors import descriptor
from loradrop.kernels.launch import Kernel
from loradrop.kernels.watch import watch

ROOT = Path(__file__).resolve().parent.parent
OLDER = ROOT / ".venv" / "triton-3.6.0"  # made by `make test`
BOX = "tensordesc<bf16[16, 32]>"
SIGNATURE = {0: BOX, 1: "*bf16", 2: BOX, 3: "i32", 4: "constexpr"}
META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [16, 32], "fp4_padded": False}
STREAM = 11


def matrix(rows: int = 64) -> Tensor:
    return torch.zeros(rows, 64, dtype=torch.bfloat16)


class Driver:
    """Triton's, on no device; `asked` for tensor maps."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        of = dict.fromkeys(("fill_tma_descriptor", "fill_tma_descriptor_tiled"), self.fill)
        self.utils = SimpleNamespace(**of)

    def fill(self, *about: Any) -> tuple[Any, ...]:
        self.asked.append(about)
        return ("map", *about)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the driver is asked."""
    ours = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", ours)
    return ours.asked


class Function:
    """A kernel f(P, H, Y, M, FLAG) of one binary."""

    arg_names = ["P", "H", "Y", "M", "FLAG"]  # noqa: RUF012 - as Triton has it

    def __init__(self, binary: Binary) -> None:
        self.binary = binary

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.binary


def binary(told: list[Any], metadata: Any = (META, META)) -> Binary:
    """That of f, whose last step notes the addresses of tensors."""

    def step(*args: Any) -> None:
        told.append([of.data_ptr() if hasattr(of, "data_ptr") else of for of in whole(args)])

    return Binary(step, SIGNATURE, metadata and list(metadata))


def launched(kernel: Kernel, p: Tensor, h: Tensor | None, y: Tensor) -> None:
    kernel((3,), (descriptor(p, 16, 32), h, descriptor(y, 16, 32)), (5,), (), FLAG=True)


def watched(of: Binary) -> Any:
    """The launch of this binary, as it is made again."""
    kernel, seen = Kernel(Function(of)), []
    tensors = [matrix(), matrix(), matrix()]
    with watch(lambda *told: seen.append(told)):
        launched(kernel, *tensors)
    ((bases, again),) = seen
    assert all(base is one for base, one in zip(bases, tensors, strict=True))
    return again


def addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("metadata", [(META, META), None], ids=["tensor maps", "plain"])
def test_a_launch_that_is_made_again_tells_what_triton_tells(
    asked: list[Any], metadata: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    monkeypatch.setattr(Tensor, "get_device", lambda self: 0)  # what Triton's own way is told
    told: list[Any] = []
    of = binary(told, metadata)
    again, kernel = watched(of), Kernel(Function(of))
    p, h, y = matrix(), matrix(), matrix()
    for _ in range(2):
        launched(kernel, p, h, y)  # the second by Triton's launcher
    (expected,) = told
    assert len(asked) == (2 if metadata else 0)
    assert expected[3] == STREAM and h.data_ptr() in expected and expected[-2:] == [5, True]
    for _ in range(3):
        again(STREAM, addresses(p, h, y))
    assert told == [expected] * 4
    assert asked[2:] == asked[:2], "the driver is asked once for each address"
    other = matrix()
    again(STREAM + 1, addresses(other, h, y))
    assert [*told[-1][:3], STREAM, *told[-1][4:]] != expected and told[-1][3] == STREAM + 1
    if metadata:
        assert len(asked) == 5 and asked[4][0] == other.data_ptr()
    else:
        assert other.data_ptr() in told[-1]


def test_a_launch_of_plain_tensors() -> None:
    told: list[Any] = []
    of = Binary(lambda *args: told.append(args))
    x = matrix()
    of.run(3, 2, 1, STREAM, 7, "packed", None, None, None, x, None, 5, True)
    again = again_of(of, (3, 2, 1), (x, None), (5, True))
    assert len(told) == 1, "to see what Triton tells, nothing is launched"
    other = matrix()
    again(STREAM, [other.data_ptr(), 0])
    one, two = map(whole, told)
    assert one[-4:] == [x, None, 5, True] and two[-4:] == [other.data_ptr(), 0, 5, True]
    assert one[:-4] == two[:-4] and type(told[0]) is type(told[1])


def test_a_launch_holds_no_tensor(asked: list[Any]) -> None:
    again, tensors = watched(binary([])), [matrix(), matrix(), matrix()]
    again(STREAM, addresses(*tensors))
    held = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    gc.collect()
    assert not any(one() is not None for one in held)


def test_few_addresses_are_kept(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_again, "_MOST", 2)
    again, h = watched(binary([])), matrix()
    matrices = [matrix() for _ in range(3)]
    for i in (0, 1, 2, 2, 0, 0):  # the third address clears what is kept of two
        again(STREAM, addresses(matrices[i], h, matrices[i]))
    assert len(asked) == 2 * 4


def no_step(of: Binary) -> None:
    del of.run.launch


def another_closure(of: Binary) -> None:
    taking = of.run.launch
    of.run.launch = lambda *args: taking(*args)


def scratch(of: Binary) -> None:
    of.run.global_scratch_size = 64


def other_arguments(of: Binary) -> None:
    class Launcher(type(of.run)):  # type: ignore[misc]
        def __call__(self, *args: Any) -> None:
            super().__call__(*args[:-1], [args[-1]])

    of.run.__class__ = Launcher


@pytest.mark.parametrize("change", [no_step, another_closure, scratch, other_arguments])
def test_a_launcher_that_is_not_known_is_left_to_triton(
    asked: list[Any], change: Callable[[Binary], None], caplog: pytest.LogCaptureFixture
) -> None:
    of_again._tell.cache_clear()
    of = binary([])
    change(of)
    assert watched(of) is None and watched(of) is None
    said = [record for record in caplog.records if "its binaries" in record.getMessage()]
    assert len(said) == 1 and triton.__version__ in said[0].getMessage()


def test_a_profiler_sees_every_launch(asked: list[Any]) -> None:
    told: list[Any] = []
    of, seen = binary(told), []
    kernel = Kernel(Function(of))
    tensors = [matrix(), matrix(), matrix()]
    launched(kernel, *tensors)
    Binary.__getitem__ = lambda self, grid: lambda *args: seen.append((grid, args))
    knobs.runtime.launch_enter_hook.add(print)
    try:
        launched(kernel, *tensors)
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
        del Binary.__getitem__
    ((grid, args),) = seen
    assert grid == (3, 1, 1) and [type(a) for a in args[:3]] == [
        TensorDescriptor, Tensor, TensorDescriptor,
    ]  # fmt: skip
    assert not told and not asked


def test_a_descriptor_is_tritons() -> None:
    for rows in (64, 32):
        one = matrix(rows)
        assert repr(descriptor(one, 16, 32)) == repr(TensorDescriptor.from_tensor(one, [16, 32]))


@pytest.mark.skipif(not OLDER.exists(), reason="`make test` puts Triton 3.6.0 beside the other")
@pytest.mark.skipif(triton.__version__ == "3.6.0", reason="this is the other")
def test_the_same_by_the_older_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (OLDER, ROOT)))},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "11 passed, 1 skipped" in done.stdout
