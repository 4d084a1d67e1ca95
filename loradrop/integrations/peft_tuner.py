"""The tuner of LORADROP: PEFT finds the targets and makes its layers, a bank owns the adapters.

Each adapter of a PeftModel has a bank, `lora_banks[name]`, at the root beside the base model. The
layers hold references into it, so a shared adapter is in the model, its state dict and its files
once, and accelerate, FSDP2 and safetensors see no aliases.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from loradrop.bank import AdapterBank
from loradrop.formats.peft_file import BANK
from loradrop.injection import Injection, plan_of
from loradrop.integrations.peft_config import LoraDropConfig, from_peft
from loradrop.integrations.peft_layers import Banked, is_linear
from loradrop.integrations.peft_view import viewed
from loradrop.layers import adapted_class, become, build_bank
from loradrop.matching import heads, inside
from loradrop.origin import tell_base
from loradrop.pairs import LoRABank, fresh
from loradrop.plan import Plan
from loradrop.plan_file import plan_at
from loradrop.remarks import unmeasured
from loradrop.scores import Assignment
from loradrop.wrapped import modules_of

_log = logging.getLogger(__name__)
_Tuner: Any = LoraModel  # PEFT types it as a model that it is not at run time
_UNMEASURED = (
    "LoraDropConfig decides after a warm-up, and none was made, so what is saved is plain LoRA: "
    "pass callbacks=[loradrop.LoraDropCallback()] to the Trainer; or train a little, and call "
    "loradrop.probe and loradrop.share; or give plan=; or use peft.LoraConfig"
)
_RESERVED = ("A", "B", "pairs", "_extra_state")  # PEFT would take tensors of a bank for theirs


class LoraDropModel(_Tuner):  # type: ignore[misc]
    """What `get_peft_model(model, LoraDropConfig(...))` puts around the base model."""

    uses_shared_state = True
    model: nn.Module
    lora_banks: nn.ModuleDict
    injections: dict[str, Injection]

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False, state_dict: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """As PEFT's: layers for the targets of the configuration, then a bank for all of them.

        Raises ValueError for a module that is not a linear layer, a rank beyond its sizes, and a
        plan that does not fit.
        """
        if adapter_name in _RESERVED or adapter_name.isdecimal():
            raise ValueError(
                f"adapter_name={adapter_name!r} is what tensors are called in a bank: choose "
                "another name"
            )
        if "lora_banks" not in self._modules:
            self.lora_banks, self.injections = nn.ModuleDict(), {}
        others = [(p, p.requires_grad) for p in self.lora_banks.parameters()]
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )
        for parameter, trains in others:  # as PEFT's own, which it looks for in the base model
            parameter.requires_grad_(trains)
        try:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._add_bank(adapter_name)
        except ValueError:
            for _, layer in self._layers(adapter_name):
                layer.delete_adapter(adapter_name)
            raise

    def _add_bank(self, name: str) -> None:
        config, layers = self.peft_config[name], self._layers(name)
        of_head = [key for key, _ in layers if any(inside(key, h) for h in heads(self.model))]
        if of_head and config.task_type is None:
            _log.warning(
                "%s is of the head, which is adapted like any layer and not trained whole: pass "
                'task_type, such as "SEQ_CLS", by which PEFT leaves it out and trains it',
                ", ".join(of_head),
            )
        own: Any = getattr(self.model, "config", None)
        unsaid = own is not None and getattr(own, "_commit_hash", None) is None
        if config.revision is not None and unsaid:
            own._commit_hash = config.revision  # transformers does not say which one it loaded
        ours = from_peft(config, [key for key, _ in layers])
        names, whole = [f".{key}" for key in modules_of(self.model)], config.modules_to_save or ()
        saved = [m for m in whole if any(name.endswith(f".{m}") for name in names)]
        ours = replace(ours, modules_to_save=saved)  # PEFT asks for heads of every spelling
        bank = build_bank(ours, layers, self.model)
        _start(bank, config.init_lora_weights)
        bank.adopts = True  # a folder is loaded before there is an optimiser
        twins = [n for n in self.lora_banks if self.peft_config[n] is config]
        plan = self._plan(twins[0]) if twins else config.plan  # TRL copies one as its reference
        if plan is not None:
            _decide(bank, config, plan)
        if twins and bank.assignment.decided:
            _log.warning(
                "the adapter %r shares as %r does, whose configuration it has: give it a copy "
                "(copy.copy), and a warm-up decides anew", name, twins[0],
            )  # fmt: skip
        for (_, layer), link in zip(layers, bank.links, strict=True):
            layer.link(name, link)
        bank.requires_grad_(name in self.active_adapters and not config.inference_mode)
        self.lora_banks[name], self.injections[name] = bank, Injection(ours)
        if isinstance(plan, Mapping) and not twins:  # a saved adapter has its plan with it
            with self._viewed(name) as base:
                tell_base(f"the adapter {name!r}", plan.get("base") or {}, base)

    def _layers(self, name: str | None = None) -> list[tuple[str, Any]]:
        """(name in the base model, layer) of the targets of an adapter, or of all."""
        found: list[tuple[str, Any]] = list(modules_of(self.model).items())
        return [
            (key, module)
            for key, module in found
            if isinstance(module, Banked) and (name is None or name in module.r)
        ]

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        made = _Tuner._create_new_module(lora_config, adapter_name, target, **kwargs)
        kind: Any = type(made)
        if not is_linear(kind):
            raise ValueError(
                f"{kwargs.get('target_name')} is a {type(target).__name__}, and LoraDropConfig "
                "serves linear layers, plain or of bitsandbytes or torchao: leave it out of "
                "target_modules, or name it in exclude_modules"
            )
        become(made, adapted_class(Banked, kind))
        made.update_layer(
            adapter_name, kwargs["r"], lora_alpha=kwargs["lora_alpha"], config=lora_config
        )
        return made

    def _active(self, what: str) -> str:
        names = self.active_adapters
        if len(names) != 1:
            raise ValueError(
                f"{what} is of one adapter, and active are {names}: call model.set_adapter(name)"
            )
        return str(names[0])

    @property
    def lora_bank(self) -> AdapterBank:
        """The bank of the active adapter, where `bank_of` looks for it."""
        bank = self.lora_banks[self._active("lora_bank")]
        assert isinstance(bank, AdapterBank)
        return bank

    @property
    def _lora_injection(self) -> Injection:
        return self.injections[self._active("the plan")]

    def loradrop_injected(self) -> AbstractContextManager[nn.Module]:
        """Inside, the base model as `loradrop.inject` would have left it, with the bank of the
        active adapter.

        Raises ValueError while adapters are merged into its weights.
        """
        name = self._active("this")
        if any(layer.merged for _, layer in self._layers()):
            raise ValueError("the adapters are merged: call model.unmerge_adapter() first")
        return self._viewed(name)

    def _viewed(self, name: str) -> AbstractContextManager[nn.Module]:
        bank: Any = self.lora_banks[name]
        return viewed(self.model, self._layers(), bank, self.injections[name], name)

    def _plan(self, name: str) -> dict[str, Any]:
        """The plan of an adapter as it is now, as plain data."""
        with self._viewed(name) as base:
            return plan_of(base).to_dict()

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, with its bank."""
        super().delete_adapter(adapter_name)
        del self.lora_banks[adapter_name], self.injections[adapter_name]

    @torch.no_grad()
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """float32, or the dtypes of the base's weights."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        bank: Any = self.lora_banks[adapter_name]
        for (_, layer), link in zip(self._layers(adapter_name), bank.links, strict=True):
            base = layer.get_base_layer()
            dtype = torch.float32 if autocast_adapter_dtype else _compute_dtype(base)
            for factor in link.factors() or ():
                if factor.dtype != dtype and factor.dtype != torch.float64:
                    factor.data = factor.data.to(dtype)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's. Of what it makes every layer has an adapter of its own.

        Raises ValueError for layers that none of the adapters has anything for any more.
        """
        config = self.peft_config.get(next(iter(adapters), None))
        self._require_something(adapters)
        before = None if config is None else config.plan
        if config is not None:  # PEFT makes the new configuration of it
            config.plan = [key for key, layer in self._layers() if {*adapters} & {*layer.r}]
        try:
            super().add_weighted_adapter(adapters, *args, **kwargs)
        finally:
            if config is not None:
                config.plan = before

    def _require_something(self, adapters: list[str]) -> None:
        known = [name for name in adapters if name in self.lora_banks]
        named: dict[str, bool] = {}
        for name in known:
            bank: Any = self.lora_banks[name]
            for (key, _), link in zip(self._layers(name), bank.links, strict=True):
                named[key] = named.get(key, False) or link.factors() is not None
        if lost := [key for key, has in named.items() if not has]:
            raise ValueError(
                f"{', '.join(adapters)} have no adapter for {', '.join(lost)} any more, and PEFT "
                "has nothing to combine there: loradrop.export them, and combine what PEFT loads"
            )

    # What PEFT asks of a tuner when it saves and loads

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: LoraDropConfig, adapter_name: str,
        state_dict: Mapping[str, Tensor], unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:  # fmt: skip
        """The tensors of the bank, each once; the plan goes into the configuration."""
        tuner: LoraDropModel = model.base_model
        with tuner._viewed(adapter_name) as base:
            plain = unmeasured(base) is not None
        config.record(tuner._plan(adapter_name), _UNMEASURED if plain else None)
        prefix = f"{BANK}{adapter_name}."
        found = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        found.update(cls._get_learnable_bias_state_dict(model, state_dict, config))
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if key.startswith(f"{BANK}{adapter_name}."):
            return BANK + key.removeprefix(f"{BANK}{adapter_name}.")
        return str(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: LoraDropConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        there = f"{BANK}{adapter_name}."
        named = {
            there + key.removeprefix(BANK) if key.startswith(BANK) else key: value
            for key, value in state_dict.items()
        }
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, named
        )
        return found

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *_: Any, **__: Any) -> dict[str, Tensor]:
        raise ValueError(
            "path_initial_model_for_weight_conversion is of inits that change the base model, "
            "which LoraDropConfig does not serve"
        )


