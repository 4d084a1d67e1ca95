"""`inject` puts the adapters in, `remove` takes them out."""

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from loradrop import methods
from loradrop.bank import AdapterBank, bank_of, execution_device, has_bank, parts_with_banks
from loradrop.config import LoRAConfig, require_config
from loradrop.injection import (
    Injection,
    injection_of,
    require_adapted,
    require_loaded,
    require_own,
    sum_of,
    trained_since,
)
from loradrop.layers import adapt, build_bank, freeze, is_extended, is_patched, restore
from loradrop.matching import find_targets, inside, kinds_of, saved_modules
from loradrop.quantised import keep_unpacked, packed, put, without_gradients
from loradrop.ranks import ZERO_3, is_partitioned, is_sharded
from loradrop.save_pretrained import SavePart, SavePretrained
from loradrop.wrapped import modules_of, of_inner, own_name, parameters_of, tensors_of

_log = logging.getLogger(__name__)


@of_inner
def inject(model: nn.Module, config: LoRAConfig) -> AdapterBank:
    """Adapt the linear layers that `config` names, in place, and freeze the rest. Returns the bank.

    The model computes what it did before, since B starts at zero. Modules of `modules_to_save` stay
    trainable. Raises ValueError for targets that cannot be adapted (a table of what matched), ranks
    beyond min(in_features, out_features), quantised weights in modules that are to be trained
    whole, and models that already carry adapters; TypeError for a configuration of PEFT.
    """
    require_config(config)
    methods.require_own_name(config.method)
    name, modules = type(model).__name__, list(model.modules())
    of_peft = getattr(model, "peft_config", None) is not None
    if of_peft or any(hasattr(module, "lora_A") for module in modules):
        raise ValueError(
            f"{name} carries PEFT adapters: merge or unload them first. loradrop's own layers and "
            "PEFT's do not mix; loradrop.integrations.peft has both for PEFT's, LoraDropConfig and "
            "accelerate_peft"
        )
    if parts := parts_with_banks(model):
        where = f"{name}'s part {parts[0]!r}" if parts[0] else name
        of = f"model.{parts[0]}" if parts[0] else "model"
        raise ValueError(f"{where} is injected already: call loradrop.remove({of}) first")
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            f"{name} is sharded (its parameters are DTensors), and the adapters would not be: "
            "inject first, and call fully_shard afterwards. Tensor parallelism is not served"
        )
    if any(map(is_partitioned, model.parameters())):
        raise ValueError(ZERO_3)
    _require_no_saver(model)
    config.require_plain()
    found = find_targets(model, config)
    trained = saved_modules(model, config)
    require_trainable(model, trained)
    if execution_device(*modules) is not None:
        whole = (n for n, _ in model.named_parameters() if any(inside(n, part) for part in trained))
        require_loaded({name: model.get_parameter(name) for name in whole})
    bank = build_bank(config, found, model)
    injection = Injection(config, requires_grad=freeze(model))
    for prefix in trained:
        part = model.get_submodule(prefix)
        for key, tensor in part.state_dict(prefix=prefix + ".").items():
            injection.originals[own_name(key)] = tensor.detach().clone()
        part.requires_grad_(True)
    injection.buffers = _moving_buffers(model, [name for name, _ in found])
    for i, (target, module) in enumerate(found):
        adapt(module, bank, i)
        injection.attributes += [(target, *changed) for changed in keep_unpacked(module)]
    injection.attributes += _avoid_fused_paths(model, bank)
    injection.attributes += _hold_statistics(model, trained)
    injection.start = sum_of(bank) if config.method.acts else None
    model.lora_bank, model._lora_injection = bank, injection  # type: ignore[assignment]
    if hasattr(model, "save_pretrained"):
        own = model.__dict__.get("save_pretrained")
        model.save_pretrained = SavePretrained(model, own)  # type: ignore[assignment]
    for name, part in _savers(model, bank):
        part.save_pretrained = SavePart(part, name)  # type: ignore[assignment]
    _tell_of_meta(bank)
    if (reason := without_gradients(model)) is not None:
        _log.warning("%s", reason)
    kinds = kinds_of(target.name for target in bank.targets)
    _log.info("adapted %s; trained whole: %s", kinds, ", ".join(trained) or "nothing")
    return bank


