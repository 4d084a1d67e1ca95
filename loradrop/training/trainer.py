"""transformers' Trainer with checkpoints of adapters."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints

from loradrop import native
from loradrop.files import read_json
from loradrop.loading import fill
from loradrop.native import read
from loradrop.optimizers import Known, learn, set_head_rate
from loradrop.statistics.batches import small_batches
from loradrop.training import checkpoints
from loradrop.training.arguments import require_right_gradients
from loradrop.training.callbacks import EVENTS, MethodCallback
from loradrop.training.order import Onward

_WRAPPED = ("forward", "_original_forward")  # what accelerate's mixed precision sets on a model
_TIMINGS = ("_runtime", "_per_second", "_preparation_time")
_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A run that is a part of a longer one.

    steps   of the whole, which has one schedule
    done    steps before it
    row     where it begins in the order of the rows; a DataLoader, and other strategies of sampling
            than by chance and by length, have their own order
    known   what the optimiser knows at its start, by the parameter's name
    """

    steps: int
    done: int = 0
    row: int = 0
    known: Mapping[str, Known] = {}


class LoRATrainer(Trainer):
    """A Trainer whose checkpoints hold adapters, statistics, optimiser, and whether they are whole.

    part        of which longer run this is a part; None is a run of its own
    head_rate   the learning rate of what is trained whole; None is that of the arguments

    The data may be DataLoaders; everything else is `transformers.Trainer`. Raises ValueError at the
    first loss that is not finite, for rows of different lengths that nothing pads, and for
    reentrant checkpointing in several processes, whose gradients of a shared adapter would be
    wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        events: MethodCallback,
        part: Part | None = None,
        head_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        require_right_gradients(args)
        if args.n_gpu > 1:
            _log.warning(
                "using one of %d GPUs: nn.DataParallel cannot collect statistics. Start with "
                "torchrun --nproc_per_node %d to use all", args.n_gpu, args.n_gpu,
            )  # fmt: skip
            args._n_gpu = 1
        with taken_as_adapted(model):
            super().__init__(
                model=model, args=args, callbacks=[events, *kwargs.pop("callbacks", [])], **kwargs
            )
        # Before transformers' own one for SIGTERM, which saves at once what a step came to.
        callbacks = self.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(events)))
        self.events, self.part, self.head_rate = events, part, head_rate
        if self.data_collator is default_data_collator:
            self.data_collator = _of_one_length
        if getattr(model, "loss_type", None) != "ForCausalLM":
            # Other models take **kwargs and ignore num_items_in_batch: the Trainer would sum their
            # means over an accumulation instead of averaging them.
            self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: Any = None) -> Any:
        """As transformers makes it; what is trained whole is in groups of its own if it has a rate
        of its own. In the part of a run it knows what it knew.
        """
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new:
            assert isinstance(self.model, nn.Module)
            if self.head_rate is not None:
                set_head_rate(self.model, optimizer, self.head_rate)
            if self.part is not None and self.part.known:
                learn(self.model, optimizer, self.part.known)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As transformers makes it, for the whole run where this is a part."""
        if self.part is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(self.part.steps, optimizer)
        if self.part.done:
            _begin_at(scheduler, self.part.done)
        return scheduler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A DataLoader is taken as it is."""
        if isinstance(self.train_dataset, DataLoader):
            return self.accelerator.prepare(self.train_dataset)  # type: ignore[no-any-return]
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        start = 0 if self.part is None else self.part.row
        if isinstance(sampler, LengthGroupedSampler):
            # The batches that the processes of a run take at one time are of like length, too.
            together = self.args.train_batch_size * self.args.world_size
            return Onward(len(sampler), seed, start, list(sampler.lengths), together)
        if self.part is None or not isinstance(sampler, RandomSampler):
            return sampler
        return Onward(len(sampler), seed, start)

    def some_batches(self, rows: Any) -> DataLoader[Any]:
        """Small batches of a sample of training rows, for a probe of directions."""
        if isinstance(rows, DataLoader):
            return small_batches(rows.dataset, rows.collate_fn, self.args.seed)
        collate = self._get_collator_with_removed_columns(self.data_collator, "measuring")
        return small_batches(rows, collate, self.args.seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """A DataLoader is taken as it is, also one of several by name. dataloader_drop_last is of
        training alone: here every row counts.
        """
        given: Any = self.eval_dataset
        data = given if eval_dataset is None else eval_dataset
        if isinstance(data, str):
            data = given[data]
        if isinstance(data, DataLoader):
            return self.accelerator.prepare(data)  # type: ignore[no-any-return]
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropped

    def go_on(self, checkpoint: Path | None) -> None:
        """Train from `checkpoint` (None: the start), or only load it if its run was at its end."""
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        settled = read_json(checkpoint / EVENTS)["settled"]
        if state.global_step < self.args.max_steps and not settled and not _stopped_early(state):
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        self._load_from_checkpoint(str(checkpoint))  # `train` would take a step more
        if self.part is not None:  # a run goes on after this one, with what its optimiser knows
            self.create_optimizer_and_scheduler(self.args.max_steps)
            self._load_optimizer_and_scheduler(str(checkpoint))
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = checkpoint.parent / Path(state.best_model_checkpoint).name  # also once moved
            state.best_model_checkpoint = str(best)
            self._load_best_model()
        self.events.begin()
        self.events.detach()

    @property
    def complete(self) -> bool:
        """Whether nothing is left to train: all steps are made, or early stopping ended the run."""
        found = self.callback_handler.callbacks
        early = [c for c in found if isinstance(c, EarlyStoppingCallback)]
        return (
            self.state.global_step >= self.args.max_steps
            or _stopped_early(self.state)
            or any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in early)
        )

    def history(self, stage: str, steps: int = 0, epochs: float = 0.0) -> list[dict[str, Any]]:
        """What was logged at each step, without summaries and timings; so many steps, and epochs,
        of a stage before it count.
        """
        return [
            {k: v for k, v in entry.items() if not k.endswith(_TIMINGS)}
            | {"stage": stage, "step": int(entry["step"]) + steps}
            | {k: v + epochs for k, v in entry.items() if k == "epoch"}
            for entry in self.state.log_history
            if "train_runtime" not in entry
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's loss, which has to be finite."""
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return result
        loss = result[0] if return_outputs else result
        if not torch.isfinite(loss):
            labels = inputs.get("labels")
            if isinstance(labels, torch.Tensor) and labels.numel() and bool((labels == -100).all()):
                raise ValueError(
                    f"no label counts in the batch of step {self.state.global_step + 1}: all are "
                    "-100, as where max_length cuts the completion off. Look at the rows and the "
                    "collator"
                )
            raise ValueError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the "
                "learning rate, or train in float32. Earlier checkpoints are untouched"
            )
        return result

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            native.checkpoint(self.events.model, output_dir or self.args.output_dir or ".")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:
            if "inline_container" not in str(error):  # where torch.save writes
                raise
            raise OSError(
                f"{folder} cannot be written: {error}. Is the disk full? Checkpoints before it are "
                "whole: make room, and resume the run"
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # every rank has written its part
        self.events.save(folder, self.args.should_save)
        if self.args.should_save:
            checkpoints.seal(folder)
            best = self.state.best_model_checkpoint  # the others go once this one is whole
            rotate_checkpoints(str(folder.parent), limit, best, use_mtime=True)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        fill(self.events.model, read(resume_from_checkpoint))
        self.events.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        fill(self.events.model, read(str(self.state.best_model_checkpoint)))


def _of_one_length(rows: list[Any]) -> Any:
    """The batch that transformers makes without a tokenizer.

    Raises ValueError for rows of different lengths, which it does not pad.
    """
    try:
        return default_data_collator(rows)
    except (ValueError, RuntimeError) as error:
        fields = [row if isinstance(row, Mapping) else vars(row) for row in rows]
        for name in fields[0]:
            lengths = {_length(row.get(name)) for row in fields}
            if len(lengths) > 1:
                raise ValueError(
                    f"the rows of a batch differ in the length of {name!r} "
                    f"({', '.join(map(str, lengths))}), and nothing pads them: give "
                    "processing_class=tokenizer, or collate="
                ) from error
        raise


def _length(value: Any) -> int | None:
    """Of a list, or of a tensor or array that has axes."""
    long = isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0
    return len(value) if long else None


def _stopped_early(state: TrainerState) -> bool:
    """Whether transformers' EarlyStoppingCallback had ended the run at this checkpoint."""
    callbacks: Any = state.stateful_callbacks or {}
    kept = callbacks.get("EarlyStoppingCallback") or []
    counts = (
        (one["attributes"]["early_stopping_patience_counter"], one["args"])
        for one in (kept if isinstance(kept, list) else [kept])
    )
    return any(count >= given["early_stopping_patience"] for count, given in counts)


def _begin_at(scheduler: Any, done: int) -> None:
    """A new schedule, from its step `done` on."""
    if not isinstance(scheduler, LambdaLR):
        what = f"the schedule is a {type(scheduler).__name__}, which cannot begin in its middle"
        _log.warning("%s: it begins anew after the warm-up", what)
        return
    scheduler.lr_lambdas = [_shifted(at, done) for at in scheduler.lr_lambdas]
    starts = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    rates = [base * at(0) for base, at in starts]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _shifted(at: Callable[[int], float], done: int) -> Callable[[int], float]:
    return lambda step: at(step + done)


def dev_metrics(trainer: Trainer) -> dict[str, Any]:
    """Those of `evaluate`, without the epoch and the timings, which differ from run to run."""
    found = trainer.evaluate().items()
    kept = {k: v for k, v in found if k != "epoch" and not k.endswith(_TIMINGS)}
    return {key.removeprefix("eval_"): value for key, value in kept.items()}


def checked(metric: Callable[..., Any]) -> Callable[..., Any]:
    """The metric, whose arrays become lists, as a file can hold them.

    Raises TypeError where it returns anything but a dictionary.
    """

    @functools.wraps(metric)  # the Trainer looks at its signature
    def found(*args: Any, **kwargs: Any) -> Any:
        given = metric(*args, **kwargs)
        if kwargs.get("compute_result") is False:  # of one batch among others
            return given
        if not isinstance(given, Mapping):
            raise TypeError(
                f"metric returned {given!r}, a {type(given).__name__}: return a dictionary, as "
                "{'accuracy': 0.9}"
            )
        return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in given.items()}

    return found


@contextmanager
def taken_as_adapted(model: nn.Module) -> Iterator[None]:
    """Inside, a Trainer of transformers can be made for an injected model of a quantised base.

    It refuses one otherwise, for it looks for PEFT's adapters; a base that cannot be trained it
    refuses as before. `fit` needs none of this.
    """
    quantizer, name = getattr(model, "hf_quantizer", None), "_hf_peft_config_loaded"
    if not getattr(model, "is_quantized", False) or not getattr(quantizer, "is_trainable", False):
        yield
        return
    before = model.__dict__.get(name)
    model.__dict__[name] = True
    try:
        yield
    finally:
        del model.__dict__[name]
        if before is not None:
            model.__dict__[name] = before


@contextmanager
def forward_kept(model: nn.Module) -> Iterator[None]:
    """Mixed precision wraps `model.forward`; afterwards it is as it was, and can be pickled."""
    before = {key: model.__dict__[key] for key in _WRAPPED if key in model.__dict__}
    try:
        yield
    finally:
        for key in _WRAPPED:
            model.__dict__.pop(key, None)
        model.__dict__.update(before)
