"""Training: two runs of transformers' Trainer, warm-up and main, with `update` between them.

    fit = inject -> warm-up (its own passes are the probe) -> select -> share -> main run

The boundary is a file: once `start/` holds the adapters that the main run begins with, a resume
goes on from there.
"""

import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from loradrop.bank import bank_of, has_bank
from loradrop.callbacks import MethodCallback, Progress
from loradrop.config import LoRAConfig, TrainConfig
from loradrop.files import read_json, write_json
from loradrop.injection import base_of, injection_of, plan_of
from loradrop.loading import fill
from loradrop.methods import Method
from loradrop.methods.base import Warmup
from loradrop.native import read, save
from loradrop.plan import Plan
from loradrop.probing import probe
from loradrop.sampling import sample_of
from loradrop.scores import Scores
from loradrop.selection import keep_frequency
from loradrop.surgery import inject
from loradrop.trainer import LoRATrainer, forward_kept, last_checkpoint, training_arguments

OPTIONS = "options.json"
_log = logging.getLogger(__name__)
Metric = Callable[[Any], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a `fit` came to. `history`: dicts with stage, step and what the Trainer logged at it."""

    metrics: Mapping[str, float]
    parameters: int
    steps: int
    seconds: float
    history: Sequence[Mapping[str, Any]]
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """Plain data for result.json; the plan has a file of its own."""
        names = ("metrics", "parameters", "steps", "seconds", "history")
        return {name: getattr(self, name) for name in names}


def fit(
    model: nn.Module,
    train: Any,
    dev: Any,
    config: LoRAConfig,
    *,
    args: TrainConfig | None = None,
    metric: Metric | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    data: Mapping[str, str] | None = None,
    mask: str | None = "attention_mask",
    callbacks: Sequence[Any] = (),
) -> Result:
    """Adapt `model` to `train` by `config`, and measure it on `dev`.

    model         a PreTrainedModel, injected or not; it returns a loss when the batch has labels
    train, dev    a Dataset of torch or datasets, a DataLoader, or a list of dicts; dev may be None
    metric        EvalPrediction -> name: value, as Trainer's compute_metrics
    output_dir    checkpoints, the plan, the adapters; None keeps nothing and cannot resume
    resume        go on from what is in output_dir, with the model, data and options it was begun
                  with, to the same end as an uninterrupted run
    data          fingerprints of the rows, for the plan
    mask          the model's input that marks real tokens, for the statistics

    A model for which `share` or `load` has decided already has no warm-up. Raises ValueError for
    empty data, a loss that is not finite, and a resume with other options.
    """
    with tempfile.TemporaryDirectory() as scratch, forward_kept(model):
        run = _Run(
            model, train, config, args or TrainConfig(), collate,
            Path(output_dir or scratch).expanduser(), resume, dict(data or {}), mask,
            dev, metric, callbacks,
        )  # fmt: skip
        return run.whole()


def warm_up(
    model: nn.Module,
    train: Any,
    config: LoRAConfig,
    *,
    args: TrainConfig | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    output_dir: str | Path,
    resume: bool = False,
    data: Mapping[str, str] | None = None,
    mask: str | None = "attention_mask",
) -> Plan:
    """The first stage of `fit` alone, up to the decision; `fit(..., resume=True)` goes on from it.

    The arguments are those of `fit`. Raises ValueError for a method without a warm-up.
    """
    run = _Run(
        model, train, config, args or TrainConfig(), collate, Path(output_dir).expanduser(),
        resume, dict(data or {}), mask,
    )  # fmt: skip
    if config.method.warmup(run.total) is None:
        raise ValueError(f"the method {config.method.name!r} measures nothing: try lora_drop")
    with forward_kept(model):
        run.first_stage()
    return plan_of(model)


@dataclass(frozen=True)
class _Run:
    """One `fit`; its fields are the arguments of `fit`."""

    model: nn.Module
    train: Any
    config: LoRAConfig
    args: TrainConfig
    collate: Callable[[list[Any]], Any] | None
    folder: Path
    resume: bool
    data: dict[str, str]
    mask: str | None
    dev: Any = None
    metric: Metric | None = None
    callbacks: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if not hasattr(self.train, "__len__"):
            kind = type(self.train).__name__
            raise ValueError(f"train is a {kind} without a length: give a sized Dataset or a list")
        if len(self.train) == 0:
            raise ValueError("train is empty: give at least one example")

    @property
    def total(self) -> int:
        """Optimiser steps of both stages."""
        rows, args = len(self.train), self.args
        loaded = isinstance(self.train, DataLoader)
        batches = rows if loaded else math.ceil(rows / args.batch_size)
        per_epoch = math.ceil(batches / args.gradient_accumulation)
        return args.steps or max(1, math.ceil(args.epochs * per_epoch))

    def whole(self) -> Result:
        """Both stages."""
        before = self.first_stage()
        done, method = int(before["steps"]), self.config.method
        statistics = () if method.warmup(self.total) else method.statistics
        trainer, events = self._stage("main", self.total - done, self.train, statistics)
        metrics = {} if self.dev is None else trainer.dev_metrics()
        save(self.model, self.folder / "adapter")
        plan = plan_of(self.model)
        history = [*before["history"], *trainer.history("main", done)]
        seconds = float(before["seconds"]) + events.seconds_before
        result = Result(
            metrics=metrics, parameters=plan.parameters, steps=self.total,
            seconds=seconds, history=history, plan=plan,
        )  # fmt: skip
        write_json(self.folder / "plan.json", plan.to_dict())
        write_json(self.folder / "result.json", result.to_dict())
        return result

    def first_stage(self) -> dict[str, Any]:
        """Inject, and the warm-up of a method that has one. Steps, seconds and history."""
        options = self._options()
        self._require_same_run(options)
        set_seed(self.args.seed)
        if not has_bank(self.model):
            inject(self.model, self.config)
        injection = injection_of(self.model)
        if injection.config != self.config:
            raise ValueError(
                "the model was injected with another configuration: pass the same one, or call "
                "loradrop.remove(model) first"
            )
        stage = self.config.method.warmup(self.total)
        write_json(self.folder / OPTIONS, options)
        if self.resume and (before := self._start()) is not None:
            return before
        assignment = bank_of(self.model).assignment
        if stage is None or assignment.shares or assignment.kept is not None:
            self._record()
            return {"steps": 0, "seconds": 0.0, "history": []}
        before = self._warm_up(stage)
        write_json(self.folder / "warmup.json", before)
        save(self.model, self.folder / "start")
        return before

    def _start(self) -> dict[str, Any] | None:
        """Take what the warm-up ended with, where that is whole; None where it has to be made."""
        try:
            start = read(self.folder / "start")
            before: dict[str, Any] = read_json(self.folder / "warmup.json")
        except FileNotFoundError:
            return None
        except ValueError as error:
            _log.warning("%s. Going on from the warm-up's last checkpoint", error)
            return None
        fill(self.model, start)
        return before

    def _options(self) -> dict[str, dict[str, Any]]:
        """What a resume must agree with, as the file beside the checkpoints holds it."""
        lora, train = self.config.to_dict(), asdict(self.args)
        data = {"model": base_of(self.model), "data": self.data, "lora": lora, "train": train}
        return json.loads(json.dumps(data))  # type: ignore[no-any-return]

    def _record(self, **measured: Any) -> None:
        """The plan as it is now, with what the run knows of it."""
        plan, seeds = plan_of(self.model), {"train": self.args.seed}
        injection_of(self.model).plan = replace(plan, data=self.data, seeds=seeds, **measured)

    def _require_same_run(self, options: dict[str, dict[str, Any]]) -> None:
        file = self.folder / OPTIONS
        if not file.exists():
            return
        if not self.resume:
            raise ValueError(f"{self.folder} holds a run already: resume, or choose another output")
        for section, before in read_json(file).items():
            now = options.get(section, {})
            names = {*before, *now}
            changed = sorted(k for k in names if not _equal(before.get(k), now.get(k)))
            if changed:
                raise ValueError(
                    f"{self.folder} was begun with other options ({section}: {', '.join(changed)})"
                    ": resume with the same, or choose another output"
                )

    def _warm_up(self, stage: Warmup) -> dict[str, Any]:
        """Stage one: train LoRA on every target, measure, decide, share."""
        method, injection, rows = self.config.method, injection_of(self.model), self.train
        if stage.sample_ratio < 1.0:
            rows = sample_of(rows, stage.sample_ratio, self.args.seed)
        trainer, events = self._stage(
            "warmup", stage.steps, rows, method.statistics, stage.settle_every
        )
        steps = trainer.state.global_step
        set_seed(self.args.seed)
        if stage.source == "offline" or events.collector is None:
            scores = probe(self.model, trainer.get_eval_dataloader(rows), mask=self.mask)
        else:
            scores = injection.scores = events.collector.scores()
        if not any(scores.values()):
            raise ValueError(f"the warm-up of {steps} steps left B at zero: make it longer")
        method.update(bank_of(self.model), scores)
        record = {"steps": steps, "planned": stage.steps, "settled": events.settled}
        injection.plan = None  # not what an earlier run recorded
        warmup = record | {"frequency": _frequency(method, scores)}
        self._record(scores=scores.to_dict(), warmup=warmup)
        history = trainer.history("warmup")
        return {"steps": steps, "seconds": events.seconds_before, "history": history}

    def _stage(
        self, name: str, steps: int, rows: Any, statistics: Sequence[str], settle_every: int = 0
    ) -> tuple[LoRATrainer, MethodCallback]:
        """One run of the Trainer on `rows`, from its last whole checkpoint where there is one."""
        folder = self.folder / name
        checkpoint = last_checkpoint(folder) if self.resume else None
        events = MethodCallback(
            self.model, statistics=statistics, mask=self.mask, settle_every=settle_every
        )
        warm_up, has_dev = name == "warmup", self.dev is not None
        own = rows.collate_fn if isinstance(rows, DataLoader) else None
        arguments = training_arguments(self.args, folder, steps, warm_up=warm_up, has_dev=has_dev)
        trainer = LoRATrainer(
            self.model,
            arguments,
            events=events,
            train_dataset=rows,
            eval_dataset=self.dev,
            data_collator=self.collate or own,
            compute_metrics=self.metric,
            callbacks=[Progress(name), *self.callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.go_on(checkpoint)
        finally:
            events.detach()
        return trainer, events


def _equal(before: Any, now: Any) -> bool:
    """Lists of names are sets: their order says nothing."""
    if isinstance(before, list) and isinstance(now, list):
        return sorted(map(str, before)) == sorted(map(str, now))
    return bool(before == now)


def _frequency(method: Method, scores: Scores) -> dict[str, float] | None:
    if method.decide(scores) is None or len(scores.rows) < 2:
        return None
    return keep_frequency(scores, lambda drawn: method.decide(drawn) or [])