def require_trainable(model: nn.Module, whole: Collection[str]) -> None:
    """Raises ValueError where `whole`, names of modules and tensors, has a quantised weight."""
    weights = packed(model)
    found = [part for part in whole if any(inside(name, part) for name in weights)]
    if found:
        name = next(name for name in weights if inside(name, found[0]))
        modules = sorted({part.rpartition(".")[0] if part in weights else part for part in found})
        raise ValueError(
            f"{name} is quantised ({type(weights[name]).__name__} of {weights[name].dtype}), and "
            f"cannot be trained whole: quantise the base model without {modules} "
            "(llm_int8_skip_modules of BitsAndBytesConfig, modules_to_not_convert of "
            "TorchAoConfig), or train adapters alone, with modules_to_save=[]"
        )


def _savers(model: nn.Module, bank: AdapterBank) -> Iterator[tuple[str, nn.Module]]:
    """The parts of the model that have targets in them and save themselves."""
    for name, part in modules_of(model).items():
        saves = name and hasattr(type(part), "save_pretrained")
        if saves and any(inside(target.name, name) for target in bank.targets):
            yield name, part


def _moving_buffers(model: nn.Module, targets: list[str]) -> dict[str, Tensor]:
    """Copies of the buffers that training may change, as running means. Those of targets, and of
    integers, are weights in a format of their own.
    """
    return {
        own_name(name): buffer.clone()
        for name, buffer in model.named_buffers()
        if (buffer.ndim == 0 or (buffer.is_floating_point() and buffer.itemsize > 1))
        and not any(inside(own_name(name), target) for target in targets)
    }


def _require_no_saver(model: nn.Module) -> None:
    """Raises ValueError for a chain that saves itself link by link: the bank would be a link."""
    saves = any(callable(getattr(model, name, None)) for name in ("save", "save_pretrained"))
    if isinstance(model, nn.Sequential) and saves:
        inner = (n for n, m in model.named_modules() if n and hasattr(m, "save_pretrained"))
        path = re.sub(r"\.(\d+)", r"[\1]", f"model.{next(inner, '0')}")
        raise ValueError(
            f"{type(model).__name__} is a chain with a save of its own, to which the adapters "
            f"would be one more link: inject its inner model, {path}"
        )


def _tell_of_meta(bank: AdapterBank) -> None:
    """One line for adapters without values, of a model that has none itself."""
    if bank.device.type == "meta":
        _log.warning(
            "the model is on the meta device, and so are the adapters: once they have memory "
            "(to_empty), call reset_parameters() of every module in model.lora_bank that has it, "
            "or loradrop.load; or inject once the model has its weights"
        )


# What makes nn.TransformerEncoder and its layers call their linear layers also in eval mode.
_UNFUSED = {
    nn.TransformerEncoder: ("use_nested_tensor", False),
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
}


def _avoid_fused_paths(model: nn.Module, bank: AdapterBank) -> list[tuple[str, str, Any]]:
    """The fused inference path of `nn.TransformerEncoder` reads weights and would skip adapters.

    Returns (module, attribute, value before) of what was changed.
    """
    changed: list[tuple[str, str, Any]] = []
    for name, module in model.named_modules():
        for kind, (attribute, value) in _UNFUSED.items():
            within = any(not name or inside(target.name, name) for target in bank.targets)
            if isinstance(module, kind) and within and hasattr(module, attribute):
                changed.append((name, attribute, getattr(module, attribute)))
                setattr(module, attribute, value)
    return changed


def _hold_statistics(model: nn.Module, trained: Sequence[str]) -> list[tuple[str, str, Any]]:
    """Keep the running means of frozen BatchNorms as they are: no file of adapters would hold what
    training makes of them. One warning, since training still normalises by its batches.

    Returns (module, attribute, value before) of what was changed.
    """
    changed: list[tuple[str, str, Any]] = []
    for name, module in model.named_modules():
        moves = isinstance(module, _BatchNorm) and module.track_running_stats
        if moves and not any(inside(name, part) for part in trained):
            changed.append((name, "track_running_stats", True))
            module.track_running_stats = False  # in training; eval goes by the means that are there
    if changed:
        _log.warning(
            "the running means of %s stay as they are, as the base is frozen: to train and save "
            "them, name these modules in modules_to_save",
            ", ".join(own_name(name) for name, *_ in changed[:3]) + ", ..." * (len(changed) > 3),
        )
    return changed


