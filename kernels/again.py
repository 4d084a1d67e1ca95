"""A launch of a binary, made again for less of the host's time.

What Triton's launcher tells its last step, a function in C, is seen once. From then on that step is
told the same, but for the stream, and for the addresses in the place of the tensors. In the place
of a tensor descriptor it takes a tensor map, and the sizes and strides that go with it: for those
Triton asks the driver in each launch, and here they are kept by the tensor's address.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from inspect import getclosurevars
from typing import Any

import triton

from loradrop.kernels.descriptors import described, fields_of, is_plain
from loradrop.kernels.watch import Again

_log = logging.getLogger(__name__)
_MOST = 4096  # addresses whose tensor maps a launch keeps

Apart = Callable[[Any], Sequence[Any]]  # a descriptor -> its tensor map, sizes and strides


def again_of(
    compiled: Any, grid: tuple[int, ...], tensors: Sequence[Any], rest: Sequence[Any]
) -> Again | None:
    """The launch of a binary with the tensors and descriptors that it was made with, and with these
    numbers behind them. None, said once, where a Triton launches in a way that is not known here.
    """
    found = last_step(compiled.run)
    told = None if found is None else _told(compiled, found[0], grid, (*tensors, *rest))
    if found is None or told is None:
        _tell()
        return None
    step, apart = found[1], iter(found[2])
    boxes = [None if is_plain(tensor) else fields_of(tensor) for tensor in tensors]
    maps = [None if fields is None else Maps(fields, next(apart)) for fields in boxes]
    head, middle, whole = told
    mapped = any(maps)

    def again(stream: int, addresses: Sequence[int]) -> None:
        if mapped:
            given: list[Any] = []
            for address, of in zip(addresses, maps, strict=True):
                if of is None:
                    given.append(address)
                else:
                    given += of(address)
            given += rest
        else:
            given = [*addresses, *rest]
        if whole:
            step(*head, stream, *middle, given)
        else:
            step(*head, stream, *middle, *given)

    return again


class Maps:
    """What a launch takes for one of its descriptors, kept by the address of the tensor."""

    def __init__(self, fields: Mapping[str, Any], apart: Apart) -> None:
        self.fields, self.apart = fields, apart
        self._known: dict[int, Sequence[Any]] = {}

    def __call__(self, address: int) -> Sequence[Any]:
        """For a tensor of the layout that the fields say."""
        known = self._known.get(address)
        if known is None:
            if len(self._known) >= _MOST:
                self._known.clear()
            known = self._known[address] = self.apart(described(_At(address), self.fields))
        return known


class _At:
    """What stands for the tensor of a descriptor: all that is asked of it is where it begins."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def last_step(launcher: Any) -> tuple[Any, Any, Sequence[Apart]] | None:
    """Triton's launcher of a binary as a copy without what takes descriptors apart; its last step;
    and how that is done with each descriptor, in their order. None where it is not known.
    """
    step = getattr(launcher, "launch", None)
    scratch = [getattr(launcher, f"{of}_scratch_size", 1) for of in ("global", "profile")]
    if not callable(step) or any(scratch):
        return None
    apart: list[Apart] = []
    if hasattr(step, "__closure__"):  # in Python: it takes descriptors apart
        inside, takes = getclosurevars(step).nonlocals, step.__globals__.get("make_tensordesc_arg")
        metadata, step = inside.get("tensordesc_meta"), inside.get("launcher")
        if step is None or takes is None or not metadata:
            return None
        apart = [partial(takes, metadata=of) for of in metadata]
    return copy.copy(launcher), step, apart


def _told(
    compiled: Any, launcher: Any, grid: tuple[int, ...], arguments: Sequence[Any]
) -> tuple[Sequence[Any], Sequence[Any], bool] | None:
    """What the last step is told before the stream, what between that and the arguments, and
    whether these are one sequence; None where it is told something else.
    """
    seen: list[tuple[Any, ...]] = []
    launcher.launch = lambda *told: seen.append(told)
    stream, marks = object(), tuple(object() for _ in arguments)
    binary = compiled.function, compiled.packed_metadata
    launcher(*grid, stream, *binary, None, None, None, *marks)
    if len(seen) != 1 or seen[0].count(stream) != 1:
        return None
    (told,) = seen
    at = told.index(stream)
    if isinstance(told[-1], tuple) and told[-1] == marks:
        return told[:at], told[at + 1 : -1], True
    behind = len(told) - len(marks)
    return (told[:at], told[at + 1 : behind], False) if told[behind:] == marks else None


@cache
def _tell() -> None:
    _log.warning(
        "Triton %s launches its binaries in a way that is not known here, so launches are not made "
        "again by what they told the driver: some ten microseconds of the host's time each",
        triton.__version__,
    )
