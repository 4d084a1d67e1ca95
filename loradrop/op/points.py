"""Who is measured at what, and what came of it, as plain data. Importing this loads no library.

A point is a layer on one device, and what it takes there with each backend, in µs. Those that are
shipped, `assets/measured.json`, and those of `loradrop tune` have the same keys; the latter say
what the host takes too, and who failed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

KERNELS = ("thin", "triton", "cuda", "overlap")  # the backends of our own kernels
SERVING = ("eager", *KERNELS)  # the simpler first: it wins a tie
MARGIN = 0.02  # a backend replaces a simpler one only if it is faster by more than this
KEYS = ("device", "arch", "sms", "dtype", "k", "n", "m", "r", "dropout", "grad")
FORWARD, BACKWARD = DIRECTIONS = ("forward", "forward_backward")


class Cell(NamedTuple):
    """What is measured together, in one interleaved group: x (M, K) times weight (N, K), rank r."""

    dtype: str
    M: int
    K: int
    N: int
    r: int
    dropout: float
    direction: str


def key_of(cell: Cell, device: str, arch: int, sms: int) -> tuple[Any, ...]:
    """What tells its point from others, in the order of `KEYS`."""
    drops, grads = int(cell.dropout > 0.0), int(cell.direction == BACKWARD)
    return (device, arch, sms, cell.dtype, cell.K, cell.N, cell.M, cell.r, drops, grads)


def point_of(key: tuple[Any, ...], us: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """A point: its key, µs by backend, and whatever else is known."""
    return dict(zip(KEYS, key, strict=True)) | {"us": dict(us)} | more
