"""How many parameters each method would train on a model, before anything is trained or loaded."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from loradrop.command.base_models import without_weights
from loradrop.config import LoRAConfig
from loradrop.layers import build_bank
from loradrop.matching import find_targets
from loradrop.methods import available


class Count(NamedTuple):
    """What a method comes to on a model.

    parameters   that it trains at the start; None where it cannot adapt the model
    changes      whether a later stage changes that number
    reason       why it cannot
    """

    parameters: int | None
    changes: bool = False
    reason: str = ""


def parameters(model_id: str, config: LoRAConfig, revision: str | None = None) -> dict[str, Count]:
    """Name -> what each method comes to, with its defaults; the one of `config` with its options.

    Only the shapes of the model at this id or path are looked at, on the meta device. Raises
    ValueError for a model that cannot be had, and for targets as `inject` does.
    """
    model = without_weights(model_id, revision)
    find_targets(model, config)
    every = {name: cls() for name, cls in available().items()}
    every |= {config.method.name: config.method}
    return {name: count(model, replace(config, method=every[name])) for name in every}


def count(model: nn.Module, config: LoRAConfig) -> Count:
    """What the method of `config` comes to on this model, which is not changed."""
    try:
        bank = build_bank(config, find_targets(model, config), model)
    except ValueError as error:
        return Count(None, reason=str(error))
    return Count(bank.trainable, config.method.warms_up)


def table(counts: Mapping[str, Count]) -> str:
    """A line for each method: what it trains, and as a part of LoRA's; or why it does not fit."""
    whole = counts["lora"].parameters
    lines = [_line("method", "parameters", "of LoRA's")]
    for name, of in counts.items():
        if of.parameters is None:
            lines.append(_line(name, "-", of.reason))
            continue
        part = f"{of.parameters / whole:.4f}" if whole else ""
        later = ", at first: it decides after a warm-up" if of.changes else ""
        lines.append(_line(name, f"{of.parameters:,}", part + later))
    return "\n".join(lines)


def _line(name: str, parameters: str, more: str) -> str:
    return f"{name:<16} {parameters:>14}  {more}"
