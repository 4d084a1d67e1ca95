"""What PEFT's loader makes of a folder's names, in models that transformers 5 builds otherwise.

PEFT takes every folder for one of transformers 4: in many models with experts gate_proj, up_proj
and down_proj are then parameters of those, and some keys get the names of today. Both are asked of
the installed PEFT itself. Without it nothing is renamed, and nothing known to be lost.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loradrop.formats.peft_file import PREFIX, PeftFile

_MATCHING = (
    *("r", "lora_alpha", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern"),
)


def renamed(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors by the keys under which PEFT loads them into `model`."""
    try:
        from peft import LoraConfig
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # no PEFT, or one for transformers 4
        return dict(tensors)
    convert: Any = conversion.convert_peft_adapter_state_dict_for_transformers
    return dict(convert(model, LoraConfig(), dict(tensors)))


def why_lost(file: PeftFile) -> str | None:
    """Why PEFT loads some adapters of a file nowhere in its model; None where it loads all."""
    model, options = file.model, {k: file.config[k] for k in _MATCHING if file.config.get(k)}
    if model is None or not options.get("target_modules"):
        return None
    remedy = f"leave such modules out of target_modules, or {file.instead}"
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists as finds
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return None
    before, now = LoraConfig(**options), LoraConfig(**options)
    try:
        convert_peft_config_for_transformers(now, model, None)
    except ValueError as error:
        return f"it takes this model's linear layers for experts ({error}): {remedy}"
    for name in file.modules:
        if finds(before, name) and not finds(now, name):
            return f"it takes {name} for a parameter of experts, and leaves it out: {remedy}"
    # Without values: a conversion of some may reshape them.
    empty = {key: torch.empty_like(t, device="meta") for key, t in file.tensors.items()}
    if gone := list(empty.keys() - renamed(empty, model).keys()):
        name = min(gone).removeprefix(PREFIX)
        return f"it looks for {name} under another name, and leaves it out: {remedy}"
    return None
