"""One target while its statistics are collected: what its layer asks for and adds to."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from loradrop.bank import Pair
from loradrop.scores import Target
from loradrop.statistics.masks import TargetMask

SHAPES: dict[str, Callable[[Target], tuple[int, ...]]] = {
    "sqnorm": lambda target: (),
    "moment": lambda target: (target.in_features,),
    "gram_in": lambda target: (target.r, target.r),
    "core": lambda target: (target.r, target.r),
}


class Watcher(Protocol):
    """Who collects, for all targets together: see `collector.Collector`."""

    online: bool

    def layer_runs(self, target: Target) -> None: ...


class Watched:
    """The statistics of one target while they are collected: what its layer asks and adds to.

    values   by name: online the leaf, None for a target without an adapter; offline the sum so far

    Compiled code reads nothing here that differs between equal layers, so one graph serves them
    all.
    """

    def __init__(
        self, collector: Watcher, mask: TargetMask, values: dict[str, Tensor | None]
    ) -> None:
        self.collector, self.mask, self.values = collector, mask, values

    def arguments(self, x: Tensor) -> dict[str, Any]:
        """The op's arguments that make it report the statistics of the target's input x (..., K).

        Raises RuntimeError where it cannot be known whose mask belongs to x.
        """
        online = self.collector.online
        if online and not torch.is_grad_enabled():
            return {}
        if not torch.compiler.is_compiling():
            self.collector.layer_runs(self.mask.target)
        arguments: dict[str, Any] = {"token_weights": self.mask.weights(x)}
        if not online:
            return arguments | {"return_sqnorm": True}
        for name, leaf in self.values.items():
            assert leaf is not None
            if leaf.device != x.device:
                leaf = self.values[name] = _leaf(leaf.shape, x.device)
            arguments[f"{name}_sink"] = leaf
        return arguments

    def add(self, sqnorm: Tensor) -> None:
        """Adds an offline squared norm to the open row."""
        before = self.values["sqnorm"]
        self.values["sqnorm"] = sqnorm.double() if before is None else before + sqnorm

    def found(self, name: str) -> Tensor | None:
        """What was collected since `begin`; None where the target was not called."""
        value = self.values[name]
        return value.grad if self.collector.online and value is not None else value

    def begin(self) -> None:
        """Open a new row."""
        for name, value in self.values.items():
            if self.collector.online and value is not None:
                value.grad = None
            else:
                self.values[name] = None


def start(name: str, target: Target, factors: Pair | None, online: bool) -> Tensor | None:
    """The value of a statistic before anything was collected."""
    if factors is None or not online:
        return None
    return _leaf(SHAPES[name](target), factors[0].device)


def _leaf(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.float64, device=device, requires_grad=True)
