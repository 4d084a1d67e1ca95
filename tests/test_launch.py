"""Which binary of a kernel runs: `Kernel` against Triton's own rules, with a kernel that only
notes what it was asked for.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from loradrop.kernels.launch import Kernel, descriptor


class Compiled:
    """A binary."""

    function = 1

    def __init__(self, ran: list[Any]) -> None:
        self.ran = ran

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.ran.append((grid, args))


class Function:
    """A kernel f(X, Y, M, scale, K, BM, FLAG); compiles whenever it is asked."""

    arg_names = ["X", "Y", "M", "scale", "K", "BM", "FLAG"]  # noqa: RUF012 - as Triton has it

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.ran: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Compiled:
            self.compiled.append((grid, args, options))
            return Compiled(self.ran)

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
    assert function.compiled == [((3, 2), (X, None, 5, 0.5, 32), options)]
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


def test_constants_come_in_the_order_of_the_kernel() -> None:
    with pytest.raises(AssertionError):
        Kernel(Function())((1,), (X, None), (5, 0.5), (32,), FLAG=True, BM=16)


def test_a_descriptor_is_tritons() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    for rows in (64, 32):
        matrix = torch.zeros(rows, 64, dtype=torch.bfloat16)
        assert repr(descriptor(matrix, 16, 32)) == repr(
            TensorDescriptor.from_tensor(matrix, [16, 32])
        )
