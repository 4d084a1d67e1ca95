"""Training in one call: `fit`, and `warm_up`, which ends with the decision."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from loradrop.bank import has_bank
from loradrop.config import LoRAConfig, TrainConfig, require_config
from loradrop.injection import injection_of, plan_of
from loradrop.plan import Plan
from loradrop.statistics.masks import MASK, MaskFn
from loradrop.training.arguments import train_config
from loradrop.training.given import require_model
from loradrop.training.stages import Metric, Result, Run
from loradrop.training.trainer import forward_kept
from loradrop.wrapped import inner


def fit(
    model: nn.Module,
    train: Any,
    dev: Any,
    config: LoRAConfig | None,
    *,
    args: TrainConfig | TrainingArguments | None = None,
    metric: Metric | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    processing_class: Any = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    data: Mapping[str, str] | None = None,
    mask: str | None = MASK,
    mask_fn: MaskFn | None = None,
    callbacks: Sequence[Any] = (),
) -> Result:
    """Adapt `model` to `train` by `config`, and measure it on `dev`.

    model         a PreTrainedModel, injected or not; it returns a loss when the batch has labels
    train, dev    a Dataset of torch or datasets, a DataLoader, or a list of dicts; dev may be None
    config        the adapters to inject; None is those that the model carries, as after `load`
    args          how to train; transformers' TrainingArguments mean what they say there
    metric        EvalPrediction -> name: value, as Trainer's compute_metrics
    collate       rows -> batch; None is the Trainer's default, which pads where `processing_class`
                  is a tokenizer
    output_dir    checkpoints, the plan, the adapters; None, and trainer_output, the default of
                  TrainingArguments, keep nothing and cannot resume
    resume        go on from what is in output_dir, with the model, data and options it was begun
                  with, to the same end as an uninterrupted run
    data          fingerprints of the rows, for the plan
    mask, mask_fn   of the statistics, as for `probe`; another `mask` than the default goes before
                  that of `args`
    callbacks     of both runs; transformers' EarlyStoppingCallback of the main run alone

    A model for which `share` or `load` has decided already has no warm-up. Under torchrun every
    rank calls `fit`, and the first writes the files. Raises ValueError for empty data, a loss that
    is not finite, a warm-up too short to measure, and a resume with other options, or without a
    folder; RuntimeError where a signal or a callback stopped the warm-up; TypeError for a
    configuration of PEFT.
    """
    require_model(model)
    config = _carried(model) if config is None else config
    require_config(config)
    with tempfile.TemporaryDirectory() as scratch, forward_kept(model):
        folder, arguments = _settled(args, output_dir, mask)
        if resume and folder is None:
            raise ValueError(
                "resume=True has no folder to go on from: give output_dir= of the run "
                "(trainer_output, the default of TrainingArguments, does not count)"
            )
        run = Run(
            model=model, train=train, config=config, args=arguments, collate=collate,
            folder=folder or Path(scratch), resume=resume, data=dict(data or {}), mask_fn=mask_fn,
            processing_class=processing_class, dev=dev, metric=metric, callbacks=callbacks,
            kept=folder is not None,
        )  # fmt: skip
        with run.held():
            return run.whole()


def _settled(
    args: TrainConfig | TrainingArguments | None, output_dir: str | Path | None, mask: str | None
) -> tuple[Path | None, TrainConfig]:
    """The folder, and the arguments in our words with the mask that counts."""
    if isinstance(args, TrainingArguments):
        named = args.output_dir if args.output_dir != "trainer_output" else None
        output_dir, args = output_dir or named, train_config(args)
    args = TrainConfig() if args is None else args
    if not isinstance(args, TrainConfig):
        raise TypeError(f"args is a {type(args).__name__}: give TrainConfig or TrainingArguments")
    folder = None if output_dir is None else Path(output_dir).expanduser()
    return folder, args if mask == MASK else replace(args, mask=mask)


def warm_up(
    model: nn.Module,
    train: Any,
    config: LoRAConfig | None,
    *,
    args: TrainConfig | TrainingArguments | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    processing_class: Any = None,
    output_dir: str | Path,
    resume: bool = False,
    data: Mapping[str, str] | None = None,
    mask: str | None = MASK,
    mask_fn: MaskFn | None = None,
) -> Plan:
    """The first stage of `fit` alone, up to the decision; `fit(..., resume=True)` goes on from it.

    The arguments are those of `fit`. Raises ValueError for a method without a warm-up, RuntimeError
    where it was stopped.
    """
    require_model(model)
    config = _carried(model) if config is None else config
    folder, arguments = _settled(args, output_dir, mask)
    assert folder is not None
    run = Run(
        model=model, train=train, config=config, args=arguments, collate=collate, folder=folder,
        resume=resume, data=dict(data or {}), mask_fn=mask_fn, processing_class=processing_class,
    )  # fmt: skip
    if config.method.warmup(run.total) is None:
        raise ValueError(f"the method {config.method.name!r} measures nothing: try lora_drop")
    with forward_kept(model), run.held():
        run.prepare()
        run.first_stage()
    return plan_of(model)


def _carried(model: nn.Module) -> LoRAConfig:
    """The configuration of the adapters that the model has."""
    if not has_bank(inner(model)):
        raise ValueError(
            "config=None takes the adapters that the model carries, and it carries none: give "
            "loradrop.LoRAConfig(...) or loradrop.LoraDropConfig(...)"
        )
    return injection_of(model).config
