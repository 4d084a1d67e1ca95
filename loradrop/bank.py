"""The bank at the model's root: it owns every adapter parameter; layers hold a link into it.

    bank.targets[i]   what is adapted: its module path, shape and rank
    bank.slots[i]     which adapter it uses; None where the layer has none
    bank.factors(i)   that adapter's (A (r, K), B (N, r)), composed in plain PyTorch

A method makes its bank, and a bank owns whatever tensors it likes; files, resuming, plans and
exports work from `state_dict`, `restore` and `factors` alone. Sharing is two equal integers: one
storage, one `state_dict` entry, one gradient, the sum over its layers.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loradrop.extra_state import ALONE, STATE, assignment_in, written
from loradrop.ranks import (
    ZERO_3,
    full_tensor,
    is_partitioned,
    is_sharded,
    replicated_like,
    sharded_like,
)
from loradrop.scores import Assignment, Target

Pair = tuple[Tensor, Tensor]
_log = logging.getLogger(__name__)


class Observer(Protocol):
    """What a layer asks while statistics are collected: see `watched.Watched`."""

    def arguments(self, x: Tensor) -> dict[str, Any]: ...

    def add(self, sqnorm: Tensor) -> None: ...


class Link:
    """Target `index` of `bank`, as its layer holds it.

    scaling   s of the target
    observer  what collects the statistics of the target now
    adapter   the module that owns its tensors, in a bank that has one for each adapter; else None

    Compiled code of a layer reads its adapter through this, and no number that differs from layer
    to layer, so one graph serves all layers of a kind.
    """

    def __init__(self, bank: "AdapterBank", index: int, scaling: float) -> None:
        self.bank, self.index, self.scaling = bank, index, scaling
        self.adapter: Any = None
        self.observer: Observer | None = None

    def factors(self) -> Pair | None:
        """As `AdapterBank.factors` of the target."""
        if self.adapter is not None:
            pair: Pair = self.adapter.factors()
            return pair
        return self.bank.factors(self.index)


class AdapterBank(nn.Module):
    """The owner of a model's adapter parameters: the base class of every method's bank.

    scaling   s of each target;  dropout   of the adapters' inputs
    composition   the method's options by which tensors become factors
    merged    whether the weights hold the adapters for now
    A subclass registers its parameters and buffers and gives `factors`. Trainable tensors are
    Parameters, everything else is a buffer; numbered tensors of changing count are in an
    `nn.ParameterList`.

    Its state dict says who uses which adapter. `load_state_dict` takes another assignment where its
    Parameters stay the same ones, and where `adopts` says that no optimiser holds them yet.
    """

    def __init__(self, targets: Sequence[Target], scaling: Sequence[float]) -> None:
        super().__init__()
        self.links = [Link(self, i, s) for i, s in enumerate(scaling)]
        self.assignment = Assignment(tuple(targets), tuple(range(len(targets))))
        self.dropout = 0.0
        self.composition: Mapping[str, object] = {}
        self.enabled = True
        self.merged = False
        self.adopts = False
        self.collector: Any = None  # what collects statistics, in all links, or None
        self.changed: Callable[[], None] | None = None  # called when who uses what has changed

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.assignment.targets

    @property
    def slots(self) -> tuple[int | None, ...]:
        return self.assignment.slots

    @property
    def scaling(self) -> tuple[float, ...]:
        return tuple(link.scaling for link in self.links)

    def stop_collecting(self) -> None:
        """Detach what collects statistics, as of a run that was interrupted."""
        while self.collector is not None:
            self.collector.detach()

    def bring_back(self) -> None:
        """Undo an offload by accelerate: it loads tensors for a forward, and nobody calls ours.

        Parameters stay the objects that an optimiser may hold.
        """
        device = execution_device(*self.modules())
        if device is not None and any(p.is_meta for p in self.parameters()):
            from accelerate.hooks import remove_hook_from_module

            owners = [m for m in self.modules() if m._parameters]
            before = [(owner, dict(owner._parameters)) for owner in owners]
            remove_hook_from_module(self, recurse=True)
            self.to(device)
            for owner, parameters in before:
                for name, old in parameters.items():
                    new = owner._parameters[name]
                    if old is not None and new is not None and new is not old:
                        torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]
                        owner._parameters[name] = old

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

    def in_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of its state dict by their names in a file, which `restore` understands."""
        return dict(tensors)

    def restore(self, assignment: Assignment, tensors: Mapping[str, Tensor]) -> None:
        """Take the assignment and the `state_dict` of a saved bank of the same method.

        Tensors may differ in shape and number from the present ones; they keep their saved dtype
        and go to the bank's device. Raises ValueError, and changes nothing, for tensors that this
        bank cannot take: which ones differ.
        """
        self._require_fit(tensors)
        self._take_forms(tensors)
        self._use(assignment)
        here = self.state_dict(keep_vars=True)
        found = {k: sharded_like(v, here[k]) if k in here else v for k, v in tensors.items()}
        self.load_state_dict({**found, STATE: self.get_extra_state()})

    def require_whole(self) -> None:
        """Raises ValueError where FSDP2 shards the adapters: new ones would not be."""
        if any(map(is_sharded, self.parameters())):
            raise ValueError(
                "the adapters are sharded, and others in their place would not be, nor would their "
                "gradients be summed over the ranks: share, cut or load before fully_shard, in a "
                "model that is not sharded yet, or leave them whole, by fully_shard(..., "
                "ignored_params=loradrop.keep_whole(model))"
            )

    def _require_fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError for names and shapes that the bank can neither hold nor take on."""
        lists = self._lists()
        own = {k: v for k, v in self.state_dict().items() if k != STATE and not k.startswith(lists)}
        given = {k: v for k, v in tensors.items() if not k.startswith(lists)}
        takes = self._parameters.keys() | self._buffers.keys()  # of any shape, or None until now
        wrong = [f"{key}: not in the file" for key in own.keys() - given.keys()]
        wrong += [f"{key}: not in the model" for key in given.keys() - own.keys() - takes]
        wrong += [
            f"{key}: {tuple(given[key].shape)} in the file, {tuple(own[key].shape)} in the model"
            for key in (own.keys() & given.keys()) - takes
            if own[key].shape != given[key].shape
        ]
        if wrong:
            more = f"\n  and {len(wrong) - 8} more" * (len(wrong) > 8)
            raise ValueError(
                "the file has other adapter tensors than the model, which is as it was: inject it "
                "with the options that the file was made with, or call loradrop.remove(model) and "
                "load then. These differ:\n  " + "\n  ".join(sorted(wrong)[:8]) + more
            )

    def _lists(self) -> tuple[str, ...]:
        """What the names of the tensors begin with whose number `_take_forms` changes."""
        lists = (name for name, m in self.named_children() if isinstance(m, nn.ParameterList))
        return tuple(f"{name}." for name in lists)

    def _take_forms(self, tensors: Mapping[str, Tensor]) -> None:
        """Give lists, parameters and buffers the number, shapes and dtypes of `tensors`."""
        device = self.device
        for name, child in list(self.named_children()):
            if isinstance(child, nn.ParameterList):
                count = sum(key.startswith(f"{name}.") for key in tensors)
                found = [tensors[f"{name}.{k}"] for k in range(count)]
                if [form(t) for t in found] != [form(t) for t in child]:
                    self.require_whole()
                    self.register_module(name, nn.ParameterList(empty(t, device) for t in found))
        for key, old in [*self._parameters.items(), *self._buffers.items()]:
            if key in tensors and (old is None or form(old) != form(tensors[key])):
                self.require_whole()
                new = empty(tensors[key], device)
                setattr(self, key, new if key in self._parameters else new.detach())

    def get_extra_state(self) -> Tensor:
        """What `state_dict` says beside the tensors: see `extra_state`. It is a DTensor where FSDP2
        shards the adapters, for accelerate wants nothing else beside one.
        """
        state = written(self.assignment, self.composition, self.merged)
        return replicated_like(state, like=next(self.parameters(), state))

    @property
    def _extra_state(self) -> Tensor:  # accelerate asks for every entry of a state dict by its name
        return self.get_extra_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing is left to do: `_load_from_state_dict` has taken it."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *args: Any
    ) -> None:
        """Takes the assignment before the tensors. Raises RuntimeError where it must not."""
        tensors = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        state = tensors.pop(STATE, None)
        if state is not None:
            state = full_tensor(state).cpu()
            made = assignment_in(state, self.assignment, self.composition, self.merged)
            if self.adopts:
                self._take_forms(tensors)
            else:
                self._require_fitting(made.slots, tensors)
            self._use(made)
            if (state[3] == ALONE).any():
                missing.clear()  # the bank is the last of the model's modules
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        if state is None and prefix + STATE in missing and tensors:
            missing.remove(prefix + STATE)
            _log.warning("the state dict does not say which layers share: taken as they do here")

    def _require_fitting(self, slots: Sequence[int | None], tensors: Mapping[str, Tensor]) -> None:
        """Raises RuntimeError for tensors that the adapters here are not the place for."""
        own = {key: value for key, value in self.state_dict().items() if key != STATE}
        same = _forms(own) == _forms(tensors)
        # torch fills what a state dict lacks from the model where it need not be whole.
        same = same and len({*slots} - {None}) == len({*self.slots} - {None})
        cut = own.keys() == tensors.keys() and any(own[k].shape != tensors[k].shape for k in own)
        if not (same or (slots == self.slots and not cut)):
            what = "adapters have other ranks" if cut else "other layers share"
            raise RuntimeError(
                f"{what} in the state dict than in this model, so it does not fit. To resume a run "
                "of LoraDropCallback make a new Trainer with this model, and resume with that: "
                "Trainer(model, ..., callbacks=[loradrop.LoraDropCallback()]), not model_init= and "
                "not add_callback. Elsewhere take them as they are there first, with "
                "loradrop.share, loradrop.load(model, folder) or, of a PeftModel, "
                "PeftModel.from_pretrained(base, folder, is_trainable=True), and make the "
                "optimiser afterwards"
            )

    def _use(self, assignment: Assignment) -> None:
        """Who uses which adapter from now on; their tensors are there."""
        self.assignment = assignment
        if self.changed is not None:
            self.changed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterBank":
        """Moves as any module does, but never to a narrower type, such as the bf16 of the base."""
        super()._apply(lambda t: keep_width(fn, t), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"targets={len(self.targets)}, adapters={self.assignment.adapters}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key: form(value) for key, value in tensors.items()}


def delta_of(factors: Pair | None, scaling: float) -> Tensor | None:
    """s·B·A (N, K) in float32 (float64 for float64 factors); None without factors."""
    if factors is None:
        return None
    A, B = (factor if factor.dtype == torch.float64 else factor.float() for factor in factors)
    return scaling * (B @ A)


def parts_with_banks(model: nn.Module) -> list[str]:
    """The names of the modules in `model` that were injected, or are layers with their own bank."""
    banks = (name for name, m in model.named_modules() if isinstance(m, AdapterBank))
    return [name.rpartition(".")[0] for name in banks]


def bank_of(model: nn.Module) -> AdapterBank:
    """The bank of an injected model; adapters that accelerate offloaded are brought back.

    Raises ValueError where there is none, and where ZeRO-3 has its parameters.
    """
    bank = getattr(model, "lora_bank", None)
    if not isinstance(bank, AdapterBank):
        of_peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        how = "call loradrop.inject(model, config) first"
        if getattr(model, "_loradrop_merged", False):
            how = (
                "they were merged into its weights. Save or export before merge, or merge with "
                "keep_original=True; to go on, load the base model and the adapter again"
            )
        elif of_peft:
            how = (
                "give get_peft_model a loradrop.integrations.peft.LoraDropConfig, or save the "
                "adapter and loradrop.load the folder into the base model"
            )
        elif parts := parts_with_banks(model):
            how = f"its part {parts[0]!r} has them: give that one"
        raise ValueError(f"{type(model).__name__} has no loradrop adapters: {how}")
    if any(map(is_partitioned, bank.parameters())):
        raise ValueError(ZERO_3)
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


def form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype."""
    return tensor.shape, tensor.dtype


def empty(saved: Tensor, device: torch.device) -> nn.Parameter:
    """A Parameter that can take the values of `saved`."""
    return nn.Parameter(torch.empty_like(saved, device=device), saved.is_floating_point())


def keep_width(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn(tensor), but of no narrower type than it has, or float32 if that is narrower."""
    moved, least = fn(tensor), min(tensor.element_size(), 4)
    if not moved.is_floating_point() or moved.element_size() >= least:
        return moved
    return tensor.to(moved.device, min(tensor.dtype, torch.float32, key=lambda d: d.itemsize))
