"""Launches of Triton's kernels for less of the host's time.

Triton finds the binary of a call by looking at every argument and option, for tens of microseconds.
What can change it is a short list: the types of the tensors, whether each begins at whole 16 bytes,
and the numbers that it specialises. A `Kernel` keeps the binary by that list, and hands it to
Triton's launcher. `op/replay.py` keeps whole passes of launches, which it sees by `watch.py`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from loradrop.kernels.watch import Again, tell

_MOST = 4096  # binaries kept, for layers of so many shapes
_NARROW = 2**31  # numbers from here on are 64 bits wide


class Kernel:
    """A kernel whose arguments are tensors, then numbers that Triton does not specialise (named in
    `do_not_specialize`, and all floats), then numbers that it does, then constants.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: tuple[Any, ...],
        free: tuple[float, ...],
        numbers: tuple[int, ...],
        warps: int = 4,
        stages: int = 3,
        **constants: Any,
    ) -> None:
        """Runs it on the current device; the constants come in the kernel's order."""
        types: list[Any] = []
        address, device = 0, -1
        for tensor in tensors:
            if tensor is None:
                types.append(None)
            elif isinstance(tensor, Tensor):
                types.append(tensor.dtype)
                address |= tensor.data_ptr()
                device = tensor.get_device()
            else:  # a tensor descriptor
                types.append((tensor.base.dtype, *tensor.block_shape))
                device = tensor.base.get_device()
        given = tuple(constants.values())
        key = (device, warps, stages, *types, *numbers, *given)
        plain = address % 16 == 0 and max(free) < _NARROW
        compiled = self._compiled.get(key) if plain else None
        grid = (*grid, 1, 1)[:3]
        again: Again
        if compiled is not None:
            again = partial(_run, compiled, device, grid, (*free, *numbers, *given))
            again(*tensors)
        else:
            run = self.function[grid]
            options = {"num_warps": warps, "num_stages": stages, **constants}
            compiled = run(*tensors, *free, *numbers, **options)
            if not hasattr(compiled, "function"):  # the interpreter ran it
                again = lambda *others: run(*others, *free, *numbers, **options)  # noqa: E731
            elif plain:
                again = partial(_run, compiled, device, grid, (*free, *numbers, *given))
                self._keep(key, compiled, constants)
        tell(tensors, again if plain else None)

    def _keep(self, key: tuple[Any, ...], compiled: Any, constants: dict[str, Any]) -> None:
        assert list(constants) == self.function.arg_names[-len(constants) :]
        if len(self._compiled) >= _MOST:
            self._compiled.clear()
        self._compiled[key] = compiled


def _run(
    compiled: Any, device: int, grid: tuple[int, ...], rest: tuple[Any, ...], *tensors: Any
) -> None:
    """A binary, on the current stream; by Triton's own way where a profiler looks on."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        compiled[grid](*tensors, *rest)
        return
    stream = 0 if device < 0 else torch._C._cuda_getCurrentRawStream(device)
    compiled.run(
        *grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *tensors, *rest,
    )  # fmt: skip


def kernel(**options: Any) -> Any:
    """`triton.jit` of a function, as a `Kernel`."""
    jit = triton.jit(**options)
    return lambda function: Kernel(jit(function))


_BLANK: dict[tuple[Any, ...], dict[str, Any]] = {}  # the fields of a descriptor but its tensor's


def descriptor(tensor: Tensor, rows: int, columns: int) -> Any:
    """Triton's descriptor for tiles of a matrix that is in `tiles.rows_aligned`, and not empty.

    Triton checks both again whenever it makes one; here, once for each type and tile.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    fields = _BLANK.get((tensor.dtype, rows, columns))
    if fields is None:
        made = TensorDescriptor.from_tensor(tensor, [rows, columns])
        _BLANK[tensor.dtype, rows, columns] = vars(made) | {"base": None}
        return made
    return described(tensor, fields | {"shape": tensor.shape, "strides": tensor.stride()})


def described(tensor: Tensor, fields: Mapping[str, Any]) -> Any:
    """A descriptor of a tensor, with these fields beside it."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    made = object.__new__(TensorDescriptor)
    vars(made).update(fields, base=tensor)
    return made
