"""The options of PEFT 0.21's LoRA: which leave an adapter s·B·A over the base's weight, as ours."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from loradrop.config import LoRAConfig, pattern_matches
from loradrop.formats.peft_file import CONFIG
from loradrop.matching import find_targets
from loradrop.peft_names import CHANGES, HARMLESS

# The inits that leave the base model as it is; pissa, corda, olora, lora_ga and loftq change it.
_UNCHANGED = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
_ELSEWHERE = (
    "use it with PEFT, and where PEFT can merge it (merge_and_unload), adapt the merged model here"
)


def require_plain(options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option by which the adapter is not s·B·A over the base's weight."""
    if not isinstance(options, Mapping):
        raise ValueError(f"{CONFIG} holds a {type(options).__name__}, not options: is it PEFT's?")
    if (kind := options.get("peft_type")) != "LORA":
        raise ValueError(f"peft_type={kind!r}: only LORA is read; {_ELSEWHERE}")
    for name, why in CHANGES.items():
        if options.get(name):
            raise ValueError(f"{name}={options[name]!r} is not plain LoRA: {why}; {_ELSEWHERE}")
    init = options.get("init_lora_weights")
    if init is not None and str(init).lower() not in _UNCHANGED:
        raise ValueError(
            f"init_lora_weights={init!r}: this changed the weights of the base model, and the "
            "adapter is right on the changed ones alone. Save it again with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a "
            "plain adapter of PiSSA, CorDA, OLoRA and LoRA-GA; or, where this model has the "
            f'changed weights, or none were changed, set "init_lora_weights": true in {CONFIG}'
        )
    for name, value in options.items():
        if value and name not in HARMLESS and name not in CHANGES:
            raise ValueError(
                f"{CONFIG} has {name}={value!r}, which loradrop does not know: take it out where "
                f"it does not change what the adapter computes, else {_ELSEWHERE}"
            )


def lora_config(
    options: Mapping[str, Any], names: Sequence[str], saved: Sequence[str]
) -> LoRAConfig:
    """PEFT's options as ours, with the patterns that match one of these targets.

    `saved` are the modules trained whole. `target_modules` is left to `spelled`. Raises ValueError
    for a value that is not of its option's kind.
    """

    def matching(pattern: str) -> dict[str, Any]:
        given = (options.get(pattern) or {}).items()
        return {key: v for key, v in given if any(pattern_matches(key, name) for name in names)}

    try:
        return LoRAConfig(
            r=options.get("r", 8),
            lora_alpha=options.get("lora_alpha", 8),
            lora_dropout=options.get("lora_dropout") or 0.0,
            rank_pattern=matching("rank_pattern"),
            alpha_pattern=matching("alpha_pattern"),
            use_rslora=bool(options.get("use_rslora")),
            modules_to_save=saved,
        )
    except (TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{CONFIG} is damaged ({error}): restore it from a copy") from error


def spelled(
    config: LoRAConfig, options: Mapping[str, Any], model: nn.Module, names: Sequence[str]
) -> LoRAConfig:
    """The configuration with `target_modules` that mean just these modules of the model.

    PEFT's own where they do, as they may not beside layers_to_transform; else the names; else a
    regex of them.
    """
    own = options.get("target_modules"), options.get("exclude_modules")
    for targets, exclude in (own, (names, None)):
        tried = replace(config, target_modules=targets, exclude_modules=exclude)
        try:
            found = [name for name, _ in find_targets(model, tried)]
        except (ValueError, re.error):  # an entry without a match
            continue
        if found == names:
            return tried
    return replace(config, target_modules="|".join(map(re.escape, names)))
