"""How to train, in our words and in those of transformers' TrainingArguments."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from loradrop.env import native_bf16

_log = logging.getLogger(__name__)
# transformers renamed the argument; both names mean the same.
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the rest of transformers' TrainingArguments goes into `extra`.

    steps           optimiser steps in all, warm-up included; None is `epochs` passes over the data
    warmup_ratio    part of each run's steps over which the learning rate rises; it falls linearly
                    afterwards, and stays constant in the warm-up run
    precision       "float32", "bf16" or "fp16" (autocast); bf16 on a CPU that has none computes in
                    float32
    save_every      steps between checkpoints; log_every, eval_every likewise (None: dev only at the
                    end)
    """

    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_ratio: float = 0.06
    max_grad_norm: float = 1.0
    precision: str = "float32"
    gradient_checkpointing: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 100
    eval_every: int | None = None
    report_to: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "epochs",
            "batch_size",
            "gradient_accumulation",
            "learning_rate",
            "log_every",
            "save_every",
            "eval_every",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r}: choose a positive number")
        if self.precision not in ("float32", "bf16", "fp16"):
            raise ValueError(f"precision={self.precision!r}: choose float32, bf16 or fp16")


def training_arguments(
    args: TrainConfig, folder: Path, *, steps: int, warm_up: bool, has_dev: bool
) -> TrainingArguments:
    """transformers' arguments for one stage of `steps` optimiser steps; `folder` gets its files."""
    precision = _supported(args.precision)
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 2 * args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "warmup_steps": math.ceil(args.warmup_ratio * steps),
        "lr_scheduler_type": "constant_with_warmup" if warm_up else "linear",
        "max_grad_norm": args.max_grad_norm,
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
        "eval_strategy": "steps" if args.eval_every and has_dev and not warm_up else "no",
        "eval_steps": args.eval_every,
        "report_to": list(args.report_to),
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return TrainingArguments(**(options | dict(args.extra)))


def _supported(precision: str) -> str:
    if precision == "bf16" and not torch.cuda.is_available() and not native_bf16():
        _log.warning(
            "this CPU has no native bfloat16, which would be many times slower: computing in "
            "float32"
        )
        return "float32"
    return precision
