"""Training: two runs of transformers' Trainer, warm-up and main, with `update` between them.

    fit = inject -> warm-up (its own passes are the probe) -> select -> share -> main run

The boundary is a file: once `start/` holds the adapters that the main run begins with, a resume
goes on from there.
"""

import logging
import math
import operator
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from loradrop.bank import bank_of, has_bank
from loradrop.callbacks import MethodCallback, Progress
from loradrop.config import LoRAConfig, TrainConfig
from loradrop.files import read_json, write_json
from loradrop.formats.native import read, save
from loradrop.injection import base_of, injection_of, plan_of
from loradrop.loading import fill
from loradrop.methods import Method
from loradrop.methods.base import Warmup
from loradrop.plan import Plan
from loradrop.probing import probe
from loradrop.sampling import stratified_indices
from loradrop.scores import Scores
from loradrop.selection import keep_frequency
from loradrop.surgery import inject
from loradrop.trainer import LoRATrainer, last_checkpoint, training_arguments

OPTIONS = "options.json"
_WRAPPED = ("forward", "_original_forward")  # what accelerate's mixed precision sets on a model
_TIMINGS = ("_runtime", "_per_second", "_preparation_time")
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
        return {
            name: getattr(self, name)
            for name in ("metrics", "parameters", "steps", "seconds", "history")
        }


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
    with tempfile.TemporaryDirectory() as scratch, _forward_kept(model):
        run = _Run(
            model=model, train=train, dev=dev, config=config, args=args or TrainConfig(),
            metric=metric, collate=collate, folder=Path(output_dir or scratch), resume=resume,
            data=dict(data or {}), mask=mask, callbacks=callbacks,
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
        model=model, train=train, dev=None, config=config, args=args or TrainConfig(),
        metric=None, collate=collate, folder=Path(output_dir), resume=resume,
        data=dict(data or {}), mask=mask, callbacks=(),
    )  # fmt: skip
    if config.method.warmup(run.total) is None:
        raise ValueError(
            f"the method {config.method.name!r} measures nothing: choose one with a warm-up, such "
            "as lora_drop"
        )
    with _forward_kept(model):
        run.first_stage()
    return plan_of(model)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One `fit`; its fields are the arguments of `fit`."""

    model: nn.Module
    train: Any
    dev: Any
    config: LoRAConfig
    args: TrainConfig
    metric: Metric | None
    collate: Callable[[list[Any]], Any] | None
    folder: Path
    resume: bool
    data: dict[str, str]
    mask: str | None
    callbacks: Sequence[Any]

    def __post_init__(self) -> None:
        train = self.train
        if not hasattr(train, "__len__"):
            raise ValueError(
                f"train is a {type(train).__name__} without a length: give a Dataset with one, or "
                "a list"
            )
        if len(train) == 0:
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
        metrics = {} if self.dev is None else _metrics(trainer.evaluate())
        save(self.model, self.folder / "adapter")
        plan = plan_of(self.model)
        result = Result(
            metrics=metrics,
            parameters=plan.parameters,
            steps=self.total,
            seconds=float(before["seconds"]) + events.seconds_before,
            history=[*before["history"], *_history(trainer, "main", done)],
            plan=plan,
        )
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
        """What a resume must agree with: it lies beside the checkpoints."""
        lora, train = self.config.to_dict(), _plain(asdict(self.args))
        return {"model": base_of(self.model), "data": self.data, "lora": lora, "train": train}

    def _record(self, **measured: Any) -> None:
        """The plan as it is now, with what the run knows of it."""
        plan, seeds = plan_of(self.model), {"train": self.args.seed}
        injection_of(self.model).plan = replace(plan, data=self.data, seeds=seeds, **measured)

    def _require_same_run(self, options: dict[str, dict[str, Any]]) -> None:
        file = self.folder / OPTIONS
        if not file.exists():
            return
        if not self.resume:
            raise ValueError(
                f"{self.folder} holds a run already: resume it, or choose another output"
            )
        for section, before in read_json(file).items():
            now = options.get(section, {})
            changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
            if changed:
                raise ValueError(
                    f"{self.folder} was begun with other options ({section}: {', '.join(changed)})"
                    ": resume with the same, or choose another output"
                )

    def _warm_up(self, stage: Warmup) -> dict[str, Any]:
        """Stage one: train LoRA on every target, measure, decide, share."""
        method, injection, rows = self.config.method, injection_of(self.model), self.train
        if stage.sample_ratio < 1.0:
            rows = _sample(rows, stage.sample_ratio, self.args.seed)
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
            raise ValueError(
                f"the warm-up of {steps} steps left B at zero, so nothing was measured: choose a "
                "longer one"
            )
        method.update(bank_of(self.model), scores)
        record = {
            "steps": steps,
            "planned": stage.steps,
            "settled": events.settled,
            "frequency": _frequency(method, scores),
        }
        injection.plan = None  # not what an earlier run recorded
        self._record(scores=scores.to_dict(), warmup=record)
        return {
            "steps": steps,
            "seconds": events.seconds_before,
            "history": _history(trainer, "warmup", 0),
        }

    def _stage(
        self, name: str, steps: int, rows: Any, statistics: Sequence[str], settle_every: int = 0
    ) -> tuple[LoRATrainer, MethodCallback]:
        """One run of the Trainer on `rows`, from its last whole checkpoint where there is one."""
        folder = self.folder / name
        checkpoint = last_checkpoint(folder) if self.resume else None
        events = MethodCallback(
            self.model, statistics=statistics, mask=self.mask, settle_every=settle_every
        )
        trainer = LoRATrainer(
            self.model,
            training_arguments(
                self.args, folder, steps, warm_up=name == "warmup", has_dev=self.dev is not None
            ),
            events=events,
            train_dataset=rows,
            eval_dataset=self.dev,
            data_collator=self.collate
            or (rows.collate_fn if isinstance(rows, DataLoader) else None),
            compute_metrics=self.metric,
            callbacks=[Progress(name), *self.callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.go_on(checkpoint)
        finally:
            events.detach()
        return trainer, events


def _frequency(method: Method, scores: Scores) -> dict[str, float] | None:
    if method.decide(scores) is None or len(scores.rows) < 2:
        return None
    return keep_frequency(scores, lambda drawn: method.decide(drawn) or [])


def _sample(train: Any, ratio: float, seed: int) -> Subset[Any]:
    if isinstance(train, DataLoader):
        raise ValueError(
            f"sample_ratio={ratio} needs a dataset to draw from, not a DataLoader: pass its "
            "dataset, or sample_ratio=1"
        )
    first = train[0]
    key = next((k for k in ("labels", "label") if k in first and _is_class(first[k])), None)
    columns = getattr(train, "column_names", ())  # of `datasets`, where a column is read at once
    labels = None
    if key is not None:
        labels = [
            int(v)
            for v in (train[key] if key in columns else (train[i][key] for i in range(len(train))))
        ]
    return Subset(train, stratified_indices(labels, len(train), ratio, seed))


def _is_class(label: Any) -> bool:
    try:
        operator.index(label)
    except TypeError:
        return False
    return True


@contextmanager
def _forward_kept(model: nn.Module) -> Iterator[None]:
    """Mixed precision wraps `model.forward`; afterwards it is as it was, and can be pickled."""
    before = {key: model.__dict__[key] for key in _WRAPPED if key in model.__dict__}
    try:
        yield
    finally:
        for key in _WRAPPED:
            model.__dict__.pop(key, None)
        model.__dict__.update(before)


def _metrics(logged: Mapping[str, Any]) -> dict[str, Any]:
    """Without the epoch and the timings, which differ from run to run."""
    kept = {k: v for k, v in logged.items() if k != "epoch" and not k.endswith(_TIMINGS)}
    return {key.removeprefix("eval_"): value for key, value in kept.items()}


def _history(trainer: LoRATrainer, stage: str, offset: int) -> list[dict[str, Any]]:
    """What was logged at each step, without the Trainer's summaries and timings."""
    return [
        {k: v for k, v in entry.items() if not k.endswith(_TIMINGS)}
        | {"stage": stage, "step": int(entry["step"]) + offset}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
