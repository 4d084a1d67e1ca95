"""Launches of Triton's kernels for less of the host's time.

Triton finds the binary of a call by looking at every argument and option, for tens of microseconds.
What can change it is a short list: the types of the tensors, whether each begins at whole 16 bytes,
and the numbers that it specialises. A `Kernel` keeps the binary by that list, and hands it to
Triton's launcher. `op/replay.py` keeps whole passes of launches, which it sees by `watch.py`; one
that is made again takes the tensors of its descriptors, and keeps their tensor maps, too.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from loradrop.kernels.descriptors import Maps, bare, described, fields_of
from loradrop.kernels.watch import Again, tell, watched

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
        again: Again
        if compiled is not None:
            again = partial(_run, compiled, device, grid, rest)
            again(*tensors)
        else:
            run = self.function[grid]
            options = {"num_warps": warps, "num_stages": stages, **constants}
            compiled = run(*tensors, *free, *numbers, **options)
            if not hasattr(compiled, "function"):  # the interpreter ran it
                again = lambda *others: run(*others, *free, *numbers, **options)  # noqa: E731
            elif plain:
                again = partial(_run, compiled, device, grid, rest)
                self._keep(key, compiled, constants)
        if watched():
            boxes = [None if _is_plain(tensor) else fields_of(tensor) for tensor in tensors]
            if plain and any(boxes):
                again = _of_bases(again, compiled, device, grid, rest, boxes)
            bases = (tensor if _is_plain(tensor) else tensor.base for tensor in tensors)
            tell(tuple(bases), again if plain else None)

    def _keep(self, key: tuple[Any, ...], compiled: Any, constants: dict[str, Any]) -> None:
        assert list(constants) == self.function.arg_names[-len(constants) :]
        if len(self._compiled) >= _MOST:
            self._compiled.clear()
        self._compiled[key] = compiled


def _is_plain(argument: Any) -> bool:
    return argument is None or isinstance(argument, Tensor)  # or a tensor descriptor


def _profiled() -> bool:
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _run(
    compiled: Any, device: int, grid: tuple[int, ...], rest: tuple[Any, ...], *tensors: Any
) -> None:
    """A binary, on the current stream; by Triton's own way where a profiler looks on."""
    if _profiled():
        compiled[grid](*tensors, *rest)
        return
    _launch(compiled.run, compiled, device, grid, (*tensors, *rest))


def _launch(
    launcher: Any, compiled: Any, device: int, grid: tuple[int, ...], arguments: Sequence[Any]
) -> None:
    stream = 0 if device < 0 else torch._C._cuda_getCurrentRawStream(device)
    launcher(
        *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
    )


def _of_bases(
    again: Again,
    compiled: Any,
    device: int,
    grid: tuple[int, ...],
    rest: tuple[Any, ...],
    boxes: Sequence[Mapping[str, Any] | None],
) -> Again:
    """`again`, of the tensors themselves where it takes descriptors, which have these fields."""

    def plainly(*tensors: Tensor) -> None:
        pairs = zip(tensors, boxes, strict=True)
        again(*[one if fields is None else described(one, fields) for one, fields in pairs])

    found = bare(compiled.run) if hasattr(compiled, "function") else None
    if found is None:
        return plainly
    launcher, apart = found[0], iter(found[1])
    maps = [None if fields is None else Maps(fields, next(apart)) for fields in boxes]

    def quickly(*tensors: Tensor) -> None:
        if _profiled():
            plainly(*tensors)
            return
        arguments: list[Any] = []
        for tensor, of in zip(tensors, maps, strict=True):
            if of is None:
                arguments.append(tensor)
            else:
                arguments += of(tensor)
        _launch(launcher, compiled, device, grid, (*arguments, *rest))

    return quickly


def kernel(**options: Any) -> Any:
    """`triton.jit` of a function, as a `Kernel`."""
    jit = triton.jit(**options)
    return lambda function: Kernel(jit(function))
