"""Who is told of the launches of a thread, Triton's and those of csrc/, to make them again."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# A launch, of its stream and the addresses of its tensors, which are 0 for None.
Again = Callable[[int, Sequence[int]], object]
Watcher = Callable[[Sequence[Any], Again | None], None]


class _Here(threading.local):
    """Of a thread: a backward pass on a device has one of its own."""

    watcher: Watcher | None = None


_HERE = _Here()


@contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """Inside, `watcher` is told the tensors of each launch of this thread, and how it is made with
    others of their types and layouts: None where that is not known.
    """
    before, _HERE.watcher = _HERE.watcher, watcher
    try:
        yield
    finally:
        _HERE.watcher = before


def watched() -> bool:
    """Whether anybody is told."""
    return _HERE.watcher is not None


def tell(tensors: Sequence[Any], again: Again | None) -> None:
    """A launch of these tensors was made, as `again` makes it."""
    if (watcher := _HERE.watcher) is not None:
        watcher(tensors, again)
