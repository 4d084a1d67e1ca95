"""transformers' Trainer: a callback with a method's events, and a subclass that saves adapters."""

import hashlib
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from loradrop.bank import bank_of
from loradrop.collector import Collector
from loradrop.files import read_json, replacing, write_json
from loradrop.formats.native import read, restore, save

COMPLETE, STATISTICS, EVENTS = "complete.json", "statistics.safetensors", "events.json"
_log = logging.getLogger(__name__)


class MethodCallback(TrainerCallback):
    """Carries the events of the model's method into any training loop of transformers.

    `collect` gathers the method's statistic over the whole run (`collector.scores()`), and ends the
    run early once the method calls it settled. Without it only the first step is watched, so that a
    target whose forward is never called is an error, not an adapter that silently does nothing.
    """

    def __init__(
        self, model: nn.Module, *, collect: bool = False, mask: str | None = "attention_mask"
    ) -> None:
        self.model, self.bank, self.collect, self.mask = model, bank_of(model), collect, mask
        self.collector: Collector | None = None
        self.settled = False
        self.seconds_before = 0.0
        self._state: dict[str, torch.Tensor] | None = None
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, over all the runs that a resume joins."""
        return self.seconds_before + time.monotonic() - self._started

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._started = time.monotonic()
        self.collector = Collector(
            self.model, self.bank, online=True, mask=self.mask if self.collect else None
        )
        if self._state is not None:
            self.collector.load_state_dict(self._state)

    def reopen(self) -> None:
        """The collector of a run that had ended, after `load`."""
        self.on_train_begin(None, TrainerState(), None)
        self.detach()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.bank.config.method.on_backward_end(self.bank, state.global_step)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        method, collector = self.bank.config.method, self.collector
        method.on_step_end(self.bank, state.global_step)
        if collector is None:
            return
        collector.close_row()
        if not self.collect:
            self._stop()
        elif (every := method.settle_interval()) and state.global_step % every == 0:
            self.settled = method.settled(collector.scores())
            if self.settled:
                control.should_training_stop = control.should_save = True

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.seconds_before, self._started = self.seconds, time.monotonic()
        self.detach()

    def save(self, folder: Path, write: bool) -> None:
        """The state of the statistics and the method; every rank calls it, the first one writes."""
        state = self.collector.state_dict() if self.collector is not None else {}
        if write:
            with replacing(folder / STATISTICS) as draft:
                save_file(state, draft)
            method = self.bank.config.method.state_dict(self.bank)
            events = {"seconds": self.seconds, "settled": self.settled, "method": method}
            write_json(folder / EVENTS, events)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        self._state = load_file(folder / STATISTICS) if self.collect else None
        events = read_json(folder / EVENTS)
        self.seconds_before, self.settled = float(events["seconds"]), bool(events["settled"])
        self.bank.config.method.load_state_dict(self.bank, events["method"])

    def detach(self) -> None:
        """Stop collecting, also where the run ended with an error; what was collected stays."""
        if self.collector is not None:
            self.collector.detach()

    def _stop(self) -> None:
        self.detach()
        self.collector = None


class Progress(TrainerCallback):
    """A bar with the loss, the rate and the time left."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.stage,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5,
            )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4g}")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class LoRATrainer(Trainer):
    """A Trainer whose checkpoints hold adapters, statistics, optimiser, and tell if they are whole.

    The data may be DataLoaders; everything else is `transformers.Trainer`. Raises ValueError at the
    first loss that is not finite, and for reentrant checkpointing under DDP without a static graph,
    whose gradients of a shared adapter would be wrong.
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, *, events: MethodCallback, **kwargs: Any
    ) -> None:
        options = args.gradient_checkpointing_kwargs
        reentrant = isinstance(options, dict) and options.get("use_reentrant")
        if args.gradient_checkpointing and reentrant and args.world_size > 1:
            raise ValueError(
                "gradient checkpointing with use_reentrant=True gives wrong gradients for a shared "
                "adapter under DDP: pass use_reentrant=False"
            )
        super().__init__(
            model=model, args=args, callbacks=[events, *kwargs.pop("callbacks", [])], **kwargs
        )
        self.events = events
        if getattr(model, "loss_type", None) != "ForCausalLM":
            # Other models take **kwargs and ignore num_items_in_batch: the Trainer would sum their
            # means over an accumulation instead of averaging them.
            self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A DataLoader is taken as it is."""
        if isinstance(self.train_dataset, DataLoader):
            return self.accelerator.prepare(self.train_dataset)  # type: ignore[no-any-return]
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """A DataLoader is taken as it is."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, DataLoader):
            return self.accelerator.prepare(data)  # type: ignore[no-any-return]
        return super().get_eval_dataloader(eval_dataset)

    def go_on(self, checkpoint: Path | None) -> None:
        """Train from `checkpoint` (None: the start), or only load it if its run was at its end."""
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        ended = (
            state.global_step >= self.args.max_steps or read_json(checkpoint / EVENTS)["settled"]
        )
        if not ended:
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        self._load_from_checkpoint(str(checkpoint))  # `train` would take a step more
        self.state = state
        self.events.reopen()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's loss plus the method's penalty."""
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return result
        bank, loss = self.events.bank, result[0] if return_outputs else result
        penalty = bank.config.method.penalty(bank)
        if penalty is not None:
            normalized = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            loss = loss + penalty / (self.current_gradient_accumulation_steps if normalized else 1)
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the "
                "learning rate, or train in float32. Earlier checkpoints are untouched"
            )
        return (loss, result[1]) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save(self.events.model, output_dir or self.args.output_dir or ".")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every rank has written its part
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        self.events.save(folder, self.args.should_save)
        if self.args.should_save:
            write_json(folder / COMPLETE, _digests(folder))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        plan, tensors = read(resume_from_checkpoint)
        restore(self.events.model, plan, tensors)
        self.events.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        restore(self.events.model, *read(str(self.state.best_model_checkpoint)))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint. Half-written and damaged ones are named and removed."""
    found = sorted(
        folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True
    )
    for checkpoint in found:
        reason = _damage(checkpoint)
        if reason is None:
            return checkpoint
        _log.warning("%s %s; going on from an earlier one", checkpoint, reason)
        shutil.rmtree(checkpoint, ignore_errors=True)  # another rank may do the same
    return None


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != COMPLETE
    }


def _damage(checkpoint: Path) -> str | None:
    try:
        expected = read_json(checkpoint / COMPLETE)
    except FileNotFoundError:
        return "was being written when the run ended"
    except ValueError as error:
        return str(error)
    found = _digests(checkpoint)
    wrong = [name for name in expected if found.get(name) != expected[name]]
    return f"is damaged ({', '.join(wrong)})" if wrong else None
