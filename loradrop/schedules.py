"""Schedules of the learning rate that start again in the middle of a run, or begin there."""

import logging
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState, get_scheduler

from loradrop.optimizers import plain

_log = logging.getLogger(__name__)


def restart(
    args: Any, state: TrainerState, ended: int, optimizer: Any = None, lr_scheduler: Any = None,
    **_: Any,
) -> None:  # fmt: skip
    """The schedule as if the run began after step `ended`, with the steps that are left."""
    inner = plain(optimizer)
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
    if not isinstance(scheduler, LambdaLR):
        what = f"the schedule is a {type(scheduler).__name__}, which cannot start again"
        _log.warning("%s: the learning rate goes on as it is", what)
        return
    left, done = state.max_steps - ended, state.global_step - ended
    new = get_scheduler(
        args.lr_scheduler_type, inner, args.get_warmup_steps(left), left,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )  # fmt: skip
    rates = [base * at(done) for base, at in zip(new.base_lrs, new.lr_lambdas, strict=True)]
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler.lr_lambdas, scheduler.base_lrs = new.lr_lambdas, new.base_lrs
    scheduler.last_epoch, scheduler._last_lr = done, rates


def go_on(scheduler: Any, done: int) -> None:
    """A new schedule, from its step `done` on."""
    if not isinstance(scheduler, LambdaLR):
        what = f"the schedule is a {type(scheduler).__name__}, which cannot begin in its middle"
        _log.warning("%s: it begins anew after the cut", what)
        return
    scheduler.lr_lambdas = [_from(at, done) for at in scheduler.lr_lambdas]
    rates = [
        base * at(0) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _from(at: Callable[[int], float], done: int) -> Callable[[int], float]:
    return lambda step: at(step + done)
