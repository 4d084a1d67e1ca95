"""Triton's tensor descriptors for less of the host's time.

Triton checks a descriptor whenever one is made, and for each launch asks the driver for its tensor
map. Both depend on little: the type and the tile; the address, the sizes and the strides.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from inspect import getclosurevars
from typing import Any

import triton
from torch import Tensor

_log = logging.getLogger(__name__)
_MOST = 4096  # addresses whose tensor maps a launch keeps
_BLANK: dict[tuple[Any, ...], Mapping[str, Any]] = {}  # by type and tile

Apart = Callable[[Any], Sequence[Any]]  # a descriptor -> its tensor map, sizes and strides


def descriptor(tensor: Tensor, rows: int, columns: int) -> Any:
    """Triton's descriptor for tiles of a matrix that is in `tiles.rows_aligned`, and not empty."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    fields = _BLANK.get((tensor.dtype, rows, columns))
    if fields is None:
        made = TensorDescriptor.from_tensor(tensor, [rows, columns])
        _BLANK[tensor.dtype, rows, columns] = fields_of(made)
        return made
    return described(tensor, {**fields, "shape": tensor.shape, "strides": tensor.stride()})


def fields_of(made: Any) -> Mapping[str, Any]:
    """Those of a descriptor, without its tensor, which would live as long."""
    return {**vars(made), "base": None}


def described(tensor: Tensor, fields: Mapping[str, Any]) -> Any:
    """A descriptor of a tensor, with these fields beside it."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    made = object.__new__(TensorDescriptor)
    vars(made).update(fields, base=tensor)
    return made


class Maps:
    """What a launch takes for one of its descriptors, kept by the address of the tensor."""

    def __init__(self, fields: Mapping[str, Any], apart: Apart) -> None:
        self.fields, self.apart = fields, apart
        self._known: dict[int, Sequence[Any]] = {}

    def __call__(self, tensor: Tensor) -> Sequence[Any]:
        """For a tensor of the layout that the fields say."""
        address = tensor.data_ptr()
        known = self._known.get(address)
        if known is None:
            if len(self._known) >= _MOST:
                self._known.clear()
            known = self._known[address] = self.apart(described(tensor, self.fields))
        return known


def bare(launcher: Any) -> tuple[Any, Sequence[Apart]] | None:
    """Triton's launcher of a binary as it is below what takes descriptors apart, and how that is
    done with each, in their order. None where a Triton does it in a way that is not known here.
    """
    taking = getattr(launcher, "launch", None)
    inside = getclosurevars(taking).nonlocals if callable(taking) else {}
    metadata, below = inside.get("tensordesc_meta"), inside.get("launcher")
    apart = getattr(taking, "__globals__", {}).get("make_tensordesc_arg")
    if below is None or apart is None or not metadata or None in metadata:
        _tell()
        return None
    found = copy.copy(launcher)
    found.launch = below
    return found, [partial(apart, metadata=of) for of in metadata]


@cache
def _tell() -> None:
    _log.warning(
        "Triton %s takes tensor descriptors apart in a way that is not known here, so each of its "
        "launches asks the driver for tensor maps: some microseconds of the host's time",
        triton.__version__,
    )
