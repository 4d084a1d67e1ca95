"""Callbacks for transformers' Trainer: a method's events, a stop's checkpoint, a progress bar."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.amp.grad_scaler import OptState
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from loradrop.bank import bank_of
from loradrop.files import read_json, write_json
from loradrop.injection import injection_of
from loradrop.methods.base import Method, Warmup
from loradrop.probing import require_drawable
from loradrop.statistics.collector import Collector
from loradrop.statistics.masks import EVERY_TOKEN, MASKED, Masking
from loradrop.tensor_file import write_tensors
from loradrop.training.checkpoints import COMPLETE

STATISTICS, EVENTS = "statistics.safetensors", "events.json"
WATCHED = 20  # steps after which a target that was never called is named
_log = logging.getLogger(__name__)


class MethodCallback(TrainerCallback):
    """Carries the events of the model's method into any training loop of transformers.

    statistics    what to collect over the whole run (`collector.scores()`) and hand to the method
                  after each step; None is what a method without a warm-up asks for. Where it is
                  empty the first steps are watched, so that a target whose forward is never called
                  is an error, not an adapter without effect
    masking       which tokens the statistics count
    warmup        the run is this stage of the method's: it ends early once the method calls its
                  scores settled, and what it collected before `measured_from` is forgotten
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        statistics: Sequence[str] | None = None,
        masking: Masking = MASKED,
        warmup: Warmup | None = None,
    ) -> None:
        self.model, self.bank = model, bank_of(model)
        self.method = injection_of(model).config.method
        self._changes_gradients = type(self.method).before_step is not Method.before_step
        if statistics is None:
            statistics = () if self.method.warms_up else self.method.statistics
        self.statistics = tuple(statistics)
        self.masking, self.warmup = masking, warmup
        self._steps, self._watched = 0, False  # all are called, or given up
        self.collector: Collector | None = None
        self.settled = False
        self.seconds_before = 0.0
        self._state: dict[str, torch.Tensor] | None = None
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, over all the runs that a resume joins."""
        return self.seconds_before + time.monotonic() - self._started

    def record(self, steps: int) -> dict[str, Any]:
        """Of the warm-up, which ended after so many steps: for the plan."""
        assert self.warmup is not None
        return {"steps": steps, "planned": self.warmup.steps, "settled": self.settled}

    def begin(self) -> None:
        """Start to collect, from the state that `load` took where there is one. A try before this
        one, which the Trainer gave up, collects no more.
        """
        self.detach()
        self.bank.stop_collecting()  # of another run, which was interrupted
        self._started = time.monotonic()
        names = self.statistics or ("sqnorm",)
        masking = self.masking if self.statistics else EVERY_TOKEN
        self.collector = Collector(
            self.model, self.bank, online=True, statistics=names, masking=masking
        )
        if self._state is not None:
            self.collector.load_state_dict(self._state)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        self.require_measurable(train_dataloader)
        self.begin()

    def require_measurable(self, loader: Any) -> None:
        """Raises ValueError for rows, or a model, that the method could not measure offline at the
        end of its warm-up.
        """
        offline = self.warmup is not None and self.warmup.source == "offline"
        if offline and "core" in self.method.statistics:
            require_drawable(self.model, loader.dataset, loader.collate_fn)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        scaler = getattr(optimizer, "scaler", None)  # of accelerate, for fp16
        if self.collector is not None and scaler is not None:
            self.collector.loss_scale = float(scaler.get_scale())
        if self._changes_gradients:
            if scaler is not None:
                _unscale(scaler, optimizer.optimizer)
            self.method.before_step(self.bank, state.global_step + 1, state.max_steps)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        step, collector = state.global_step, self.collector
        injection_of(self.model).stepped = True
        collected: dict[str, list[torch.Tensor | None]] = {}
        if collector is not None:
            collected = collector.close_row()
            if self.warmup is not None and step == self.warmup.measured_from:
                collector.forget()
            self._steps += 1
            self.watch(collector, last=step >= state.max_steps)
            if not self.statistics:
                collected = {}
                if self._watched:
                    self.detach()
                    self.collector = None
        before = [*self.bank.parameters()]
        self.method.on_step_end(self.bank, step, collected)
        after = [*self.bank.parameters()]
        if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
            raise RuntimeError(
                f"on_step_end of the method {self.method.name!r} replaced parameters of the bank at"
                f" step {step}, and no optimiser holds the new ones: change them in place, or let "
                "the method warm up, and replace them in `update`"
            )
        every = 0 if self.warmup is None else self.warmup.settle_every
        if every and collector is not None and step % every == 0:
            self.settled = self.method.settled(collector.scores())
            if self.settled:
                control.should_training_stop = control.should_save = True

    def watch(self, collector: Collector, last: bool) -> None:
        """A target that is silent all the time is an error once that is known."""
        if self._watched or not collector.silent():
            self._watched = True
        elif last or self._steps >= WATCHED:
            self._watched = True
            collector.require_called(injection_of(self.model).config.strict)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.seconds_before, self._started = self.seconds, time.monotonic()
        self.detach()

    def save(self, folder: Path, write: bool) -> None:
        """The state of the statistics; every rank calls it, the first one writes."""
        state = self.collector.state_dict() if self.collector is not None else {}
        if write:
            write_tensors(folder / STATISTICS, state, {"format": "pt"})
            write_json(folder / EVENTS, {"seconds": self.seconds, "settled": self.settled})

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        self._state = load_file(folder / STATISTICS) if self.statistics else None
        events = read_json(folder / EVENTS)
        self.seconds_before, self.settled = float(events["seconds"]), bool(events["settled"])

    def detach(self) -> None:
        """Stop collecting, also where the run ended with an error; what was collected stays."""
        if self.collector is not None:
            self.collector.detach()


def _unscale(scaler: Any, optimizer: Any) -> None:
    """Divides the gradients by the loss scale, unless clipping has done it already."""
    if scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
        scaler.unscale_(optimizer)


class LastStep(TrainerCallback):
    """A run of ours that is stopped before its end leaves a checkpoint of the step that it came to,
    unless it makes none.

    It is the last of the callbacks, for each of them may be the one that stops the run.
    """

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        saves = args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH)
        if saves and control.should_training_stop and state.global_step < state.max_steps:
            there = Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE
            control.should_save |= not there.exists()


class Progress(TrainerCallback):
    """A bar with the loss, the rate and the time left."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                desc=self.stage, total=state.max_steps, initial=state.global_step,
                unit="step", dynamic_ncols=True, mininterval=0.5,
            )  # fmt: skip

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.bar is not None and "loss" in (kwargs.get("logs") or {}):
            self.bar.set_postfix(loss=f"{kwargs['logs']['loss']:.4g}")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
