"""Folding the adapters into the weights, plain or quantised."""

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loradrop.bank import bank_of
from loradrop.injection import (
    injection_of,
    require_adapted,
    require_loaded,
    require_own,
    require_trained,
)
from loradrop.layers import as_weight, is_plain
from loradrop.quantised import Format, Stored, format_of, kept, put
from loradrop.remarks import tell_untouched
from loradrop.scores import Target
from loradrop.surgery import require_undoable, strip
from loradrop.wrapped import of_inner

_log = logging.getLogger(__name__)


class Requantised(NamedTuple):
    """‖Q(W + s·B·A) − (W + s·B·A)‖ of a quantised weight, over ‖W + s·B·A‖ and over ‖s·B·A‖.

    An error beyond 1 of the delta means that rounding changed the weight more than training did.
    """

    of_weight: float
    of_delta: float


class Change(NamedTuple):
    """What a merge does to a target: what its layer holds, and what it is to hold."""

    name: str
    module: nn.Module
    stored: Stored
    new: Stored
    error: Requantised | None = None


@of_inner
@torch.no_grad()
def merge(model: nn.Module, *, keep_original: bool = False) -> dict[str, Requantised]:
    """Fold every delta into its weight: W <- W + s·B·A in float32, rounded once.

    A quantised weight is dequantised for it and quantised again with its own settings: bitsandbytes
    (int8, NF4, FP4) and torchao (int8, float8 and intx, weights only). Returns the error that this
    makes, by the target's name; a plain model has none, {}.

    The adapters are gone afterwards and the layers are what they were before `inject`. With
    `keep_original` the original weights are kept beside the adapters, and `remove` restores them
    bit for bit. Raises ValueError, before any weight changes, for a weight that is neither a plain
    matrix nor of these formats and for a merged weight that is not finite.
    """
    require_own(model, "call model.merge_and_unload(), or model.merge_adapter() to undo it later")
    bank, injection = bank_of(model), injection_of(model)
    if injection.merged is not None:
        raise ValueError("the adapters are merged already")
    require_undoable(model)
    tell_untouched(model)
    # Computed twice, so that all are known to be finite and no second copy of the model is held.
    for _ in changes(model):
        pass
    originals: dict[str, Stored] = {}
    errors: dict[str, Requantised] = {}
    for change in changes(model):
        if keep_original:
            originals[change.name] = kept(change.stored)
        put(change.module, change.new)
        if change.error is not None:
            errors[change.name] = change.error
    tell(errors)
    if keep_original:
        injection.merged, bank.enabled, bank.merged = originals, False, True
        return errors
    strip(model)
    model._loradrop_merged = True  # type: ignore[assignment]
    return errors


def tell(errors: Mapping[str, Requantised]) -> None:
    """Log what quantising again has cost, where anything was."""
    if not errors:
        return
    worst = max(errors, key=lambda name: errors[name].of_delta)
    _log.warning(
        "%d merged weights were quantised again: off by up to %.2g of the weight, and by up to "
        "%.2g of what training changed (%s). Where that is much, serve the adapters unmerged",
        len(errors), max(e.of_weight for e in errors.values()), errors[worst].of_delta, worst,
    )  # fmt: skip


@torch.no_grad()
def changes(model: nn.Module) -> Iterator[Change]:
    """What `merge` does, W + s·B·A in float32 rounded once, one target after another.

    Targets without an adapter are left out. Raises ValueError as `merge`: for a weight that cannot
    be merged before the first, for one that is not finite when it comes.
    """
    bank = bank_of(model)
    require_adapted(model)
    require_trained(model)
    found = [_weight(model, target) for target in bank.targets]
    for i, (target, weight) in enumerate(zip(bank.targets, found, strict=True)):
        delta, module = bank.delta(i), model.get_submodule(target.name)
        if delta is None:
            continue
        if isinstance(weight, Tensor):
            delta = as_weight(module, delta).to(weight.device)
            wide = torch.promote_types(weight.dtype, delta.dtype)
            new = (weight.to(wide) + delta).to(weight.dtype)
            _require_finite(new, target.name, weight.dtype)
            yield Change(target.name, module, weight, new)
        else:
            yield _requantised(target.name, module, weight, delta)


def _requantised(name: str, module: nn.Module, form: Format, delta: Tensor) -> Change:
    old = form.dense(form.stored)
    delta = delta.to(old.device)
    wanted = old + delta
    new = form.again(wanted.float())
    made = form.dense(new)
    _require_finite(made, name, "its quantised format")
    lost, sizes = (made - wanted).norm(), (wanted.norm(), delta.norm())
    error = Requantised(*(float(lost / size) if size else float(lost) for size in sizes))
    return Change(name, module, form.stored, new, error)


def _require_finite(merged: Tensor, name: str, where: object) -> None:
    if not merged.isfinite().all():
        raise ValueError(
            f"the merged weight of {name} is not finite in {where}: its training "
            "diverged, or the dtype is too narrow. Train again, or merge into a wider dtype"
        )


_ELSEWHERE = (
    "save the adapters with loradrop.save, dequantise the base model or load it unquantised, "
    "loradrop.load them into it, and merge there"
)


def _weight(model: nn.Module, target: Target) -> Tensor | Format:
    """The target's weight, which can be merged."""
    module = model.get_submodule(target.name)
    weight = getattr(module, "weight", None)
    elements = target.in_features * target.out_features
    if isinstance(weight, Tensor):
        require_loaded({f"{target.name}.weight": weight})
        if (form := format_of(module)) is not None:
            _require_untied(model, target, weight)
            return form
    floats = isinstance(weight, Tensor) and weight.is_floating_point()
    if not isinstance(weight, Tensor) or not floats or weight.numel() != elements:
        raise ValueError(
            f"{target.name} is a {type(module).__name__} without a plain weight, in a format that "
            f"merge cannot quantise again: {_ELSEWHERE}"
        )
    if "weight" not in module._parameters:
        raise ValueError(
            f"the weight of {target.name} is computed whenever it is read (a parametrisation, "
            "weight or spectral normalisation, pruning), so a merge would be lost: make it a plain "
            "parameter first, as torch.nn.utils.parametrize.remove_parametrizations does"
        )
    if type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"the weight of {target.name} is a {type(weight).__name__} and no plain matrix, nor in "
            f"a format that merge can quantise again: merge before it is sharded, or {_ELSEWHERE}"
        )
    if not is_plain(module):
        raise ValueError(
            f"{target.name} is a {type(module).__name__}, whose forward is its own and not "
            "xWᵀ + b: it cannot be merged"
        )
    _require_untied(model, target, weight)
    return weight


def _require_untied(model: nn.Module, target: Target, weight: Tensor) -> None:
    owners = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(owners) > 1:
        raise ValueError(
            f"the weight of {target.name} is tied ({', '.join(owners)}): merging would change them "
            "all. Untie them first, or leave it unmerged"
        )
