"""Triton's tensor descriptors for less of the host's time.

Triton checks a descriptor whenever one is made, though only the type and the tile decide.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_BLANK: dict[tuple[Any, ...], Mapping[str, Any]] = {}  # by type and tile


def descriptor(tensor: Tensor, rows: int, columns: int) -> Any:
    """Triton's descriptor for tiles of a matrix that is in `tiles.rows_aligned`, and not empty."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    fields = _BLANK.get((tensor.dtype, rows, columns))
    if fields is None:
        made = TensorDescriptor.from_tensor(tensor, [rows, columns])
        _BLANK[tensor.dtype, rows, columns] = fields_of(made)
        return made
    return described(tensor, {**fields, "shape": tensor.shape, "strides": tensor.stride()})


def is_plain(argument: Any) -> bool:
    """Whether an argument is a tensor or None, not a descriptor."""
    return argument is None or isinstance(argument, Tensor)


def fields_of(made: Any) -> Mapping[str, Any]:
    """Those of a descriptor, without its tensor, which would live as long."""
    return {**vars(made), "base": None}


def described(tensor: Any, fields: Mapping[str, Any]) -> Any:
    """A descriptor of a tensor, with these fields beside it."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    made = object.__new__(TensorDescriptor)
    vars(made).update(fields, base=tensor)
    return made
