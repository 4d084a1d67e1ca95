"""Our op in the layers of PEFT's own adapters: in place, and back."""

import logging
from typing import Any

from peft import PeftModel
from peft.tuners import lora
from torch import nn

from loradrop.integrations.peft_layers import Accelerated, is_linear, why_not
from loradrop.layers import adapted_class, become, is_patched

_log = logging.getLogger(__name__)


def accelerate_peft(model: nn.Module) -> int:
    """Let the LoRA layers of a PeftModel compute with loradrop's op. Returns how many do from now.

    The outputs are the same within rounding, with float32 adapters on a half-precision base too;
    Parameters, state-dict keys and files stay. A dropout mask is another draw of the same
    probability (rounded to a multiple of 2⁻¹²). Several active adapters are served. What is not
    s·B·A·x over a linear layer, plain or of bitsandbytes or torchao, stays with PEFT (DoRA and
    other variants, lora_bias, embeddings, convolutions), and so does every merge; the reasons are
    logged once. `restore_peft` undoes it.

    Raises ValueError for a model without LoRA layers of PEFT.
    """
    modules: list[tuple[str, Any]] = list(model.named_modules())
    layers = [(name, module) for name, module in modules if isinstance(module, lora.LoraLayer)]
    if not layers:
        has = "a PeftModel without LoRA layers" if isinstance(model, PeftModel) else "no PeftModel"
        raise ValueError(
            f"{type(model).__name__} is {has}: call accelerate_peft on what get_peft_model or "
            "PeftModel.from_pretrained returned"
        )
    left: dict[str, list[str]] = {}
    count = 0
    for name, layer in layers:
        reason = _reason(layer)
        if reason is None:
            if not isinstance(layer, Accelerated):
                become(layer, adapted_class(Accelerated, type(layer)))  # type: ignore[arg-type]
            count += 1
        else:
            left.setdefault(reason, []).append(name)
    for reason, names in left.items():
        _log.warning("left to PEFT: %s (%d layers): %s", names[0], len(names), reason)
    return count


def restore_peft(model: nn.Module) -> None:
    """Give PEFT's layers back what `accelerate_peft` changed: their class."""
    for module in model.modules():
        if isinstance(module, Accelerated) and type(module).__bases__[1] is Accelerated:
            become(module, type(module).__bases__[2])


def _reason(layer: Any) -> str | None:
    """Why a layer stays as it is; None where the op serves it."""
    if isinstance(layer, Accelerated):
        return None
    if not is_linear(type(layer)):
        return f"a {type(layer).__name__} is not a layer over a linear map that loradrop knows"
    if is_patched(layer):
        return "it has a forward of its own, set on the instance"
    return next(filter(None, (why_not(layer, name) for name in layer.lora_A)), None)
