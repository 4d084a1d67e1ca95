"""Learning rates of a run in two stages: a schedule that starts again, or that goes on."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

Factor = Callable[[int], float]
RISE = 0.06  # of the steps that are left, where the arguments name no warm-up
_log = logging.getLogger(__name__)


def goes_on(scheduler: Any) -> TypeGuard[LambdaLR]:
    """Whether it is a function of the step, which can be set to another; says it where not."""
    if isinstance(scheduler, LambdaLR):
        return True
    what = f"the schedule is a {type(scheduler).__name__}, which cannot be set to another step"
    _log.warning("%s: the learning rate goes on as it is", what)
    return False


def start_again(scheduler: LambdaLR, args: Any, done: int, ended: int, total: int) -> None:
    """The schedule as if the run began after step `ended`, with the steps that are left.

    args   transformers' TrainingArguments;  done   steps so far;  total   of the whole run
    """
    left = total - ended
    new = get_scheduler(
        args.lr_scheduler_type, scheduler.optimizer, args.get_warmup_steps(left), left,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )  # fmt: skip
    _set(scheduler, new.lr_lambdas, new.base_lrs, done - ended)


def rise_again(scheduler: LambdaLR, args: Any, done: int, ended: int, total: int) -> None:
    """The schedule goes on after step `ended`, from nothing up to where it would be: the first
    steps of Adam that knows no gradients yet are as large as its steps can be.
    """
    left = total - ended
    rise = args.get_warmup_steps(total) * left / total or RISE * left
    factors = [_rising(at, ended, rise) for at in scheduler.lr_lambdas]
    _set(scheduler, factors, scheduler.base_lrs, done)


def _rising(at: Factor, since: int, rise: float) -> Factor:
    return lambda step: at(step) * min(1.0, max(0, step - since + 1) / (rise + 1))


def _set(scheduler: LambdaLR, factors: Sequence[Factor], bases: Sequence[Any], step: int) -> None:
    rates = [base * at(step) for base, at in zip(bases, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler.lr_lambdas, scheduler.base_lrs = list(factors), list(bases)
    scheduler.last_epoch, scheduler._last_lr = step, list(rates)