@of_inner
@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as before `inject`, also where modules are trained whole.

    Raises ValueError while the adapters are merged, and for a module trained whole that is
    offloaded, sharded or resized.
    """
    require_own(model, "use `with model.disable_adapter():`")
    bank, injection = bank_of(model), injection_of(model)
    if injection.merged is not None:
        raise ValueError("the adapters are merged: call loradrop.remove(model) for the base model")
    tensors = tensors_of(model, keep_vars=True)
    whole = {name: tensors[name] for name in injection.originals if name in tensors}
    require_loaded(whole)
    for name, tensor in whole.items():
        if tensor.shape != injection.originals[name].shape or is_sharded(tensor):
            raise ValueError(f"{name} was resized or sharded since inject: it cannot be set back")
    before, trained = bank.enabled, [(tensor, tensor.data) for tensor in whole.values()]
    try:
        bank.enabled = False
        with torch.inference_mode(False):
            for name, tensor in whole.items():  # another storage: graphs made outside stay whole
                tensor.data = injection.originals[name].to(tensor, copy=True)
        yield
    finally:
        bank.enabled = before
        for tensor, data in trained:
            tensor.data = data


@of_inner
@torch.no_grad()
def remove(model: nn.Module) -> None:
    """Restore the model that `inject` was given, bit for bit, and forget the adapters.

    Raises ValueError for a model without adapters, or whose adapters were merged without
    `keep_original`.
    """
    require_own(model, "call model.unload(), which returns the base model")
    if getattr(model, "_loradrop_merged", False) and not has_bank(model):
        raise ValueError(
            "the adapters were merged without keep_original=True, so the original weights are gone:"
            " load the base model again"
        )
    injection = injection_of(model)
    require_undoable(model)
    tensors = {own_name(name): buffer for name, buffer in model.named_buffers()}
    tensors |= tensors_of(model, keep_vars=True)
    before = injection.originals | injection.buffers
    merged = injection.merged or {}
    before |= {f"{n}.weight": weight for n, weight in merged.items() if isinstance(weight, Tensor)}
    here = {name: tensors[name] for name in before if name in tensors}
    require_loaded(here)
    fit = [n for n, t in here.items() if t.shape == before[n].shape and not before[n].is_meta]
    lost = [name for name in injection.originals if name not in fit]
    if lost := [*lost, *trained_since(model)]:
        _log.warning("not as before inject, resized or trained since: %s", ", ".join(lost))
    for name in fit:
        here[name].copy_(before[name])
    for name, stored in merged.items():
        if not isinstance(stored, Tensor):
            put(model.get_submodule(name), stored)
    strip(model)
    for name, parameter in parameters_of(model).items():
        parameter.requires_grad_(injection.requires_grad.get(name, parameter.requires_grad))


def require_undoable(model: nn.Module) -> None:
    """Raises ValueError unless every target can get back the class that it had."""
    require_adapted(model)
    for target in bank_of(model).targets:
        if is_patched(model.get_submodule(target.name)):
            raise ValueError(
                f"{target.name} has a forward of its own, set on the instance after inject, which "
                "would go on calling the adapter: take it off first (del module.forward)"
            )
        if is_extended(model.get_submodule(target.name)):
            kind = type(model.get_submodule(target.name)).__name__
            raise ValueError(
                f"{target.name} is a {kind} now, a class that another library made of the adapted "
                "layer's after inject, as parametrizations and fully_shard of a layer do: undo "
                "that first (torch.nn.utils.parametrize.remove_parametrizations)"
            )


def strip(model: nn.Module) -> None:
    """Take the adapters out and leave the weights as they are."""
    injection, bank = injection_of(model), bank_of(model)
    bank.stop_collecting()
    for target in bank.targets:
        restore(model.get_submodule(target.name))
    for name, attribute, value in injection.attributes:
        setattr(model.get_submodule(name), attribute, value)
    for _, part in _savers(model, bank):
        part.__dict__.pop("save_pretrained", None)
    del model.lora_bank, model._lora_injection
    saver = model.__dict__.pop("save_pretrained", None)
    if isinstance(saver, SavePretrained) and saver.own is not None:
        model.save_pretrained = saver.own  # type: ignore[assignment]
