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

from loradrop.kernels.launch import profiled
from loradrop.kernels.stream import current_stream
from loradrop.kernels.watch import Again, watch

_MOST = 4096  # passes kept, for layers of so many shapes and numbers of tokens
_NEW, _ONCE = object(), object()  # in the place of a pass that never ran, and of one that did once
Result = TypeVar("Result", bound=tuple[Any, ...])


class Pass(NamedTuple):
    """What a pass does with its tensors: those that it is given, None, and those that it makes.

    made      (shape, strides, dtype, device) of each of these
    launches  how each is made, and which tensors it takes
    results   which tensors are the fields of the result, of that kind; and of one that is the first
              columns of its tensor, its shape and strides
    """

    made: Sequence[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]]
    launches: Sequence[tuple[Again, Sequence[int]]]
    results: Sequence[tuple[int, tuple[Sequence[int], Sequence[int]] | None]]
    kind: Any

    def play(self, given: Sequence[Tensor | None], addresses: list[int]) -> Any:
        """The result for other tensors of the same dtypes and layouts, which lie there."""
        tensors = [*given, None]
        addresses.append(0)
        for shape, strides, dtype, device in self.made:
            made = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            tensors.append(made)
            addresses.append(made.data_ptr())
        first: Any = given[0]
        stream = current_stream(first.get_device())
        for again, places in self.launches:
            again(stream, [addresses[i] for i in places])
        fields: list[Any] = []
        for i, part in self.results:
            tensor: Any = tensors[i]
            fields.append(tensor if part is None else tensor.as_strided(*part))
        return self.kind(*fields)


class _Watched(TorchDispatchMode):
    """Inside, what a pass makes and launches is noted, and as `strange` whether it did anything
    else.
    """

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = len(given)
        self.tensors = [*given, None]  # held, so that no address comes twice
        self.made: list[Any] = []
        self.launches: list[tuple[Again, Sequence[int]]] = []
        addresses = [tensor.data_ptr() for tensor in given if tensor is not None]
        self.strange = len({*addresses}) < len(addresses) or 0 in addresses

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.new_empty.default:
            self.tensors.append(result)
            layout = tuple(result.shape), result.stride()
            self.made.append((*layout, result.dtype, result.device))
            self.strange |= not result.is_contiguous() or result.numel() == 0
        else:
            self.strange |= not function.is_view
        return result

    def launched(self, arguments: Sequence[Tensor | None], again: Again | None) -> None:
        """As `watch` tells it."""
        places = [self._place(tensor) for tensor in arguments]
        if again is None:
            self.strange = True
        else:
            self.launches.append((again, places))

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
        results: list[Any] = []
        for field in result:
            i, part = self._place(field), None
            if field is not None:
                made, form = self.tensors[i], (field.shape, field.stride())
                if made is None or i < self.given or made.dtype != field.dtype:
                    self.strange = True
                elif form != (made.shape, made.stride()):
                    part = form
                    self.strange |= field.ndim != 2 or form != (
                        (made.shape[0], field.shape[1]), made.stride()
                    )  # fmt: skip
            results.append((i, part))
        return None if self.strange else Pass(self.made, self.launches, results, type(result))


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
        together = 0
        first: Any = given[0]
        addresses: list[int] = []
        layouts: list[Any] = [first.get_device(), *options]
        for tensor in given:
            if tensor is None:
                addresses.append(0)
                layouts.append(None)
            else:
                address = tensor.data_ptr()
                together |= address
                addresses.append(address)
                layouts += tensor.dtype, tensor.shape, tensor.stride()
        if together % 16 or profiled():
            return run()
        key = tuple(layouts)
        known = self._known.get(key, _NEW)
        if type(known) is Pass:
            played: Result = known.play(given, addresses)
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
