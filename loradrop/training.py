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

from loradrop.bank import AdapterBank, bank_of
from loradrop.config import LoRAConfig
from loradrop.files import read_json, write_json
from loradrop.formats.native import read, restore, save
from loradrop.methods import Method
from loradrop.plan import Plan, base_of, plan_of
from loradrop.probing import probe
from loradrop.sampling import stratified_indices
from loradrop.selection import Scores, keep_frequency
from loradrop.settings import TrainConfig, training_arguments
from loradrop.surgery import inject
from loradrop.trainer import LoRATrainer, MethodCallback, Progress, last_checkpoint

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

    A model whose targets share already, by `share` or `load`, has no warm-up. Raises ValueError for
    empty data, a loss that is not finite, and a resume with other options.
    """
    with tempfile.TemporaryDirectory() as scratch, _forward_kept(model):
        folder = Path(output_dir or scratch)
        run = _Run(
            model,
            train,
            dev,
            config,
            args or TrainConfig(),
            metric,
            collate,
            folder,
            mask,
            callbacks,
        )
        return run(resume, dict(data or {}))


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
    if not config.method.statistic:
        raise ValueError(
            f"the method {config.method.name!r} measures nothing: choose one with a warm-up, such "
            "as lora_drop"
        )
    run = _Run(
        model, train, None, config, args or TrainConfig(), None, collate, Path(output_dir), mask, ()
    )
    with _forward_kept(model):
        run.warm_up(resume, dict(data or {}))
    return plan_of(model)


class _Run:
    """The state of one `fit`."""

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        dev: Any,
        config: LoRAConfig,
        args: TrainConfig,
        metric: Metric | None,
        collate: Callable[[list[Any]], Any] | None,
        folder: Path,
        mask: str | None,
        callbacks: Sequence[Any],
    ) -> None:
        self.model, self.train, self.dev, self.config, self.args = model, train, dev, config, args
        self.metric, self.collate, self.folder, self.mask, self.callbacks = (
            metric,
            collate,
            folder,
            mask,
            callbacks,
        )
        if not hasattr(train, "__len__"):
            raise ValueError(
                f"train is a {type(train).__name__} without a length: give a Dataset with one, or "
                "a list"
            )
        if len(train) == 0:
            raise ValueError("train is empty: give at least one example")
        batches = (
            len(train) if isinstance(train, DataLoader) else math.ceil(len(train) / args.batch_size)
        )
        per_epoch = math.ceil(batches / args.gradient_accumulation)
        self.total = args.steps or max(1, math.ceil(args.epochs * per_epoch))

    def __call__(self, resume: bool, data: dict[str, str]) -> Result:
        """Both stages."""
        before = self.warm_up(resume, data)
        done = int(before["steps"])
        trainer, events = self._stage("main", self.total - done, resume, collect=False)
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

    def warm_up(self, resume: bool, data: dict[str, str]) -> dict[str, Any]:
        """Inject, and the first stage of a method that has one. Steps, seconds and history."""
        options = self._options(data)
        self._require_same_run(options, resume)
        set_seed(self.args.seed)
        if not isinstance(getattr(self.model, "lora_bank", None), AdapterBank):
            inject(self.model, self.config)
        bank = bank_of(self.model)
        if bank.config != self.config:
            raise ValueError(
                "the model was injected with another configuration: pass model.lora_bank.config, "
                "or call loradrop.remove(model) first"
            )
        planned = self.config.method.warmup_steps(self.total)
        write_json(self.folder / OPTIONS, options)
        if resume and (before := self._start()) is not None:
            return before
        if not planned or bank.slots != list(range(len(bank.targets))):
            bank.plan = replace(plan_of(self.model), data=data, seeds={"train": self.args.seed})
            return {"steps": 0, "seconds": 0.0, "history": []}
        before = self._warm_up(planned, resume, data)
        write_json(self.folder / "warmup.json", before)
        save(self.model, self.folder / "start")
        return before

    def _start(self) -> dict[str, Any] | None:
        """Take what the warm-up ended with, where it is whole; if not, it is made anew."""
        try:
            plan, tensors = read(self.folder / "start")
            before: dict[str, Any] = read_json(self.folder / "warmup.json")
        except FileNotFoundError:
            return None
        except ValueError as error:
            _log.warning("%s. Going on from the warm-up's last checkpoint", error)
            return None
        restore(self.model, plan, tensors)
        return before

    def _options(self, data: dict[str, str]) -> dict[str, dict[str, Any]]:
        """What a resume must agree with: it lies beside the checkpoints."""
        train: dict[str, Any] = _plain(asdict(self.args))
        return {
            "model": base_of(self.model),
            "data": data,
            "lora": self.config.to_dict(),
            "train": train,
        }

    def _require_same_run(self, options: dict[str, dict[str, Any]], resume: bool) -> None:
        file = self.folder / OPTIONS
        if not file.exists():
            return
        if not resume:
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

    def _warm_up(self, planned: int, resume: bool, data: dict[str, str]) -> dict[str, Any]:
        """Stage one: train LoRA on every target, measure, decide, share."""
        method, bank = self.config.method, bank_of(self.model)
        whole, ratio = self.train, method.sample_ratio_of_warmup()
        if ratio < 1.0:
            self.train = _sample(whole, ratio, self.args.seed)
        trainer, events = self._stage(
            "warmup", planned, resume, collect=method.statistic is not None
        )
        steps = trainer.state.global_step
        set_seed(self.args.seed)
        if events.collector is None or method.measures_offline():
            scores = probe(self.model, trainer.get_eval_dataloader(self.train), mask=self.mask)
        else:
            scores = bank.scores = events.collector.scores()
        self.train = whole
        if not any(scores.values()):
            raise ValueError(
                f"the warm-up of {steps} steps left B at zero, so nothing was measured: choose a "
                "longer one"
            )
        record = {
            "steps": steps,
            "planned": planned,
            "settled": events.settled,
            "frequency": _frequency(method, scores),
        }
        kept = method.update(bank, scores)
        bank.plan = None
        bank.plan = replace(
            plan_of(self.model),
            kept=None if kept is None else tuple(kept),
            scores=scores.to_dict(),
            warmup=record,
            data=data,
            seeds={"train": self.args.seed},
        )
        return {
            "steps": steps,
            "seconds": events.seconds_before,
            "history": _history(trainer, "warmup", 0),
        }

    def _stage(
        self, name: str, steps: int, resume: bool, *, collect: bool
    ) -> tuple[LoRATrainer, MethodCallback]:
        """One run of the Trainer, from its last whole checkpoint where there is one."""
        folder = self.folder / name
        checkpoint = last_checkpoint(folder) if resume else None
        events = MethodCallback(self.model, collect=collect, mask=self.mask)
        trainer = LoRATrainer(
            self.model,
            training_arguments(
                self.args,
                folder,
                steps=steps,
                warm_up=name == "warmup",
                has_dev=self.dev is not None,
            ),
            events=events,
            train_dataset=self.train,
            eval_dataset=self.dev,
            data_collator=self.collate
            or (self.train.collate_fn if isinstance(self.train, DataLoader) else None),
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
