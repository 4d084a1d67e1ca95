"""The two runs of transformers' Trainer that a `fit` is, with `update` between them.

    fit = inject -> warm-up (its own passes are the probe) -> select -> share -> main run

What lies between them is written down, so that a resume goes on from there: see `run_folder`.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from loradrop.bank import bank_of, has_bank
from loradrop.config import LoRAConfig, TrainConfig
from loradrop.files import read_json, write_json
from loradrop.injection import injection_of, plan_of, require_own, require_unmerged, sum_of
from loradrop.loading import fill
from loradrop.machine import is_first_rank
from loradrop.methods.base import Warmup
from loradrop.native import read, save
from loradrop.optimizers import kept_state, state_by_name
from loradrop.origin import base_of
from loradrop.plan import Plan
from loradrop.probing import probe
from loradrop.quantised import require_gradients
from loradrop.ranks import is_needed, wait, world_size
from loradrop.remarks import tell_in_vain
from loradrop.sampling import sample_of
from loradrop.sharing import conclude
from loradrop.statistics.masks import MaskFn, Masking
from loradrop.surgery import inject
from loradrop.training.any_trainer import LoraDropCallback
from loradrop.training.arguments import tell_precision, training_arguments
from loradrop.training.callbacks import LastStep, MethodCallback, Progress
from loradrop.training.checkpoints import last_checkpoint
from loradrop.training.given import require_dev, require_others, require_train
from loradrop.training.run_folder import RESULT, Boundary, begun, resumable, taken
from loradrop.training.trainer import LoRATrainer, Part, checked, dev_metrics
from loradrop.wrapped import parameters_of

_log = logging.getLogger(__name__)
Metric = Callable[[Any], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a `fit` came to.

    steps     optimiser steps that were made, fewer than planned after an early stop
    history   dicts with stage, step and what the Trainer logged at it
    complete  whether nothing is left to train; False where a signal or a callback stopped it
    """

    metrics: Mapping[str, float]
    parameters: int
    steps: int
    seconds: float
    history: Sequence[Mapping[str, Any]]
    plan: Plan
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain data for result.json; the plan has a file of its own."""
        names = ("metrics", "parameters", "steps", "seconds", "history", "complete")
        return {name: getattr(self, name) for name in names}

    def require_complete(self, name: str) -> None:
        """Raises RuntimeError where the run was stopped: what follows it has to wait."""
        if not self.complete:
            raise RuntimeError(
                f"{name} was stopped at step {self.steps}: resume=True, of the command --resume, "
                "goes on from there"
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One `fit`; its fields are the arguments of `fit`, and whether its folder is kept."""

    model: nn.Module
    train: Any
    config: LoRAConfig
    args: TrainConfig
    collate: Callable[[list[Any]], Any] | None
    folder: Path
    resume: bool
    data: dict[str, str]
    mask_fn: MaskFn | None = None
    processing_class: Any = None
    dev: Any = None
    metric: Metric | None = None
    callbacks: Sequence[Any] = ()
    kept: bool = True

    def __post_init__(self) -> None:
        require_train(self.train)
        require_dev(self.dev)
        require_others(self.callbacks, (LoraDropCallback, MethodCallback))
        if self._per_epoch == 0:
            raise ValueError(
                f"train has {len(self.train)} rows, and dataloader_drop_last leaves no batch of "
                f"them: choose a batch_size below {self.args.batch_size}"
            )

    def held(self) -> AbstractContextManager[None]:
        """Takes the folder for this run."""
        return begun(self.folder, self._options(), self.resume)

    @property
    def total(self) -> int:
        """Optimiser steps of both stages; the ranks share each pass over the data."""
        return self.args.steps or max(1, math.ceil(self.args.epochs * self._per_epoch))

    @property
    def _per_epoch(self) -> int:
        """Optimiser steps of a pass over the data."""
        loader = isinstance(self.train, DataLoader)
        batch = 1 if loader else self.args.batch_size
        dropped = not loader and self.args.extra.get("dataloader_drop_last", False)
        batches = (math.floor if dropped else math.ceil)(len(self.train) / (batch * world_size()))
        return math.ceil(batches / self.args.gradient_accumulation)

    def _rows(self, steps: int) -> int:
        """Rows that so many steps take, from one pass over the data after the other."""
        passes, rest = divmod(steps, self._per_epoch)
        step = self.args.batch_size * self.args.gradient_accumulation * world_size()
        return passes * len(self.train) + min(rest * step, len(self.train))

    def whole(self) -> Result:
        """Both stages, or what they came to where the run is complete."""
        self.prepare()
        if self.resume and (found := self._found()) is not None:
            return found
        before = self.first_stage()
        done, decided = before.steps, bank_of(self.model).assignment.decided
        method = self.config.method
        statistics = () if method.warms_up and (done or decided) else method.statistics
        stage = method.warmup(self.total) if done else None
        part = None
        if stage is not None:
            row = self._rows(done) if stage.sample_ratio == 1.0 else 0
            part = Part(self.total, done, row, before.known)
        trainer, events = self._stage("main", self.total - done, self.train, statistics, part=part)
        if is_needed(self.model):
            save(self.model, self.folder / "adapter")
        metrics = {} if self.dev is None else dev_metrics(trainer)
        plan = plan_of(self.model)
        epochs = done / self._per_epoch
        history = [*before.history, *trainer.history("main", done, epochs)]
        seconds = before.seconds + events.seconds_before
        result = Result(
            metrics=metrics, parameters=plan.parameters, steps=done + trainer.state.global_step,
            seconds=seconds, history=history, plan=plan, complete=trainer.complete,
        )  # fmt: skip
        if is_first_rank():
            write_json(self.folder / "plan.json", plan.to_dict())
            write_json(self.folder / RESULT, result.to_dict())
        wait()
        return result

    def _found(self) -> Result | None:
        """The result of a complete run, its adapters in the model; None where something is left."""
        try:
            record = read_json(self.folder / RESULT)
            if not record.get("complete") or not (record["metrics"] or self.dev is None):
                return None
            adapters = read(self.folder / "adapter")
        except FileNotFoundError:
            return None
        except ValueError as error:
            _log.warning("%s. Going on from the run's last checkpoint", error)
            return None
        fill(self.model, adapters)
        return Result(**record, plan=plan_of(self.model))

    def prepare(self) -> None:
        """Inject, unless the model carries adapters of this configuration."""
        require_own(self.model, "give it to a Trainer with callbacks=[loradrop.LoraDropCallback()]")
        set_seed(self.args.seed)
        tell_precision(self.args.precision)
        if not has_bank(self.model):
            inject(self.model, self.config)
        elif not (self.resume and resumable(self.folder)):
            _require_usable(self.model)
        require_unmerged(self.model)
        require_gradients(self.model)
        if _in_order(injection_of(self.model).config) != _in_order(self.config):
            raise ValueError(
                "the model was injected with another configuration: pass the same one, or "
                "config=None, which takes the adapters that it carries, or call "
                "loradrop.remove(model) first"
            )

    def first_stage(self) -> Boundary:
        """The warm-up of a method that has one, and what it decides."""
        decided = bank_of(self.model).assignment.decided
        stage = None if decided else self.config.method.stage(self.total)
        # Refused before the warm-up, not after it.
        self._arguments("main", self.total - (stage.steps if stage else 0))
        if self.resume and (before := taken(self.model, self.folder)) is not None:
            return before
        if stage is None:
            if self.resume and decided and any(self.folder.glob("warmup/checkpoint-*")):
                raise ValueError(
                    f"the model has decided, and what {self.folder} should hold of its warm-up was "
                    "not written to the end: resume with a new model, or call "
                    "loradrop.remove(model) first"
                )
            self._record()
            return Boundary()
        before = self._warm_up(stage)
        before.write(self.model, self.folder)
        return before

    def _options(self) -> dict[str, dict[str, Any]]:
        """What a resume must agree with, as the file beside the checkpoints holds it."""
        lora, train = self.config.to_dict(), asdict(self.args)
        train["processes"] = world_size()
        train["extra"] = {k: v for k, v in train["extra"].items() if not k.endswith("_token")}
        data = {"model": base_of(self.model), "data": self.data, "lora": lora, "train": train}
        # In sections of their own: a run that was begun before there were any has none of them.
        count, cut = len(self.train), getattr(self.train, "max_length", None)
        data |= {"rows": {"count": count, "max_length": cut}, "parameters": {"dtype": self._dtypes}}
        return json.loads(json.dumps(data, default=str))  # type: ignore[no-any-return]

    @property
    def _dtypes(self) -> list[str]:
        """Those of the model's own parameters."""
        found = parameters_of(self.model).items()
        return sorted({str(p.dtype) for name, p in found if not name.startswith("lora_bank.")})

    def _record(self) -> None:
        """The plan as it is now, with what the run knows of it."""
        plan, seeds = plan_of(self.model), {"train": self.args.seed}
        injection_of(self.model).plan = replace(plan, data=self.data, seeds=seeds)

    def _warm_up(self, stage: Warmup) -> Boundary:
        """Stage one: train LoRA on every target, measure, decide, share."""
        rows, method = self.train, self.config.method
        method.check(bank_of(self.model).targets)
        tell_in_vain(self.model)
        if stage.sample_ratio < 1.0:
            rows = sample_of(rows, stage.sample_ratio, self.args.seed)
        online = stage.source == "online" or stage.settle_every
        collected = method.statistics if online else ()
        part = Part(self.total)
        trainer, events = self._stage("warmup", stage.steps, rows, collected, stage, part)
        steps = trainer.state.global_step
        if steps < stage.steps and not events.settled:
            on = "without output_dir nothing of it is kept"
            if self.kept:
                on = "the same call with resume=True (the command: --resume) goes on from there"
            raise RuntimeError(
                f"the run was stopped at step {steps} of the {stage.steps} of its warm-up, and has "
                f"decided nothing: {on}"
            )
        set_seed(self.args.seed)
        if stage.source == "offline" or events.collector is None:
            gram = "gram_in" in method.statistics
            batches = trainer.some_batches(rows) if gram else trainer.get_eval_dataloader(rows)
            masking = self._masking._asdict()
            scores = probe(self.model, batches, gram=gram, **masking)
        else:
            scores = events.collector.scores()
        try:
            update = conclude(self.model, scores, events.record(steps))
        except ValueError:
            if is_first_rank():  # nothing that another try could go on from
                shutil.rmtree(self.folder / "warmup", ignore_errors=True)
            raise
        self._record()
        known = state_by_name(self.model, kept_state(trainer.optimizer, update))
        return Boundary(steps, events.seconds_before, trainer.history("warmup"), known)

    @property
    def _masking(self) -> Masking:
        return Masking(self.args.mask, self.mask_fn)

    def _arguments(self, stage: str, steps: int, part: Part | None = None) -> TrainingArguments:
        return training_arguments(
            self.args, self.folder / stage, steps, warm_up=stage == "warmup",
            has_dev=self.dev is not None, total=None if part is None else part.steps,
        )  # fmt: skip

    def _progress(self, stage: str) -> list[TrainerCallback]:
        """The bar of a stage, where the user has not switched bars off."""
        return [] if self.args.extra.get("disable_tqdm") else [Progress(stage)]

    def _stage(
        self,
        name: str,
        steps: int,
        rows: Any,
        statistics: Sequence[str],
        warmup: Warmup | None = None,
        part: Part | None = None,
    ) -> tuple[LoRATrainer, MethodCallback]:
        """One run of the Trainer on `rows`, from its last whole checkpoint where there is one."""
        checkpoint = last_checkpoint(self.folder / name) if self.resume else None
        events = MethodCallback(
            self.model, statistics=statistics, masking=self._masking, warmup=warmup
        )
        callbacks = self.callbacks
        if name == "warmup":  # it is not evaluated
            kind = EarlyStoppingCallback
            callbacks = [c for c in callbacks if not isinstance(c, kind) and c is not kind]
        own = rows.collate_fn if isinstance(rows, DataLoader) else None
        trainer = LoRATrainer(
            self.model,
            self._arguments(name, steps, part),
            events=events,
            part=part,
            head_rate=self.args.head_learning_rate,
            train_dataset=rows,
            eval_dataset=self.dev,
            data_collator=self.collate or own,
            processing_class=self.processing_class,
            compute_metrics=None if self.metric is None else checked(self.metric),
            callbacks=[*self._progress(name), *callbacks, LastStep()],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.go_on(checkpoint)
        finally:
            events.detach()
        return trainer, events


def _in_order(config: LoRAConfig) -> LoRAConfig:
    """With the names of its targets sorted: PEFT's files have them in any order."""
    names = config.target_modules
    if names is None or isinstance(names, str):
        return config
    return replace(config, target_modules=sorted(names))


def _require_usable(model: nn.Module) -> None:
    """Raises ValueError for adapters that a run before this one left broken; says that it goes on
    from them where they are not.
    """
    injection, total = injection_of(model), sum_of(bank_of(model))
    if total is not None and not math.isfinite(total):
        raise ValueError(
            "the model's adapters are not finite, as a run before this one left them: call "
            "loradrop.remove(model) first, or load a checkpoint"
        )
    if injection.stepped:
        _log.warning(
            "going on from the adapters that a run before this one trained: loradrop.remove(model) "
            "takes them away"
        )
