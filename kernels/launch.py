"""Launches of Triton's kernels for less of the host's time.

Triton finds the binary of a call by looking at every argument and option, for tens of microseconds.
What can change it is a short list: the types of the tensors, whether each begins at whole 16 bytes,
and the numbers that it specialises. A `Kernel` keeps the binary by that list, and launches it as
Triton's tutorials do.
"""

from typing import Any

import triton
from torch import Tensor

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
        given = tuple(constants.values())
        key = (device, warps, stages, *types, *numbers, *given)
        plain = address % 16 == 0 and max(free) < _NARROW
        compiled = self._compiled.get(key) if plain else None
        if compiled is not None:
            run = compiled[grid if len(grid) == 3 else (*grid, 1, 1)[:3]]
            run(*tensors, *free, *numbers, *given)
            return
        compiled = self.function[grid](
            *tensors, *free, *numbers, num_warps=warps, num_stages=stages, **constants
        )
        if plain and hasattr(compiled, "function"):  # not where the interpreter ran it
            assert list(constants) == self.function.arg_names[-len(constants) :]
            if len(self._compiled) >= _MOST:
                self._compiled.clear()
            self._compiled[key] = compiled


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
    made = object.__new__(TensorDescriptor)
    own = {"base": tensor, "shape": tensor.shape, "strides": tensor.stride()}
    vars(made).update(fields, **own)
    return made
