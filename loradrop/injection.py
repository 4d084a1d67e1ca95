"""What a model carries once it is injected: the record, and what has to hold of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from loradrop.bank import bank_of
from loradrop.config import LoRAConfig
from loradrop.machine import versions
from loradrop.origin import base_of, classes_of
from loradrop.plan import Plan
from loradrop.ranks import local_part
from loradrop.scores import Scores
from loradrop.wrapped import inner, modules_of, parameters_of, tensors_of

_VIEW = "loradrop_injected"  # of PEFT's face: see integrations.peft_tuner


@dataclass
class Injection:
    """The record of one `inject`, beside the bank at the model's root.

    plan            what `fit` or `load` recorded
    scores          those of the last probe
    requires_grad, originals, buffers, attributes
                    what the model had before, so that `remove` restores it bit for bit: originals
                    are the base tensors that are trained whole, attributes (module, name, value)
    merged          the weights before a reversible merge; of quantised ones the attributes that
                    hold them; None while the adapters are not merged
    told            names of tensors that a warning has named, and other warnings that came once
    stepped, start  whether a run called the method at a step; `sum_of` the bank at first
    """

    config: LoRAConfig
    plan: Plan | None = None
    scores: Scores | None = None
    requires_grad: dict[str, bool] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    merged: dict[str, Tensor | Mapping[str, Any]] | None = None
    told: set[str] = field(default_factory=set)
    stepped: bool = False
    start: float | None = None


def sum_of(bank: nn.Module) -> float | None:
    """Of all elements of its parameters: another one as soon as they are trained. None on meta."""
    sums = [local_part(parameter.detach()).double().sum() for parameter in bank.parameters()]
    return None if any(total.is_meta for total in sums) else sum(map(float, sums))


def injection_of(model: nn.Module) -> Injection:
    """The record of an injected model. Raises ValueError where it has no adapters."""
    bank_of(model)
    injection = model._lora_injection
    assert isinstance(injection, Injection)
    return injection


@contextmanager
def injected(model: nn.Module) -> Iterator[nn.Module]:
    """The model itself, or the base model of a PeftModel with LORADROP adapters, which inside is as
    `inject` would have left it.
    """
    view = getattr(model, _VIEW, None)
    if view is None:
        yield model
    else:
        with view() as base:
            yield base


def require_own(model: nn.Module, instead: str) -> None:
    """Raises ValueError, with what to do instead, for a PeftModel: its layers are PEFT's."""
    if getattr(model, _VIEW, None) is not None:
        raise ValueError(f"{type(model).__name__} has PEFT's layers: {instead}")


def trained_since(model: nn.Module) -> list[str]:
    """The names of parameters outside the bank that train though `inject` had frozen them, or
    did not know them.
    """
    tensors = tensors_of(model, keep_vars=True)
    known = {id(tensors.get(name)) for name in injection_of(model).originals}
    known |= {id(parameter) for parameter in bank_of(model).parameters()}
    parameters = parameters_of(model).items()
    return [name for name, p in parameters if p.requires_grad and id(p) not in known]


def require_adapted(model: nn.Module) -> None:
    """Raises ValueError unless every target is still the module that carries its adapter."""
    bank, modules = bank_of(model), modules_of(model, once=False)
    for i, target in enumerate(bank.targets):
        module = modules.get(target.name)
        link = getattr(module, "_lora", None)
        k = getattr(module, "in_features", target.in_features)  # GPT-2's Conv1D has neither
        n = getattr(module, "out_features", target.out_features)
        if link is not bank.links[i] or (k, n) != target[2:4]:
            now = (
                "is gone" if module is None else f"is another {type(module).__name__} ({k} -> {n})"
            )
            raise ValueError(
                f"the target {target.name} ({target.in_features} -> {target.out_features}) {now}: "
                "it was replaced or moved after inject, as resize_token_embeddings does with a "
                "head, and its adapter with it. Put the old one back, or change the base model "
                "first and inject then"
            )


def require_unmerged(model: nn.Module) -> None:
    """Raises ValueError while the weights hold the adapters, also those of a PeftModel."""
    with injected(model) as own:
        if injection_of(own).merged is not None:
            raise ValueError(
                "the adapters are merged into the weights, and loradrop.remove(model) takes them "
                "out of these and away: to go on with them, loradrop.save them first, and "
                "loradrop.load them afterwards"
            )


def require_trained(model: nn.Module) -> None:
    """Raises ValueError inside of `disabled`, where modules that are trained whole have the values
    from before `inject`.
    """
    bank, injection = bank_of(model), injection_of(model)
    if injection.originals and injection.merged is None and not bank.enabled:
        raise ValueError(
            "inside of loradrop.disabled the modules that are trained whole are as before inject, "
            "and would be written so: call this outside of it"
        )


def require_loaded(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a tensor whose values are not here, as accelerate's offload does it."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(
                f"{name} is offloaded (on the meta device), so its values can be neither read nor "
                "set: save the adapters (loradrop.save), load the base model without an offload, "
                "loradrop.load them there, and do this then. (Of a model that was in memory before "
                "accelerate offloaded it, accelerate.hooks.remove_hook_from_module(model, "
                "recurse=True) brings the values back)"
            )


def plan_of(model: nn.Module) -> Plan:
    """The plan of an injected model: what `fit` or `load` recorded, with today's assignment and,
    until something is decided by those of the record, with the method's options that act today.
    """
    model = inner(model)
    bank, injection = bank_of(model), injection_of(model)
    now: dict[str, Any] = {"assignment": bank.assignment, "parameters": bank.trainable}
    now["facts"] = dict(injection.config.method.facts(bank))
    if (plan := injection.plan) is not None:
        if plan.kept is None:
            now["config"] = replace(plan.config, method=injection.config.method)
        return replace(plan, **now)
    scores = None if injection.scores is None else injection.scores.to_dict()
    with injected(model) as own:
        base = base_of(own) | classes_of(own)
    return Plan(config=injection.config, scores=scores, base=base, versions=versions(), **now)
