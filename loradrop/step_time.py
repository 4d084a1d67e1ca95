"""Warns once of options that save nothing in a model, such as a part of a step's time."""

import logging

from torch import nn

from loradrop.bank import bank_of
from loradrop.injection import injection_of
from loradrop.matching import inside
from loradrop.spectral.allocation import time_in_vain
from loradrop.wrapped import parameters_of

_log = logging.getLogger(__name__)


def tell_in_vain(model: nn.Module) -> None:
    """Warns of options of the model's method that save nothing in this model."""
    _tell(model, injection_of(model).config.method.in_vain(*_described(model)))


def tell_time_in_vain(model: nn.Module, budget_time: float | None) -> None:
    """Warns where the backward pass goes on below the layers that lose their adapters."""
    _tell(model, time_in_vain(*_described(model), budget_time))


def _described(model: nn.Module) -> tuple[list[str], dict[str, bool]]:
    """The targets, and name -> whether it is trained whole, in the order of the model."""
    parameters = {
        name: parameter.requires_grad
        for name, parameter in parameters_of(model).items()
        if not inside(name, "lora_bank")
    }
    return [target.name for target in bank_of(model).targets], parameters


def _tell(model: nn.Module, reason: str | None) -> None:
    told = injection_of(model).told
    if reason is not None and reason not in told:
        told.add(reason)
        _log.warning("%s", reason)
