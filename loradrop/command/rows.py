"""The data of a configuration as the base model of an adapter reads it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loradrop.command.adapter_bases import tokenizer_for
from loradrop.command.base_models import pad_with
from loradrop.text.examples import TextTask, renumbered
from loradrop.text.task import DataConfig, load_task
from loradrop.text.tokens import TokenizedDataset, collator, tokenize

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """A task as the model reads it."""

    task: TextTask
    train: TokenizedDataset
    dev: TokenizedDataset
    collate: Any


def rows_of(task: TextTask, model: Any, tokenizer: Any, max_length: int | None) -> Rows:
    """The rows of a task as the model's tokenizer cuts them."""
    train, dev = tokenize(task, tokenizer, max_length, model)
    return Rows(task, train, dev, collator(task, tokenizer))


def rows_for(model: Any, data: DataConfig, adapter: str | Path) -> Rows:
    """The data for the model that is the base of `adapter`.

    Raises ValueError for data that the model's head was not made for, and a model without a
    tokenizer.
    """
    task = load_task(data)
    _require_fit(model, task, adapter)
    task = in_order_of(task, model.config, adapter)
    if _are_names(task.labels) and not _are_names(class_names(model.config)):
        _log.warning(
            "neither %s nor its base model names its classes: they are taken for those of the data "
            "by alphabet (%s). Where that is not their order, write the labels as numbers, 0 for "
            "the first output of the head: else the dev metrics are wrong, and so is --heal",
            adapter, ", ".join(f"{i}: {label}" for i, label in enumerate(task.labels)),
        )  # fmt: skip
    if (tokenizer := tokenizer_for(adapter, model, task.kind == "token_classification")) is None:
        name = model.config._name_or_path
        raise ValueError(f"{name} has no tokenizer, which reading the data needs: give model=")
    pad_with(model, tokenizer)
    return rows_of(task, model, tokenizer, data.max_length)


def _require_fit(model: Any, task: TextTask, adapter: str | Path) -> None:
    """Raises ValueError for data that the model's head was not made for."""
    name, labels = type(model).__name__, getattr(model.config, "num_labels", None)
    if task.kind == "causal_lm":
        fits, what = name.endswith(("ForCausalLM", "LMHeadModel")), ""
    else:
        kind = "Token" if task.kind == "token_classification" else "Sequence"
        classes = max(1, len(task.labels))
        fits = name.endswith(f"For{kind}Classification") and labels == classes
        what = f" with {classes} labels"
    if not fits:
        raise ValueError(
            f"the data is {task.kind}{what}, and {adapter} is for a {name} with {labels}: give the "
            "data that it was trained on, or data like it"
        )


def in_order_of(task: TextTask, config: Any, of: str | Path) -> TextTask:
    """The task with its classes in the order in which the `config` of a model has them; names may
    differ in the case of their letters.
    """
    names = class_names(config)
    if len(names) != len(task.labels) or list(task.labels) == names or not _are_names(names):
        return task
    own = {label.casefold(): label for label in task.labels}
    if len(own) == len(names) and own.keys() == {name.casefold() for name in names}:
        return renumbered(task, tuple(own[name.casefold()] for name in names))
    if _are_names(task.labels):
        _log.warning(
            "the classes of the data (%s) are not those of %s (%s): they are matched in this order",
            ", ".join(task.labels), of, ", ".join(names),
        )  # fmt: skip
    return task


def class_names(config: Any) -> list[str]:
    """The names of a model's classes in the order of its head; empty where it has none."""
    there = getattr(config, "id2label", None) or {}
    names = [str(there[i]) for i in range(len(there)) if i in there]
    return names if len(names) == len(there) else []


def _are_names(labels: Sequence[str]) -> bool:
    """Whether classes have names of their own, not numbers."""
    return not all(label.removeprefix("LABEL_").lstrip("-").isdigit() for label in labels)
