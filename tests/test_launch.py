"""Which binary of a kernel runs: `Kernel` against Triton's own rules, with a kernel that only
notes what it was asked for.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from binaries import Binary, whole
from triton import knobs

from loradrop.kernels.launch import Kernel
from loradrop.kernels.watch import watch


class Compiled:
    """A binary, run by Triton's launcher or, under a profiler, as Triton does it."""

    function, packed_metadata = 1, "packed"

    def __init__(self, ran: list[Any], by_triton: list[Any]) -> None:
        self.ran, self.by_triton = ran, by_triton

    def run(self, *args: Any) -> None:
        grid, (stream, function, packed, *hooks), arguments = args[:3], args[3:9], args[9:]
        assert (stream, function, packed, *hooks) == (0, 1, "packed", None, None, None)
        self.ran.append((grid, arguments))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.by_triton.append((grid, args))


class Function:
    """A kernel f(X, Y, M, scale, K, BM, FLAG); compiles whenever it is asked."""

    arg_names = ["X", "Y", "M", "scale", "K", "BM", "FLAG"]  # noqa: RUF012 - as Triton has it

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.ran: list[Any] = []
        self.by_triton: list[Any] = []

    def compile(self) -> Any:
        return Compiled(self.ran, self.by_triton)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            self.compiled.append((grid, args, options))
            return self.compile()

        return run


X = torch.zeros(64, dtype=torch.bfloat16)
USUAL: dict[str, Any] = {
    **{"grid": (3, 2), "tensors": (X, None), "free": (5, 0.5), "numbers": (32,)},
    **{"warps": 4, "stages": 2, "BM": 16, "FLAG": True},
}


def test_a_binary_is_found_again_with_other_free_numbers() -> None:
    function = Function()
    kernel = Kernel(function)
    kernel(**USUAL)
    options = {"num_warps": 4, "num_stages": 2, "BM": 16, "FLAG": True}
    assert function.compiled == [((3, 2, 1), (X, None, 5, 0.5, 32), options)]
    other = torch.ones_like(X)
    kernel(**USUAL | {"free": (7, 1.5), "grid": (9,), "tensors": (other, None)})
    (grid, args), *_ = function.ran
    assert len(function.compiled) == 1 and grid == (9, 1, 1)
    assert args[0] is other and args[1:] == (None, 7, 1.5, 32, 16, True)


@pytest.mark.parametrize(
    "change",
    [
        {"numbers": (1,)}, {"numbers": (33,)}, {"BM": 32}, {"FLAG": False}, {"warps": 8},
        {"stages": 3}, {"tensors": (X.half(), None)}, {"tensors": (X, X)}, {"tensors": (None, X)},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_makes_another_binary_is_compiled(change: dict[str, Any]) -> None:
    function = Function()
    kernel = Kernel(function)
    for _ in range(2):
        kernel(**USUAL)
        kernel(**USUAL | change)
    assert len(function.compiled) == len(function.ran) == 2


@pytest.mark.parametrize("change", [{"tensors": (X[1:], None)}, {"free": (2**31, 0.5)}], ids=str)
def test_what_is_rare_is_left_to_triton(change: dict[str, Any]) -> None:
    """A tensor that does not begin at whole 16 bytes, a number of 64 bits."""
    function = Function()
    kernel = Kernel(function)
    for _ in range(2):
        kernel(**USUAL)
        kernel(**USUAL | change)
    assert len(function.compiled) == 3 and len(function.ran) == 1


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_sees_every_launch(hook: str) -> None:
    function = Function()
    kernel = Kernel(function)
    kernel(**USUAL)
    chain = getattr(knobs.runtime, hook)
    chain.add(print)
    try:
        kernel(**USUAL)
    finally:
        chain.remove(print)
    kernel(**USUAL)
    assert len(function.by_triton) == len(function.ran) == 1
    assert function.by_triton == function.ran


def test_who_watches_can_launch_again() -> None:
    told: list[Any] = []
    function, binary = Function(), Binary(lambda *args: told.append(whole(args)))
    function.compile = lambda: binary
    kernel, seen = Kernel(function), []
    for _ in range(2):  # compiled, and found again
        with watch(lambda *told: seen.append(told)):
            kernel(**USUAL)
    kernel(**USUAL)
    with watch(lambda *told: seen.append(told)):
        kernel(**USUAL | {"free": (2**31, 0.5)})
    assert [tensors for tensors, _ in seen] == [(X, None)] * 3
    for _, again in seen[:2]:
        again(11, [64, 0])
        assert told[-1][:4] == [3, 2, 1, 11] and told[-1][-7:] == [64, 0, 5, 0.5, 32, 16, True]
    assert seen[2][1] is None, "another call may need another binary"


def test_constants_come_in_the_order_of_the_kernel() -> None:
    with pytest.raises(AssertionError):
        Kernel(Function())((1,), (X, None), (5, 0.5), (32,), FLAG=True, BM=16)


def test_a_launch_of_descriptors_alone_is_of_their_device() -> None:
    kernel = Kernel(Function())
    for device in (0, 3):
        base = SimpleNamespace(dtype=X.dtype, get_device=lambda device=device: device)
        boxed = SimpleNamespace(base=base, block_shape=[16, 16])
        kernel(**USUAL | {"tensors": (boxed, None)})
    assert [key[0] for key in kernel._compiled] == [0, 3]
