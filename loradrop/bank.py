"""The bank at the model's root: it owns every adapter parameter; layers hold an index into it.

    bank.targets[i]   what is adapted: its module path, shape and rank
    bank.slots[i]     which adapter it uses; None where the layer has none
    bank.factors(i)   that adapter's (A (r, K), B (N, r)), composed in plain PyTorch

A method makes its bank, and a bank owns whatever tensors it likes; files, resuming, plans and
exports work from `state_dict`, `restore` and `factors` alone. Sharing is two equal integers: one
storage, one `state_dict` entry, one gradient, the sum over its layers.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loradrop.scores import Assignment, Target

Pair = tuple[Tensor, Tensor]
USERS = "_extra_state"  # PyTorch's name of what `get_extra_state` gives, in a state dict
_log = logging.getLogger(__name__)


class Observer(Protocol):
    """What a layer asks while statistics are collected: see `collector.Collector`."""

    def arguments(self, i: int, x: Tensor) -> dict[str, Any]: ...

    def add(self, i: int, sqnorm: Tensor) -> None: ...


class AdapterBank(nn.Module):
    """The owner of a model's adapter parameters: the base class of every method's bank.

    scaling   s of each target;  dropout   of the adapters' inputs
    A subclass registers its parameters and buffers and gives `factors`. Trainable tensors are
    Parameters, everything else is a buffer; numbered tensors of changing count are in an
    `nn.ParameterList`.
    """

    def __init__(self, targets: Sequence[Target], scaling: Sequence[float]) -> None:
        super().__init__()
        self.assignment = Assignment(tuple(targets), tuple(range(len(targets))))
        self.scaling = list(scaling)
        self.dropout = 0.0
        self.enabled = True
        self.collector: Observer | None = None

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.assignment.targets

    @property
    def slots(self) -> tuple[int | None, ...]:
        return self.assignment.slots

    def bring_back(self) -> None:
        """Undo an offload by accelerate: it loads tensors for a forward, and nobody calls ours."""
        device = execution_device(*self.modules())
        if device is not None and any(p.is_meta for p in self.parameters()):
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(self, recurse=True)
            self.to(device)

    @property
    def trainable(self) -> int:
        """Elements of all parameters, each once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    def forward(self, *inputs: Any) -> Any:
        """The inputs, so that an `nn.Sequential` can carry its bank as one more link."""
        return inputs[0] if len(inputs) == 1 else inputs

    def factors(self, i: int) -> Pair | None:
        """(A (r, K), B (N, r)) of target i, differentiable; None where it has no adapter."""
        raise NotImplementedError

    def index(self, name: str) -> int:
        """The index of the target `name`. Raises KeyError with the names that exist."""
        for i, target in enumerate(self.targets):
            if target.name == name:
                return i
        names = ", ".join(target.name for target in self.targets)
        raise KeyError(f"{name!r} is not a target; the targets are {names}")

    @torch.no_grad()
    def delta(self, i: int) -> Tensor | None:
        """s·B·A (N, K) of target i, as `delta_of`: what `merge` adds to its weight."""
        return delta_of(self.factors(i), self.scaling[i])

    def restore(self, assignment: Assignment, tensors: Mapping[str, Tensor]) -> None:
        """Take the assignment and the `state_dict` of a saved bank of the same method.

        Tensors may differ in shape and number from the present ones; they keep their saved dtype
        and go to the bank's device. Raises RuntimeError for names that this bank does not know.
        """
        device = self.device
        for name, child in list(self.named_children()):
            if isinstance(child, nn.ParameterList):
                count = sum(key.startswith(f"{name}.") for key in tensors)
                found = [tensors[f"{name}.{k}"] for k in range(count)]
                if [_form(t) for t in found] != [_form(t) for t in child]:
                    self.register_module(name, nn.ParameterList(_empty(t, device) for t in found))
        for key, old in [*self._parameters.items(), *self._buffers.items()]:
            if key in tensors and (old is None or _form(old) != _form(tensors[key])):
                new = _empty(tensors[key], device)
                setattr(self, key, new if key in self._parameters else new.detach())
        self.assignment = assignment
        self.load_state_dict({USERS: self.get_extra_state()} | dict(tensors))

    def get_extra_state(self) -> Tensor:
        """Which target uses which adapter, as text in numbers: any file of tensors can hold it."""
        users = {target.name: slot for target, slot in zip(self.targets, self.slots, strict=True)}
        return torch.tensor(list(json.dumps(users).encode()), device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Raises RuntimeError for a state dict whose targets use other adapters than ours."""
        here = json.loads(_text(self.get_extra_state()))
        try:
            there = json.loads(_text(state))
        except ValueError as error:
            raise RuntimeError(f"{USERS} of the adapters is damaged: {error}") from error
        if list(here.items()) != list(there.items()):
            differ = [n for n in here | there if here.get(n, "") != there.get(n, "")] or list(there)
            raise RuntimeError(
                "the state dict is of a model whose targets use other adapters, so its tensors "
                f"would go to the wrong layers. They differ in {', '.join(differ[:4])}"
                f"{', ...' * (len(differ) > 4)}: call loradrop.share with the same kept first, or "
                "loradrop.load what loradrop.save wrote, which brings its sharing along"
            )

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        missing: list[str] = rest[2]
        if prefix + USERS in missing and any(key.startswith(prefix) for key in state):
            missing.remove(prefix + USERS)
            _log.warning("a state dict without %s: who used its adapters is not checked", USERS)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterBank":
        """Moves as any module does, but never to a narrower type, such as the bf16 of the base."""
        super()._apply(lambda t: keep_width(fn, t), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"targets={len(self.targets)}, adapters={self.assignment.adapters}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def delta_of(factors: Pair | None, scaling: float) -> Tensor | None:
    """s·B·A (N, K) in float32 (float64 for float64 factors); None without factors."""
    if factors is None:
        return None
    A, B = (factor if factor.dtype == torch.float64 else factor.float() for factor in factors)
    return scaling * (B @ A)


def bank_of(model: nn.Module) -> AdapterBank:
    """The bank of an injected model. Raises ValueError where there is none."""
    bank = getattr(model, "lora_bank", None)
    if not isinstance(bank, AdapterBank):
        raise ValueError(
            f"{type(model).__name__} has no loradrop adapters: "
            "call loradrop.inject(model, config) first"
        )
    bank.bring_back()
    return bank


def has_bank(model: nn.Module) -> bool:
    """Whether the model is injected."""
    return isinstance(getattr(model, "lora_bank", None), AdapterBank)


def execution_device(*modules: nn.Module) -> torch.device | None:
    """Where accelerate's hooks take the tensors of the first of these that has one; None: none."""
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def _text(codes: Tensor) -> bytes:
    """The text of `get_extra_state`; an average of equal ones may have become a float."""
    return bytes(int(code) % 256 for code in codes.detach().cpu().float().round().tolist())


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _empty(saved: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(saved, device=device), saved.is_floating_point())


def keep_width(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn(tensor), but never of a narrower type."""
    moved = fn(tensor)
    narrower = moved.is_floating_point() and moved.element_size() < tensor.element_size()
    return tensor.to(moved.device) if narrower else moved
