"""Faults that tests plant in C++ and CUDA sources, each of which costs a compilation."""

from collections.abc import Iterable
from typing import Any

import pytest


def some(faults: Iterable[str]) -> list[Any]:
    """A parameter for each: every sixth is in the usual run, the others in -m every_fault."""
    rare = pytest.mark.every_fault
    return [pytest.param(fault, marks=[rare] if i % 6 else []) for i, fault in enumerate(faults)]