def _compute_dtype(base: Any) -> torch.dtype:
    weight = base.weight
    known = getattr(base, "compute_dtype", None) or weight.dtype
    return known if known.is_floating_point else torch.float32


@torch.no_grad()
def _start(bank: AdapterBank, init: bool | str) -> None:
    """As PEFT's `init_lora_weights`; a bank is made with LoRA's own start."""
    for pair in () if init is True else bank.pairs:  # type: ignore[union-attr]
        A, B = pair.factors()
        if init is False:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        else:
            nn.init.normal_(A, std=1 / len(A))


def _decide(bank: AdapterBank, config: LoraDropConfig, given: Any) -> None:
    """Who shares, before any training, by a plan as a configuration has it.

    Raises ValueError for a plan of other targets.
    """
    assert isinstance(bank, LoRABank)
    if not isinstance(given, (str, Mapping)):
        how: dict[str, Any] = {"share": config.share, "interval": config.interval}
        bank.share(list(given), None, init="fresh", after_select="reinit", **how)
        return
    plan = Plan.from_dict(given) if isinstance(given, Mapping) else plan_at(Path(given))
    here, there = ({target.name: target[2:] for target in x.targets} for x in (bank, plan))
    if here != there:
        differ = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
        raise ValueError(
            "the plan is of other targets, or of other ranks, than target_modules and r give in "
            f"this model; these differ: {', '.join(differ[:5])}"
        )
    used = {target.name: slot for target, slot in zip(plan.targets, plan.slots, strict=True)}
    numbers: dict[int, int] = {}
    pairs, slots = [], list[int | None]()
    for target in bank.targets:
        slot = used[target.name]
        if slot is not None and slot not in numbers:
            numbers[slot] = len(numbers)
            pairs.append(fresh(target, bank.like))
        slots.append(None if slot is None else numbers[slot])
    bank.assign(Assignment(bank.targets, tuple(slots), plan.kept), pairs)
