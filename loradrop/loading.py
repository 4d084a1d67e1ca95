"""Loading: the adapters of a native file, or of a PEFT folder, into a model."""

import logging
import os
import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loradrop.adapters import tied_in
from loradrop.bank import AdapterBank, bank_of, execution_device, has_bank
from loradrop.config import LoRAConfig
from loradrop.formats import peft_load
from loradrop.injection import injection_of, require_loaded, require_unmerged, sum_of
from loradrop.layers import shape_of
from loradrop.native import NativeFile, is_native, read
from loradrop.origin import base_of, classes_of, tell_base
from loradrop.ranks import sharded_like
from loradrop.surgery import inject, require_trainable
from loradrop.wrapped import modules_of, of_inner, tensors_of

_log = logging.getLogger(__name__)


@of_inner
def load(model: nn.Module, path: str | os.PathLike[str]) -> AdapterBank:
    """Put the adapters in the folder `path` into `model`, injecting them where it has none.

    `save` wrote them, or PEFT, or our `export` in PEFT's format: then every target has its own
    pair. Returns the bank. Raises ValueError for a file that is damaged, newer, a pickle, or of
    another model (which tensors differ), for an adapter of PEFT that is not plain LoRA, and for a
    model on the meta device.
    """
    if execution_device(*model.modules()) is None and any(p.is_meta for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is on the meta device, where no adapter can have values: give "
            "it memory and its own weights first (to_empty, load_state_dict), and load then"
        )
    file = _read(path, model)
    plan = file.plan
    require_trainable(model, file.trained)
    _require_fit(model, file, path)
    peft_load.require_untied(tensors_of(model, keep_vars=True), file.trained)
    _require_tied_alike(model, file, path)
    if not has_bank(model):  # the targets themselves are compared below
        exact = "|".join(re.escape(target.name) for target in plan.targets)
        inject(model, replace(plan.config, strict=False, target_modules=exact))
        injection_of(model).config = plan.config
    bank, injection = bank_of(model), injection_of(model)
    require_unmerged(model)
    here, there = ({target.name for target in x.targets} for x in (bank, plan))
    if here != there:
        raise ValueError(
            f"{path} adapts other targets than the model ({', '.join(sorted(here ^ there)[:5])} "
            "differ): call loradrop.remove(model) first"
        )
    if differing := differences(injection.config, plan.config, sorted(here)):
        raise ValueError(
            f"{path} was trained with {differing} than the model was injected with: "
            "call loradrop.remove(model) first"
        )
    tell_base(path, plan.base, model)
    base = {**base_of(model), **classes_of(model), **plan.base}
    fill(model, file._replace(plan=replace(plan, base=base)))
    return bank


def _read(path: str | os.PathLike[str], model: nn.Module) -> NativeFile:
    """The file in the folder, ours before PEFT's."""
    foreign = not is_native(path) and peft_load.is_peft(path)
    return peft_load.read(path, model) if foreign else read(path)


def differences(here: LoRAConfig, there: LoRAConfig, names: list[str]) -> str:
    """Which options of two configurations give adapters that cannot stand for each other."""
    if here == there:
        return ""
    found = []
    if here.method.name != there.method.name:
        found.append(f"another method ({there.method.name}, not {here.method.name})")
    else:
        mine = here.method.composition
        for option, value in there.method.composition.items():
            if value != mine[option]:
                found.append(f"another {option} ({value!r}, not {mine[option]!r})")
    if any(here.rank(name) != there.rank(name) for name in names):
        found.append("another rank (r or rank_pattern)")
    if any(here.scaling(name) != there.scaling(name) for name in names):
        found.append("another scale (lora_alpha, alpha_pattern or use_rslora)")
    return " and ".join(found)


@torch.no_grad()
def fill(model: nn.Module, file: NativeFile) -> None:
    """Give an injected model the adapters, the trained tensors and the plan of `file`."""
    injection, base = injection_of(model), tensors_of(model, keep_vars=True)
    require_loaded({name: base[name] for name in file.trained})
    bank = bank_of(model)
    bank.restore(file.plan.assignment, file.bank)
    for name in injection.originals.keys() - file.trained.keys():  # of an adapter before this one
        before, now = injection.originals[name], base.get(name)
        if now is not None and now.shape == before.shape and not (now.is_meta or before.is_meta):
            now.copy_(sharded_like(before, now))
            if injection.plan is not None:  # it was trained whole for that adapter alone
                del injection.originals[name]
                now.requires_grad_(False)
    for name, value in file.trained.items():
        injection.originals.setdefault(name, base[name].detach().clone())
        base[name].copy_(sharded_like(value, base[name]))
        if isinstance(base[name], nn.Parameter):
            base[name].requires_grad_(True)
    injection.plan, injection.stepped = file.plan, False
    injection.scores = None  # of the adapters that were there
    injection.start = sum_of(bank) if injection.config.method.acts else None


def _require_tied_alike(model: nn.Module, file: NativeFile, path: Any) -> None:
    """Raises ValueError for a tensor trained whole that is tied to others than as it was saved."""
    here = tied_in(model, file.trained)
    if file.tied is None or here is None:
        return
    for name in file.trained:
        now, then = set(here.get(name, ())), set(file.tied.get(name, ()))
        if more := sorted(now - then):
            raise ValueError(
                f"{more[0]} is the same tensor as {name} in this model, and was apart where {path} "
                f"was saved: {peft_load.how_to_untie(name)}"
            )
        if less := sorted(then - now):
            raise ValueError(
                f"{less[0]} was the same tensor as {name} where {path} was saved, and is apart in "
                "this model, so it would stay as it is: tie them as they were, "
                f"model.{less[0]} = model.{name}"
            )


def _require_fit(model: nn.Module, file: NativeFile, path: Any) -> None:
    plan, modules, state = file.plan, modules_of(model), tensors_of(model)
    wrong = []
    for target in plan.targets:
        module = modules.get(target.name)
        here = None if module is None else shape_of(module)
        if here != (target.in_features, target.out_features):
            found = "not there" if here is None else f"{here[0]} -> {here[1]}"
            wanted = f"{target.in_features} -> {target.out_features}"
            wrong.append(f"{target.name}: {wanted} in the file, {found} in the model")
    for name, value in file.trained.items():
        if name not in state or state[name].shape != value.shape:
            shape = tuple(state[name].shape) if name in state else "not there"
            wrong.append(f"{name}: {tuple(value.shape)} in the file, {shape} in the model")
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" * (len(wrong) > 8)
        base = plan.base.get("id") or plan.base.get("class") or "which it does not name"
        what = f"{path} is an adapter for another model ({base})"
        raise ValueError(f"{what}. These differ:\n  " + "\n  ".join(wrong[:8]) + more)
