"""Model surgery: `inject` puts the adapters in, `merge` folds them into the weights, `remove`
restores the model.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loradrop.bank import AdapterBank, Target, bank_of
from loradrop.config import LoRAConfig
from loradrop.formats.native import SavePretrained
from loradrop.layers import adapt, is_conv1d, is_plain, restore, shape_of, weight_of
from loradrop.matching import Matched, find_targets, saved_modules

_log = logging.getLogger(__name__)


def inject(model: nn.Module, config: LoRAConfig) -> AdapterBank:
    """Adapt the linear layers that `config` names, in place, and freeze the rest. Returns the bank.

    The model computes what it did before, since B starts at zero. Modules of `modules_to_save` stay
    trainable. Raises ValueError for targets that cannot be adapted (a table of what matched), ranks
    beyond min(in_features, out_features), and models that already carry adapters.
    """
    of_peft = getattr(model, "peft_config", None) is not None
    if of_peft or any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} carries PEFT adapters: merge or unload them first. "
            "loradrop's own layers and PEFT's do not mix"
        )
    if any(isinstance(module, AdapterBank) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is injected already: call loradrop.remove(model) first"
        )
    found = find_targets(model, config)
    saved = saved_modules(model, config)
    bank = attach(model, config, found, saved)
    kinds: dict[str, int] = {}
    for target in bank.targets:
        kinds[target.kind] = kinds.get(target.kind, 0) + 1
    _log.info(
        "adapted %s; trained whole: %s",
        ", ".join(f"{k} ({n})" for k, n in kinds.items()),
        ", ".join(saved) or "nothing",
    )
    return bank


def attach(
    model: nn.Module, config: LoRAConfig, found: Matched, saved: list[str] | None = None
) -> AdapterBank:
    """`inject` for modules already found: `found` as (name, module), `saved` names to train
    whole.
    """
    targets = [_target(name, module, config) for name, module in found]
    bank = AdapterBank(targets, config, [weight_of(module) for _, module in found])
    for name, parameter in model.named_parameters():
        bank.surgery.requires_grad[name] = parameter.requires_grad
        parameter.requires_grad_(False)
    for prefix in saved or []:
        part = model.get_submodule(prefix)
        for name, tensor in part.state_dict(prefix=prefix + ".").items():
            bank.surgery.saved[name] = tensor.detach().clone()
        part.requires_grad_(True)
    bank.surgery.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for i, (_, module) in enumerate(found):
        adapt(module, bank, i)
    _avoid_fused_paths(model, bank)
    model.lora_bank = bank
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = SavePretrained(model)  # type: ignore[assignment]
    return bank


# What makes nn.TransformerEncoder and its layers call their linear layers also in eval mode.
_UNFUSED = {
    nn.TransformerEncoder: ("use_nested_tensor", False),
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
}


def _avoid_fused_paths(model: nn.Module, bank: AdapterBank) -> None:
    """The fused inference path of `nn.TransformerEncoder` reads weights and would skip adapters."""
    for name, module in model.named_modules():
        for kind, (attribute, value) in _UNFUSED.items():
            inside = any(
                target.name.startswith(f"{name}." if name else "") for target in bank.targets
            )
            if isinstance(module, kind) and inside and hasattr(module, attribute):
                bank.surgery.attributes.append((name, attribute, getattr(module, attribute)))
                setattr(module, attribute, value)


def _target(name: str, module: nn.Module, config: LoRAConfig) -> Target:
    shape = shape_of(module)
    assert shape is not None
    r = config.rank(name)
    if r > min(shape):
        raise ValueError(
            f"r={r} for {name} ({shape[0]} -> {shape[1]}): a rank beyond {min(shape)} adds nothing."
            f" Choose r <= {min(shape)}, or a rank_pattern"
        )
    return Target(name, name.rpartition(".")[2], *shape, r)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes without its adapters. Raises ValueError while they are merged."""
    bank = bank_of(model)
    if bank.surgery.merged is not None:
        raise ValueError(
            "the adapters are merged into the weights: "
            "call loradrop.remove(model) for the base model"
        )
    before, bank.enabled = bank.enabled, False
    try:
        yield
    finally:
        bank.enabled = before


