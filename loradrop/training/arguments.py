"""transformers' TrainingArguments and our `TrainConfig`: one from the other, both ways."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from loradrop.config import TrainConfig, check_keys
from loradrop.machine import native_bf16

# transformers renamed the argument; both names mean the same.
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
_FOLLOWING = "reduce_lr_on_plateau", "greedy"  # schedules that follow evaluations
_log = logging.getLogger(__name__)


def training_arguments(
    args: TrainConfig,
    folder: Path,
    steps: int,
    *,
    warm_up: bool,
    has_dev: bool,
    total: int | None = None,
) -> TrainingArguments:
    """transformers' arguments for one stage of `steps` optimiser steps; `folder` gets its files.

    total   steps of the schedule of the learning rate that the stage is a part of; None is its own

    The warm-up has no evaluation and no best model. Raises ValueError for an option in `extra` that
    TrainingArguments lacks, or refuses.
    """
    precision = "float32" if _why_not(args.precision) else args.precision
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    check_keys(args.extra, known, "train.extra")
    _require_ours(args.extra, warm_up=warm_up, has_dev=has_dev)
    rising = args.warmup_ratio * (total or steps)
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 2 * args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "warmup_steps": math.ceil(rising) if rising >= 1 else 0,  # the first of them has rate 0
        "lr_scheduler_type": "linear",
        "max_grad_norm": args.max_grad_norm or 0.0,  # the Trainer takes no None
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        _CHECKPOINTING: args.gradient_checkpointing,
        "use_cpu": not torch.accelerator.is_available(),
        "seed": args.seed,
        "logging_steps": args.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": args.save_every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if args.eval_every and has_dev else "no",
        "eval_steps": args.eval_every,
        "report_to": list(args.report_to),
        "log_level_replica": "passive",  # else each Trainer makes other ranks say more than it was
        "restore_callback_states_from_checkpoint": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    options |= args.extra
    options["disable_tqdm"] = True  # fit has a bar of its own
    if warm_up:
        if options["lr_scheduler_type"] in _FOLLOWING:
            options["lr_scheduler_type"] = "constant_with_warmup"
        options |= {
            "save_strategy": "steps",
            "eval_strategy": "no",
            "eval_on_start": False,
            "load_best_model_at_end": False,
        }
    if options.get("load_best_model_at_end"):
        _require_measured(options)
    found = TrainingArguments(**options)
    if found.load_best_model_at_end:
        _require_checkpoint(found)
    return found


def _require_measured(options: Mapping[str, Any]) -> None:
    """Raises ValueError where dev would not be measured at every checkpoint."""
    given = options["save_strategy"], options["eval_strategy"]
    by = [getattr(strategy, "value", strategy) for strategy in given]
    save, measure = options["save_steps"], options["eval_steps"] or options["logging_steps"]
    alike = (save < 1) == (measure < 1) and round(save * 10**6) % round(measure * 10**6) == 0
    if by[1] == "no" or (by == ["steps", "steps"] and not alike):
        raise ValueError(
            "load_best_model_at_end needs dev measured at every checkpoint: give rows in dev, and "
            f"train.save_every={save:g} as a multiple of train.eval_every={options['eval_steps']}, "
            "both in steps or both as parts of the run"
        )


def _require_checkpoint(args: TrainingArguments) -> None:
    """Raises ValueError where the best model could not be kept: it is one of the checkpoints."""
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * args.max_steps
    if args.save_strategy == "steps" and every > args.max_steps:
        raise ValueError(
            f"load_best_model_at_end keeps the best of the checkpoints, and save_every={every:g} "
            f"makes none in a run of {args.max_steps} steps: give train.save_every (save_steps) "
            "a smaller number, a multiple of that of evaluations"
        )


def require_right_gradients(args: TrainingArguments) -> None:
    """Raises ValueError for reentrant checkpointing in several processes: the gradients of what
    several layers share would be wrong, without an error.
    """
    options = args.gradient_checkpointing_kwargs
    reentrant = isinstance(options, dict) and options.get("use_reentrant")
    if args.gradient_checkpointing and reentrant and args.world_size > 1:
        raise ValueError(
            "gradient checkpointing with use_reentrant=True gives wrong gradients, in several "
            "processes, for what layers share: pass use_reentrant=False in "
            "gradient_checkpointing_kwargs"
        )


_SAME = {  # what both call by another name
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    _CHECKPOINTING: "gradient_checkpointing",
}


def _require_ours(extra: Mapping[str, Any], *, warm_up: bool, has_dev: bool) -> None:
    """Raises ValueError for options in `extra` that `TrainConfig` has by a name of its own, and for
    those with which a run could not be counted, evaluated, or resumed.
    """
    ours = _SAME | {"max_steps": "steps", "bf16": "precision", "fp16": "precision"}
    for name in extra:
        if name in ours:
            raise ValueError(f"train.extra has {name}: give train.{ours[name]}, which is the same")
    if "output_dir" in extra:
        raise ValueError("train.extra has output_dir: give fit output_dir=, or the command output=")
    if extra.get("save_only_model"):
        raise ValueError(
            "save_only_model=True keeps no optimiser, so that a run could not be resumed to the "
            "same end: leave it out"
        )
    if extra.get("auto_find_batch_size"):
        raise ValueError(
            "auto_find_batch_size=True changes the batch size within a run, whose steps fit counts "
            "before: leave it out, and give a smaller train.batch_size with a larger "
            "train.gradient_accumulation, whose product is the batch of a step"
        )
    if extra.get("resume_from_checkpoint"):
        raise ValueError(
            "resume_from_checkpoint names a Trainer's checkpoint: leave it out, and give fit "
            "resume=True with the output_dir= of the run"
        )
    given = extra.get("eval_strategy", "no")
    strategy = getattr(given, "value", given)
    if strategy != "no" and not has_dev and not warm_up:
        raise ValueError(f"eval_strategy={strategy!r} needs rows to evaluate on: give dev=")


def train_config(args: TrainingArguments) -> TrainConfig:
    """TrainingArguments in our words; what was changed and has no word of ours is `extra`.

    Raises TypeError for those of a library that adds its own, which `fit` would ignore.
    """
    if type(args) is not TrainingArguments:
        raise TypeError(
            f"args is a {type(args).__name__}, whose further options fit does not know: give "
            "transformers' TrainingArguments or loradrop.TrainConfig, or use the Trainer that they "
            "are for, with callbacks=[loradrop.LoraDropCallback()]"
        )
    default = TrainingArguments(output_dir="none", use_cpu=args.use_cpu)
    names = [field.name for field in dataclasses.fields(args) if field.init]
    changed = {n: v for n in names if (v := getattr(args, n)) != getattr(default, n)}
    for name in (*_SAME, "output_dir", "bf16", "fp16", "max_steps"):
        changed.pop(name, None)
    for name in ("per_device_eval_batch_size", "save_total_limit"):  # their defaults are not ours
        changed[name] = getattr(args, name)
    if args.use_cpu:
        changed["use_cpu"] = True
    return TrainConfig(
        steps=args.max_steps if args.max_steps > 0 else None,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        warmup_ratio=0.0,
        extra={name: getattr(value, "value", value) for name, value in changed.items()},
        **{ours: getattr(args, theirs) for theirs, ours in _SAME.items()},
    )


def _why_not(precision: str) -> str | None:
    if precision == "bf16" and not torch.cuda.is_available() and not native_bf16():
        return "this CPU has no native bfloat16 and would be slow"
    if precision == "fp16" and not torch.accelerator.is_available():
        return "fp16 is for accelerators (bf16 is for CPUs, too)"
    return None


def tell_precision(precision: str) -> None:
    """Say why it is not computed in."""
    if (reason := _why_not(precision)) is not None:
        _log.warning("%s: computing in float32", reason)
