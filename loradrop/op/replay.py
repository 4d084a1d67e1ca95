"""The launches of a fused pass, made again for less of the host's time.

Between two calls of one layer with as many tokens only the tensors differ: the pass makes some of
the same shapes, and launches the same kernels with the same numbers. So the second such call is
watched, and from the third on its launches are made with the tensors of the call, without asking
again how. A pass that does anything else is left as it is: one with an operation of PyTorch, with
a tensor that it was not given and did not make, or that does not begin at whole 16 bytes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loradrop.kernels.watch import Again, watch

_MOST = 4096  # passes kept, for layers of so many shapes and numbers of tokens
_NEW, _ONCE = object(), object()  # in the place of a pass that never ran, and of one that did once
Result = TypeVar("Result", bound=tuple[Any, ...])


class Launch(NamedTuple):
    """One launch of a pass.

    again     makes it, of its arguments
    places    which tensors those are
    views     (which argument is not the tensor itself, but the same memory as another dtype)
    """

    again: Again
    places: Sequence[int]
    views: Sequence[tuple[int, torch.dtype]]


class Pass(NamedTuple):
    """What a pass does with its tensors: those that it is given, None, and those that it makes.

    made      (shape, dtype) of each of these
    results   which tensors are the fields of the result, of that kind
    """

    made: Sequence[tuple[torch.Size, torch.dtype]]
    launches: Sequence[Launch]
    results: Sequence[int]
    kind: Any

    def play(self, given: Sequence[Tensor | None]) -> Any:
        """The result for other tensors of the same dtypes and layouts."""
        like: Any = given[0]
        tensors = [*given, None]
        for shape, dtype in self.made:
            tensors.append(like.new_empty(shape, dtype=dtype))
        for again, places, views in self.launches:
            arguments: list[Any] = [tensors[i] for i in places]
            for i, dtype in views:
                arguments[i] = arguments[i].view(dtype)
            again(*arguments)
        return self.kind(*[tensors[i] for i in self.results])


class _Watched(TorchDispatchMode):
    """Inside, what a pass makes and launches is noted, and as `strange` whether it did anything
    else.
    """

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = len(given)
        self.tensors = [*given, None]  # held, so that no address comes twice
        self.made: list[tuple[torch.Size, torch.dtype]] = []
        self.launches: list[Launch] = []
        addresses = [tensor.data_ptr() for tensor in given if tensor is not None]
        self.strange = len({*addresses}) < len(addresses) or 0 in addresses

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.new_empty.default:
            self.tensors.append(result)
            self.made.append((result.shape, result.dtype))
            self.strange |= not result.is_contiguous() or result.numel() == 0
        else:
            self.strange |= not function.is_view
        return result

    def launched(self, arguments: Sequence[Tensor | None], again: Again | None) -> None:
        """As `watch` tells it."""
        places, views = [], []
        for i, tensor in enumerate(arguments):
            places.append(self._place(tensor))
            if tensor is not None and (known := self.tensors[places[-1]]) is not None:
                views += [(i, tensor.dtype)] * (known.dtype != tensor.dtype)
        if again is None:
            self.strange = True
        else:
            self.launches.append(Launch(again, places, views))

    def _place(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return self.given
        address = tensor.data_ptr()
        for i, known in enumerate(self.tensors):
            if known is not None and known.data_ptr() == address:
                return i
        self.strange = True
        return self.given

    def seen(self, result: Any) -> Pass | None:
        """The pass that gave this result, or None where it cannot be played again."""
        places = [self._place(field) for field in result]
        for i, field in zip(places, result, strict=True):
            if field is not None:
                made = self.tensors[i] if i > self.given else None
                whole = made is not None and (made.shape, made.dtype) == (field.shape, field.dtype)
                self.strange |= not (whole and field.is_contiguous())
        return None if self.strange else Pass(self.made, self.launches, places, type(result))


class Passes:
    """The passes of functions that launch kernels, by what their launches depend on."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def __call__(
        self, given: Sequence[Tensor | None], options: tuple[Any, ...], run: Callable[[], Result]
    ) -> Result:
        """What `run` returns, a named tuple of tensors that it makes of those given, the first of
        which is there; `options` is all else that it depends on, and says which function it is.
        """
        address, device = 0, -1
        layouts: list[tuple[Any, ...] | None] = []
        for tensor in given:
            if tensor is None:
                layouts.append(None)
            else:
                address |= tensor.data_ptr()
                device = tensor.get_device()
                layouts.append((tensor.dtype, tensor.shape, tensor.stride()))
        if address % 16:
            return run()
        key = device, *options, *layouts
        known = self._known.get(key, _NEW)
        if type(known) is Pass:
            played: Result = known.play(given)
            return played
        if known is None:
            return run()
        if known is _NEW:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = _ONCE
            return run()
        watched = _Watched(given)
        with watched, watch(watched.launched):
            result = run()
        self._known[key] = watched.seen(result)
        return result
