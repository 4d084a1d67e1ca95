"""Warnings of the op: each is said once, at the line that led to it."""

import functools
import sys
import warnings
from types import FrameType

_INSIDE = ("loradrop", "torch")  # a layer is called through nn.Module


@functools.cache
def warn_once(message: str) -> None:
    """Warns, in the name of the nearest caller outside of this package and of PyTorch."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level if frame is not None else 2)
