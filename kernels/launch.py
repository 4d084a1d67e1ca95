"""Launches of Triton's kernels for less of the host's time.

Triton finds the binary of a call by looking at every argument and option, for tens of microseconds.
What can change it is a short list: the types of the tensors, whether each begins at whole 16 bytes,
and the numbers that it specialises. A `Kernel` keeps the binary by that list, and hands it to
Triton's launcher. `op/replay.py` keeps whole passes of launches, which it sees by `watch.py`, and
makes them as `again.py` does.
"""

from typing import Any

import triton
from torch import Tensor
from triton import knobs

from loradrop.kernels.again import again_of
from loradrop.kernels.descriptors import is_plain
from loradrop.kernels.stream import current_stream
from loradrop.kernels.watch import tell, watched

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
        grid, rest = (*grid, 1, 1)[:3], (*free, *numbers, *given)
        if compiled is not None:
            _run(compiled, device, grid, *tensors, *rest)
        else:
            options = {"num_warps": warps, "num_stages": stages, **constants}
            compiled = self.function[grid](*tensors, *free, *numbers, **options)
            plain &= hasattr(compiled, "function")  # else the interpreter ran it
            if plain:
                self._keep(key, compiled, constants)
        if watched():
            bases = (tensor if is_plain(tensor) else tensor.base for tensor in tensors)
            tell(tuple(bases), again_of(compiled, grid, tensors, rest) if plain else None)

    def _keep(self, key: tuple[Any, ...], compiled: Any, constants: dict[str, Any]) -> None:
        assert list(constants) == self.function.arg_names[-len(constants) :]
        if len(self._compiled) >= _MOST:
            self._compiled.clear()
        self._compiled[key] = compiled


def profiled() -> bool:
    """Whether a profiler looks on, which Triton's own way to launch tells."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _run(compiled: Any, device: int, grid: tuple[int, ...], *arguments: Any) -> None:
    """A binary, on the current stream."""
    if profiled():
        compiled[grid](*arguments)
        return
    binary = compiled.function, compiled.packed_metadata
    compiled.run(*grid, current_stream(device), *binary, None, None, None, *arguments)


def kernel(**options: Any) -> Any:
    """`triton.jit` of a function, as a `Kernel`."""
    jit = triton.jit(**options)
    return lambda function: Kernel(jit(function))
