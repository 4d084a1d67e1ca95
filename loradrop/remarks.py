"""What is said once of a model: that options save nothing in it, or that its training left
something out.
"""

import logging

import torch
from torch import nn

from loradrop.bank import bank_of
from loradrop.injection import injection_of, sum_of
from loradrop.matching import inside
from loradrop.pairs import LoRABank
from loradrop.ranks import is_sharded, local_part
from loradrop.spectral.allocation import time_in_vain
from loradrop.wrapped import parameters_of

_log = logging.getLogger(__name__)


def tell_in_vain(model: nn.Module) -> None:
    """Warns of options of the model's method that save nothing in this model."""
    _tell(model, injection_of(model).config.method.in_vain(*_described(model)))


def tell_time_in_vain(model: nn.Module, budget_time: float | None) -> None:
    """Warns where the backward pass goes on below the layers that lose their adapters."""
    _tell(model, time_in_vain(*_described(model), budget_time))


def tell_untouched(model: nn.Module) -> None:
    """Warns, where adapters are saved, merged or exported, that they trained without what their
    method does to them.
    """
    _tell(model, unmeasured(model) or _idle(model))


@torch.no_grad()
def tell_untrained(model: nn.Module) -> None:
    """Warns where some adapters were trained, and others are zero as they began."""
    bank = bank_of(model)
    if not isinstance(bank, LoRABank) or any(map(is_sharded, bank.parameters())):
        return
    zero = [not bool(B.any()) for B in bank.B]
    users = zip(bank.targets, bank.slots, strict=True)
    idle = [target.name for target, slot in users if slot is not None and zero[slot]]
    if idle and not all(zero):
        _log.warning(
            "the adapters of %s are zero, as if they were never trained: a loss that reads the "
            "weight of a layer itself, as TRL's of lm_head, goes past its adapter",
            ", ".join(idle),
        )  # fmt: skip


def unmeasured(model: nn.Module) -> str | None:
    """Why the adapters are plain LoRA's though their method is another; None where they are not.

    They are where the method decides after a warm-up, and they were trained without one.
    """
    bank, injection = bank_of(model), injection_of(model)
    begun = bank.collector is not None or injection.scores is not None or bank.assignment.decided
    begun |= injection.plan is not None and bool(injection.plan.warmup)
    if begun or not injection.config.method.warms_up:
        return None
    pairs = [bank.factors(i) for i in range(len(bank.targets))]
    if not any(bool(local_part(pair[1]).any()) for pair in pairs if pair is not None):
        return None  # nothing is trained yet
    return (
        f"the method {injection.config.method.name!r} decides after a warm-up, and none was made, "
        "so this is plain LoRA: pass callbacks=[loradrop.LoraDropCallback()] to the Trainer, call "
        "loradrop.fit, or inject with LoRAConfig(method=loradrop.LoRA())"
    )


def _idle(model: nn.Module) -> str | None:
    """Why a method that acts at every step did nothing; None where it did, or has nothing to do."""
    bank, injection = bank_of(model), injection_of(model)
    method = injection.config.method
    if injection.stepped or not method.acts:
        return None
    if sum_of(bank) == injection.start:
        return None  # nothing is trained yet
    return (
        f"the method {method.name!r} acts at every step of training, and nothing called it: pass "
        "callbacks=[loradrop.LoraDropCallback()] to the Trainer, or call loradrop.fit"
    )


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
