"""PeftModels of a `LoraDropConfig` over a tiny Llama, and their twins of stock PEFT."""

from typing import Any

import models
import pytest
import torch
from torch import Tensor

import loradrop

peft = pytest.importorskip("peft", minversion="0.21")

from loradrop.integrations.peft import LoraDropConfig  # noqa: E402

Q0, V0, Q1, V1 = (f"model.layers.{i}.self_attn.{k}_proj" for i in (0, 1) for k in "qv")
OPTIONS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
LLAMA: dict[str, Any] = {**OPTIONS, "task_type": "CAUSAL_LM"}
BATCH = {"input_ids": models.IDS, "labels": models.IDS}


def made(model: Any = None, **options: Any) -> Any:
    """A PeftModel whose adapters are awake."""
    found = peft.get_peft_model(model or models.llama(), LoraDropConfig(**(LLAMA | options)))
    return models.wake(found, 0.1)


def shared(**options: Any) -> Any:
    """One that keeps an adapter for the first q_proj, and shares the others."""
    model = made(**options)
    loradrop.share(model, [Q0])
    return models.wake(model, 0.1)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=models.IDS).logits
    return found


def twin(model: Any, base: Any, **options: Any) -> Any:
    """Stock PEFT with the factors that each target of `model` has."""
    found = peft.get_peft_model(base, peft.LoraConfig(**(LLAMA | options)))
    bank = model.lora_bank
    for target, pair in zip(bank.targets, map(bank.factors, range(len(bank.targets))), strict=True):
        layer = found.get_base_model().get_submodule(target.name)
        for factor, value in zip((layer.lora_A, layer.lora_B), pair, strict=True):
            factor["default"].weight.data = value.detach().clone()
    return found
