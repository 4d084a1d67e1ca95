"""Descriptors, and launches that keep their tensor maps: Triton's launcher is told what it would be
told anyway, by two versions of Triton.
"""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.nvidia import driver as nvidia
from triton.tools.tensor_descriptor import TensorDescriptor

from loradrop.kernels import descriptors
from loradrop.kernels.descriptors import bare, descriptor
from loradrop.kernels.launch import Kernel
from loradrop.kernels.watch import watch

ROOT = Path(__file__).resolve().parent.parent
OLDER = ROOT / ".venv" / "triton-3.6.0"  # made by `make test`
SIGNATURE = {0: "tensordesc<bf16[16, 32]>", 1: "*bf16", 2: "tensordesc<bf16[16, 32]>", 3: "i32"}
META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [16, 32], "fp4_padded": False}


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


class Binary:
    """A compiled kernel f(P, H, Y, M) with Triton's own launcher, whose last step only notes."""

    function, packed_metadata = 7, "packed"

    def __init__(self, metadata: list[Any] | None) -> None:
        self.told: list[list[Any]] = []
        self.run = launcher = object.__new__(nvidia.CudaLauncher)
        launcher.launch = nvidia.wrap_handle_tensordesc(self.last_step, SIGNATURE, metadata)
        launcher.num_ctas, launcher.arg_annotations, launcher.kernel_signature = 1, "seen", b"how"
        launcher.global_scratch_size = launcher.global_scratch_align = 0
        launcher.profile_scratch_size = launcher.profile_scratch_align = 0
        launcher.launch_cooperative_grid = launcher.launch_pdl = False

    def last_step(self, *args: Any) -> None:
        *first, last = args  # the arguments are a tuple of their own, or not
        whole = [*first, *last] if isinstance(last, list | tuple) else [*args]
        self.told.append([id(a) if isinstance(a, Tensor) else a for a in whole])


class Function:
    arg_names = ["P", "H", "Y", "M", "FLAG"]  # noqa: RUF012 - as Triton has it

    def __init__(self, binary: Binary) -> None:
        self.binary = binary

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.binary


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the driver is asked."""
    ours = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", ours)
    return ours.asked


def launched(kernel: Kernel, p: Tensor, h: Tensor, y: Tensor) -> None:
    kernel((3,), (descriptor(p, 16, 32), h, descriptor(y, 16, 32)), (5,), (), FLAG=True)


def watched(binary: Binary) -> Any:
    """The launch of this binary, as it is made again."""
    kernel, seen = Kernel(Function(binary)), []
    tensors = [matrix(), matrix(), matrix()]
    with watch(lambda *told: seen.append(told)):
        launched(kernel, *tensors)
    ((bases, again),) = seen
    assert all(base is one for base, one in zip(bases, tensors, strict=True))
    return again


def test_a_launch_that_is_made_again_tells_what_triton_tells(asked: list[Any]) -> None:
    binary = Binary([META, META])
    again, kernel = watched(binary), Kernel(Function(binary))
    p, h, y = matrix(), matrix(), matrix()
    for _ in range(2):
        launched(kernel, p, h, y)  # the second by Triton's launcher
    (expected,), asked_before = binary.told, len(asked)
    assert asked_before == 2 and ("map", *asked[0]) in expected and id(h) in expected
    for _ in range(3):
        again(p, h, y)
    assert binary.told == [expected] * 4
    assert asked[2:] == asked[:2], "the driver is asked once for each address"
    other = matrix()
    again(other, h, y)
    assert len(asked) == 5 and asked[4][0] == other.data_ptr()
    assert binary.told[-1] != expected


def test_a_launch_holds_no_tensor(asked: list[Any]) -> None:
    again, tensors = watched(Binary([META, META])), [matrix(), matrix(), matrix()]
    again(*tensors)
    held = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    gc.collect()
    assert not any(one() is not None for one in held)


def test_few_addresses_are_kept(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "_MOST", 2)
    again, h = watched(Binary([META, META])), matrix()
    matrices = [matrix() for _ in range(3)]
    for i in (0, 1, 2, 2, 0, 0):  # the third address clears what is kept of two
        again(matrices[i], h, matrices[i])
    assert len(asked) == 2 * 4


@pytest.mark.parametrize("unknown", ["metadata", "closure"])
def test_a_launcher_that_is_not_known_takes_descriptors(
    asked: list[Any], unknown: str, caplog: pytest.LogCaptureFixture
) -> None:
    descriptors._tell.cache_clear()
    binary = Binary(None if unknown == "metadata" else [META, META])
    if unknown == "closure":
        taking = binary.run.launch
        binary.run.launch = lambda *args: taking(*args)
    again, kernel = watched(binary), Kernel(Function(binary))
    p, h, y = matrix(), matrix(), matrix()
    for _ in range(2):
        launched(kernel, p, h, y)
    for _ in range(2):
        again(p, h, y)
    assert len(binary.told) == 3 and binary.told[1:] == binary.told[:1] * 2
    assert bare(binary.run) is None and bare(binary.told.append) is None
    said = [record for record in caplog.records if "tensor descriptors" in record.getMessage()]
    assert len(said) == 1 and triton.__version__ in said[0].getMessage()


def test_a_profiler_sees_a_launch_that_is_made_again(asked: list[Any]) -> None:
    from triton import knobs

    binary, seen = Binary([META, META]), []
    again = watched(binary)
    Binary.__getitem__ = lambda self, grid: lambda *args: seen.append((grid, args))
    knobs.runtime.launch_enter_hook.add(print)
    try:
        again(matrix(), matrix(), matrix())
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
        del Binary.__getitem__
    ((grid, args),) = seen
    assert grid == (3, 1, 1) and [type(a) for a in args[:3]] == [
        TensorDescriptor, Tensor, TensorDescriptor,
    ]  # fmt: skip
    assert not binary.told and not asked


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
    assert "7 passed, 1 skipped" in done.stdout
