"""What a model carries once it is injected, and snapshots of it: the plan, the adapters."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loradrop.bank import STATE, AdapterBank, Pair, bank_of, delta_of
from loradrop.config import LoRAConfig
from loradrop.env import versions
from loradrop.plan import Plan
from loradrop.ranks import full_tensor, is_sharded, local_part
from loradrop.scores import Scores
from loradrop.wrapped import inner, modules_of, parameters_of, tensors_of

_VIEW = "loradrop_injected"  # of PEFT's face: see integrations.peft_tuner
_log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Adapters:
    """A snapshot of everything that files and exports need.

    factors   (A (r, K), B (N, r)) of each target, detached; None where it has no adapter
    scaling   s of each target
    state     the bank's own tensors by their names in a file
    trained   the base tensors that are trained whole, by their names in the model: those of
              modules_to_save, and what was made trainable or added since `inject`
    """

    plan: Plan
    factors: tuple[Pair | None, ...]
    scaling: tuple[float, ...]
    state: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]

    def delta(self, i: int) -> Tensor | None:
        """s·B·A (N, K) of target i, as `bank.delta_of`."""
        return delta_of(self.factors[i], self.scaling[i])


def adapters_of(model: nn.Module) -> Adapters:
    """The adapters of an injected model as they are now. Tensors are not copied, but those that
    FSDP2 shards are put together, for which every rank has to call this.

    Raises ValueError where a target was replaced, or a trained tensor is offloaded.
    """
    bank, injection, base = bank_of(model), injection_of(model), tensors_of(model)
    require_adapted(model)
    require_trained(model)
    since = trained_since(model)
    if new := [name for name in since if name not in injection.told]:
        injection.told.update(new)
        _log.warning(
            "trainable since inject, and saved with the adapters: %s. A base model that loads them "
            "must have them", ", ".join(new),
        )  # fmt: skip
    trained = {name: base[name].detach() for name in (*injection.originals, *since)}
    trained |= _left_behind(injection, base)
    require_loaded(trained)
    state = {k: full_tensor(v) for k, v in bank.state_dict().items() if k != STATE}
    pairs = composed(bank, state)
    return Adapters(
        plan=plan_of(model),
        factors=tuple(None if p is None else (p[0].detach(), p[1].detach()) for p in pairs),
        scaling=tuple(bank.scaling),
        state=bank.in_file(state),
        trained={k: full_tensor(v) for k, v in trained.items()},
    )


def _left_behind(injection: Injection, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was tied to a module before PEFT trained a copy of that apart: without it a file would
    load the copy into both.
    """

    def place(tensor: Tensor) -> tuple[int, torch.Size] | None:
        apart = is_sharded(tensor) or tensor.is_meta
        return None if apart else (tensor.data_ptr(), tensor.shape)

    before = {*map(place, injection.originals.values())} - {None}
    left = {name: tensor for name, tensor in base.items() if name not in injection.originals}
    return {name: tensor.detach() for name, tensor in left.items() if place(tensor) in before}


def composed(bank: AdapterBank, state: Mapping[str, Tensor]) -> list[Pair | None]:
    """The factors of every target, of whole tensors by their names where FSDP2 shards those of the
    bank: there parts do not mix with what is not sharded.
    """
    made = _Composed(bank)
    if not any(map(is_sharded, bank.parameters())):
        return made.forward()
    tensors = {f"bank.{name}": tensor for name, tensor in state.items()}
    found: list[Pair | None] = torch.func.functional_call(made, tensors, ())
    return found


class _Composed(nn.Module):
    """All factors of a bank, as a module to call with other tensors."""

    def __init__(self, bank: AdapterBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self) -> list[Pair | None]:
        return [self.bank.factors(i) for i in range(len(self.bank.targets))]


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
                "the adapters are merged into the weights: call loradrop.remove(model)"
            )


def require_trained(model: nn.Module) -> None:
    """Raises ValueError inside of `disabled`, where modules that are trained whole have the values
    of before.
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
                "set: do this before the model is dispatched, or take the hooks off first "
                "(accelerate.hooks.remove_hook_from_module(model, recurse=True))"
            )


def plan_of(model: nn.Module) -> Plan:
    """The plan of an injected model: what `fit` or `load` recorded, with today's assignment."""
    model = inner(model)
    bank, injection = bank_of(model), injection_of(model)
    now: dict[str, Any] = {"assignment": bank.assignment, "parameters": bank.trainable}
    now["facts"] = dict(injection.config.method.facts(bank))
    if injection.plan is not None:
        return replace(injection.plan, **now)
    scores = None if injection.scores is None else injection.scores.to_dict()
    with injected(model) as own:
        base = base_of(own) | classes_of(own)
    return Plan(config=injection.config, scores=scores, base=base, versions=versions(), **now)


def classes_of(model: nn.Module) -> dict[str, Any]:
    """What the config of a classifier says of its classes: `labels`, their names where they have
    some, and `problem_type` where it is not one class each, which a forward sets by itself. Apart
    from `base_of`, which a run that resumes must have as before.
    """
    config = getattr(model, "config", None)
    if "Classification" not in type(model).__name__:
        return {}
    names = getattr(config, "id2label", None) or {}
    labels = [names[i] for i in range(len(names)) if i in names]
    named = len(labels) == len(names) and labels != [f"LABEL_{i}" for i in range(len(labels))]
    kind = getattr(config, "problem_type", None)
    found = {"labels": labels if named else None}
    found["problem_type"] = None if kind == "single_label_classification" else kind
    return {key: value for key, value in found.items() if value}


def tell_base(what: Any, there: Mapping[str, Any], model: nn.Module) -> None:
    """One line where an adapter that fits was trained on another base than `model`, by what its
    plan or its configuration says of that. Names and shapes of tensors, which are compared, do not
    tell models of one family apart.
    """
    here, name = base_of(model), there.get("id")
    before, now = there.get("revision"), here["revision"]
    if there.get("fingerprint") not in (None, here["fingerprint"]):
        differ = "whose tensors are not all those of this model; its targets fit"
        _log.warning("%s was trained on %s, %s", what, name, differ)
    elif name and here["id"] and Path(str(name)).name != Path(str(here["id"])).name:
        _log.warning(
            "%s was trained on %s, and this model is %s: its tensors have the same shapes, but an "
            "adapter of another model is noise", what, name, here["id"],
        )  # fmt: skip
    elif name and before and now and before != now:
        _log.warning(
            "%s was trained on %s at revision %s, and this model is of revision %s: "
            "from_pretrained takes revision=", what, name, before, now,
        )  # fmt: skip


def base_of(model: nn.Module) -> dict[str, Any]:
    """Class, id and revision of a model where its config has them, and its tensors' fingerprint, of
    names and shapes alone.
    """
    config = getattr(model, "config", None)
    own = {k: v for k, v in tensors_of(model).items() if not k.startswith("lora_bank.")}
    shapes = [(key, tuple(value.shape)) for key, value in own.items()]
    return {
        "class": type(model).__name__,
        "id": getattr(config, "_name_or_path", None),
        "revision": getattr(config, "_commit_hash", None),
        "fingerprint": hashlib.sha256(repr(sorted(shapes)).encode()).hexdigest(),
    }
