"""The bank at the model's root: it owns every adapter parameter; layers hold an index into it.

    bank.targets[i]   what is adapted: its module path, shape and rank
    bank.slots[i]     which (A, B) it uses; None where the layer has no adapter any more
    bank.factors(i)   that (A (r, K), B (N, r)), as the method composes it

Sharing is two equal integers: one storage, one `state_dict` entry, one gradient, the sum over its
layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from loradrop.collector import Collector
    from loradrop.config import LoRAConfig


class Target(NamedTuple):
    """A linear map that is adapted: module path, last part of it, K, N and rank."""

    name: str
    kind: str
    in_features: int
    out_features: int
    r: int

    @property
    def group(self) -> tuple[str, int, int, int]:
        """Targets of the same group can share an adapter."""
        return (self.kind, self.in_features, self.out_features, self.r)

    @property
    def parameters(self) -> int:
        """Elements of an adapter of its own."""
        return self.r * (self.in_features + self.out_features)


@dataclass
class Surgery:
    """What `inject` changed, so that `remove` can restore it bit for bit."""

    requires_grad: dict[str, bool] = field(default_factory=dict)
    # trained base tensors -> their original values
    saved: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)  # module, name, value
    merged: dict[str, Tensor] | None = None  # weights before a reversible merge


class AdapterBank(nn.Module):
    """Every adapter parameter of a model, and which target uses which."""

    def __init__(
        self, targets: Sequence[Target], config: "LoRAConfig", weights: Sequence[Tensor]
    ) -> None:
        """`weights` are the targets' own, for the device and dtype of the adapters."""
        super().__init__()
        self.targets = tuple(targets)
        self.config = config
        self.scaling = [config.scaling(target.name) for target in targets]
        self.slots: list[int | None] = list(range(len(targets)))
        self.enabled = True
        self.collector: Collector | None = None
        self.surgery = Surgery()
        self.plan: Any = None  # the Plan that `share` or `fit` recorded
        self.scores: Any = None  # the Scores of the last probe
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for target, weight in zip(targets, weights, strict=True):
            narrow = config.adapter_dtype == "base" and weight.is_floating_point()
            pair = fresh(target, weight.device, weight.dtype if narrow else torch.float32)
            self.A.append(pair[0])
            self.B.append(pair[1])
        # What a fresh adapter is like, also once every adapter was dropped; it moves with the bank.
        like = self.A[0] if len(self.A) else torch.empty(0)
        self.like = like.detach().new_empty(0)
        config.method.build(self)

    def forward(self, x: Any) -> Any:
        """x itself, so that a bare `nn.Sequential` can carry its bank as one more link."""
        return x

    def factors(self, i: int) -> tuple[Tensor, Tensor] | None:
        """(A (r, K), B (N, r)) of target i, None where it has no adapter.

        For LoRA the Parameters themselves.
        """
        return None if self.slots[i] is None else self.config.method.factors(self, i)

    def pair(self, slot: int) -> tuple[Tensor, Tensor]:
        """(A[slot], B[slot]) without a look through `nn.Module`, which costs 10 µs a layer."""
        key, lists = str(slot), self._modules
        A, B = lists["A"]._parameters[key], lists["B"]._parameters[key]  # type: ignore[union-attr]
        assert A is not None and B is not None
        return A, B

    def index(self, name: str) -> int:
        """The index of the target `name`. Raises KeyError with the names that there are."""
        for i, target in enumerate(self.targets):
            if target.name == name:
                return i
        names = ", ".join(target.name for target in self.targets)
        raise KeyError(f"{name!r} is no target; there are {names}")

    @torch.no_grad()
    def delta(self, i: int) -> Tensor | None:
        """s·B·A (N, K) of target i in float32 (float64 for float64 factors): what `merge` adds to
        its weight.
        """
        pair = self.factors(i)
        if pair is None:
            return None
        A, B = (factor if factor.dtype == torch.float64 else factor.float() for factor in pair)
        return self.scaling[i] * (B @ A)

    def assign(self, slots: Sequence[int | None], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Point target i at pairs[slots[i]].

        Raises ValueError where a pair does not fit a target.
        """
        for target, slot in zip(self.targets, slots, strict=True):
            if slot is None:
                continue
            A, B = pairs[slot]
            if A.shape[1] != target.in_features or B.shape[0] != target.out_features:
                raise ValueError(
                    f"slot {slot} holds A {tuple(A.shape)} and B {tuple(B.shape)}: "
                    f"too unlike {target}"
                )
        self.slots = list(slots)
        self.A = nn.ParameterList(_parameter(A) for A, _ in pairs)
        self.B = nn.ParameterList(_parameter(B) for _, B in pairs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterBank":
        """Moves as any module does, but never to a narrower type: float32 adapters stay so on a
        bf16 base.
        """

        def keep_width(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrower = moved.is_floating_point() and moved.element_size() < tensor.element_size()
            return tensor.to(moved.device) if narrower else moved

        super()._apply(keep_width, recurse)  # type: ignore[no-untyped-call]
        self.like = keep_width(self.like)
        return self

    def extra_repr(self) -> str:
        adapters = len({slot for slot in self.slots if slot is not None})
        return f"targets={len(self.targets)}, adapters={adapters}, method={self.config.method.name}"


def fresh(
    target: Target, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Parameter, nn.Parameter]:
    """LoRA's initial pair: A Kaiming-uniform, B zero, so that the model is unchanged."""
    A = torch.empty(target.r, target.in_features, device=device, dtype=dtype)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    B = torch.zeros(target.out_features, target.r, device=device, dtype=dtype)
    return nn.Parameter(A), nn.Parameter(B)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def bank_of(model: nn.Module) -> AdapterBank:
    """The bank of an injected model. Raises ValueError where there is none."""
    bank = getattr(model, "lora_bank", None)
    if not isinstance(bank, AdapterBank):
        raise ValueError(
            f"{type(model).__name__} has no loradrop adapters: "
            "call loradrop.inject(model, config) first"
        )
    return bank
