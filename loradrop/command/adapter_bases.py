"""The base model that an adapter, native or PEFT's, was trained on, and its tokenizer."""

import copy
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from loradrop import native
from loradrop.command.base_models import (
    architecture,
    naming,
    on_meta,
    remember,
    require_free,
    resolve_model,
    tokenizer_at,
    tokenizer_of,
)
from loradrop.config import DTYPES
from loradrop.formats import peft_file, peft_load
from loradrop.wrapped import embedding_names, embedding_of


def load_base(
    adapter: str | Path,
    model_id: str | None = None,
    dtype: str = "float32",
    *,
    revision: str | None = None,
    option: str = "model_id=",
) -> tuple[Any, str]:
    """(the base model that an adapter, native or PEFT's, was trained on; its id or path).

    `dtype` is one of `DTYPES`, or "auto", the one that the base is stored in. `model_id` and
    `revision` replace those that the adapter names; the same id by itself is of the same revision.
    Errors say `option` for where to give the first. The head gets the size of the tensors that were
    saved, and the names of the classes that the adapter was trained for. Raises ValueError where no
    model of transformers is named, and for one that cannot be loaded, FileNotFoundError where there
    is no adapter.
    """
    base, saved = base_named_by(adapter)
    name = model_id or base.get("id") or ""
    where = resolve_model(name, revision)
    if revision is None and name == where == base.get("id"):
        revision = base.get("revision")
    cls = getattr(transformers, str(base.get("class")), None)
    remedy = f"{adapter} names it. Where it lies elsewhere, give its folder or id with {option}. "
    named = functools.partial(naming, where, revision, "" if model_id else remedy)
    config: Any = None
    if where and (cls is not None or base.get("class") is None):
        with named():
            config = transformers.AutoConfig.from_pretrained(where, revision=revision)
        if cls is None or type(config) not in getattr(cls, "_model_mapping", (type(config),)):
            cls = architecture(config)
    if cls is None or not where:
        raise ValueError(
            f"{adapter} does not name a model to load (class {base.get('class')}, id "
            f"{base.get('id')!r}): give the id or path of a model of transformers with {option}"
        )
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        raise ValueError(
            f"{adapter} was trained on a {cls.__name__}, and {where} is a {config.model_type} "
            f"({type(config).__name__}): give the model that it was trained on with {option}"
        )
    sizes = [config.num_labels, *(len(tensor) for tensor in saved.values() if tensor.ndim)]
    config.num_labels = next((n for n in sizes if _holds(cls, config, n, saved)), sizes[0])
    labels = base.get("labels") or ()
    if len(labels) == config.num_labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    if base.get("problem_type"):
        config.problem_type = base["problem_type"]
    options = {"revision": revision, "dtype": DTYPES.get(dtype, dtype)}
    with named():
        model, info = cls.from_pretrained(
            where, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    require_free(where, sorted(info["mismatched_keys"]), saved)
    _add_tokens(model, saved)
    _untie(model, saved, base.get("apart") or ())
    remember(model, name, revision)
    return model.eval(), where


def base_named_by(adapter: str | Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """(id, revision and class of the base model as the adapter says them, its tensors trained
    whole). The class is None where a PEFT folder leaves it open; `apart` names those tensors that
    were tied to nothing, as of those of which PEFT trained a copy.
    """
    if native.is_native(adapter) or not peft_load.is_peft(adapter):
        file = native.read(adapter)
        alone = [] if file.tied is None else [k for k in file.trained if k not in file.tied]
        return {**file.plan.base, "apart": alone}, file.trained
    found = peft_file.read(adapter)
    said = {"id": "base_model_name_or_path", "revision": "revision"}
    base = {name: found.config.get(key) for name, key in said.items()}
    task, mapping = found.config.get("task_type"), found.config.get("auto_mapping") or {}
    base["class"] = peft_file.loader_of(task)
    if task is None and hasattr(transformers, str(mapping.get("base_model_class"))):
        base["class"] = mapping["base_model_class"]  # where PEFT wrapped it without a task
    apart = [key for key in found.others if peft_load.is_apart(key, found.config)]
    return base | {"apart": apart}, found.others


def tokenizer_for(adapter: str | Path, model: Any, words: bool = False) -> Any:
    """The tokenizer that an adapter was saved with, else that of its base `model`."""
    return own_tokenizer(adapter, words) or tokenizer_of(model, words)


def own_tokenizer(adapter: str | Path, words: bool = False) -> Any:
    """The tokenizer that lies beside an adapter; None where none does."""
    there = (Path(adapter) / "tokenizer_config.json").is_file()
    return tokenizer_at(str(adapter), words) if there else None


def _holds(cls: Any, config: Any, num_labels: int, saved: Mapping[str, Tensor]) -> bool:
    """Whether a model with that many labels, and as many tokens as were saved, has the saved
    tensors in their shapes.
    """
    config = copy.deepcopy(config)  # another number of labels forgets their names
    config.num_labels = num_labels
    model = on_meta(cls, config)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if (table := _saved_table(model, saved)) is not None:  # then what has a row for each token
        rows = len(model.get_input_embeddings().weight)
        for key in [key for key, shape in shapes.items() if key in saved and shape[:1] == (rows,)]:
            if len(saved[key]) == len(table):
                shapes[key] = torch.Size((len(table), *shapes[key][1:]))
    return all(shapes.get(key) == value.shape for key, value in saved.items())


def _add_tokens(model: Any, saved: Mapping[str, Tensor]) -> None:
    """As many tokens as the saved embedding has: some were added before the adapter was trained."""
    table = _saved_table(model, saved)
    if table is not None and len(table) != len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(len(table), mean_resizing=False)


def _saved_table(model: Any, saved: Mapping[str, Tensor]) -> Tensor | None:
    """The input embedding that was saved, by one of its names in the model; None where none was."""
    table = next((saved[name] for name in embedding_names(model) if name in saved), None)
    if table is None or table.shape[1:] != model.get_input_embeddings().weight.shape[1:]:
        return None
    return table


def _untie(model: Any, saved: Mapping[str, Tensor], apart: Collection[str]) -> None:
    """The embedding and what is tied to it are several where several values of them were saved, or
    where PEFT trained one `apart`, as a copy. They stay one where the file also has what the others
    were then, and not by all their names: `load` refuses that.
    """
    table, names = getattr(embedding_of(model), "weight", None), embedding_names(model)
    values = [saved[name] for name in names if name in saved]
    copied = [name for name in names if name in saved and name in apart]
    differ = any(not torch.equal(value, values[0]) for value in values)
    lacks = bool(copied) and len(values) < len(names)
    if table is None or not (len(copied) == len(values) if lacks else differ):
        return
    for name in names[1:]:
        parent, _, attribute = name.rpartition(".")
        own = torch.nn.Parameter(table.detach().clone(), requires_grad=table.requires_grad)
        setattr(model.get_submodule(parent), attribute, own)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