@torch.no_grad()
def merge(model: nn.Module, *, keep_original: bool = False) -> None:
    """Fold every delta into its weight: W <- W + s·B·A in float32, rounded once.

    The adapters are gone afterwards and the layers are what they were before `inject`. With
    `keep_original` the original weights are kept beside the adapters, and `remove` restores them
    bit for bit. Raises ValueError for a base whose weight is no plain matrix (a quantised layer).
    """
    bank = bank_of(model)
    if bank.surgery.merged is not None:
        raise ValueError("the adapters are merged already")
    originals: dict[str, Tensor] = {}
    for name, weight, merged in folded(model):
        if keep_original:
            originals[name] = weight.detach().clone()
        weight.copy_(merged)
    if keep_original:
        bank.surgery.merged, bank.enabled = originals, False
        return
    _strip(model, bank)
    model._loradrop_merged = True  # type: ignore[assignment]


@torch.no_grad()
def folded(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(a target's name, its weight, W + s·B·A in float32 rounded once), one after another.

    Targets without an adapter are left out. Raises ValueError as `merge`, before the first.
    """
    bank = bank_of(model)
    weights = {target.name: _plain_weight(model, target) for target in bank.targets}
    for i, (name, weight) in enumerate(weights.items()):
        delta = bank.delta(i)
        if delta is not None:
            transposed = is_conv1d(model.get_submodule(name))
            delta = (delta.T if transposed else delta).to(weight.device)
            wide = torch.promote_types(weight.dtype, delta.dtype)
            yield name, weight, (weight.to(wide) + delta).to(weight.dtype)


def _plain_weight(model: nn.Module, target: Target) -> Tensor:
    module = model.get_submodule(target.name)
    weight, elements = module.weight, target.in_features * target.out_features
    floats = isinstance(weight, Tensor) and weight.is_floating_point()
    if not isinstance(weight, Tensor) or not floats or weight.numel() != elements:
        raise ValueError(
            f"{target.name} is a {type(module).__name__} without a plain weight: "
            "dequantise the model before merging"
        )
    if not is_plain(module):
        raise ValueError(
            f"{target.name} is a {type(module).__name__}, whose forward is its own and not "
            "xWᵀ + b: it cannot be merged"
        )
    owners = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(owners) > 1:
        raise ValueError(
            f"the weight of {target.name} is tied ({', '.join(owners)}): merging would change them "
            "all. Untie them first, or leave it unmerged"
        )
    return weight


@torch.no_grad()
def remove(model: nn.Module) -> None:
    """Restore the model that `inject` was given, bit for bit, and forget the adapters.

    Raises ValueError for a model without adapters, or whose adapters were merged without
    `keep_original`.
    """
    injected = isinstance(getattr(model, "lora_bank", None), AdapterBank)
    if getattr(model, "_loradrop_merged", False) and not injected:
        raise ValueError(
            "the adapters were merged without keep_original=True, so the original weights are gone:"
            " load the base model anew"
        )
    bank = bank_of(model)
    for name, weight in (bank.surgery.merged or {}).items():
        model.get_submodule(name).weight.copy_(weight)  # type: ignore[operator]
    tensors = model.state_dict(keep_vars=True)
    for name, original in (bank.surgery.saved | bank.surgery.buffers).items():
        if name in tensors:
            tensors[name].copy_(original)
    _strip(model, bank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bank.surgery.requires_grad[name])


def _strip(model: nn.Module, bank: AdapterBank) -> None:
    for target in bank.targets:
        restore(model.get_submodule(target.name))
    for name, attribute, value in bank.surgery.attributes:
        setattr(model.get_submodule(name), attribute, value)
    del model.lora_bank
    model.__dict__.pop("save_pretrained", None)
