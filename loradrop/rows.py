"""The data of a configuration as the base model of an adapter reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loradrop.base_models import pad_with, tokenizer_of
from loradrop.text.examples import TextTask
from loradrop.text.task import DataConfig, load_task
from loradrop.text.tokens import TokenizedDataset, collator, tokenize


@dataclass(frozen=True)
class Rows:
    """A task as the model reads it."""

    task: TextTask
    train: TokenizedDataset
    dev: TokenizedDataset
    collate: Any


def rows_for(model: Any, where: str, data: DataConfig, adapter: str | Path) -> Rows:
    """The data for the model at `where`, the base of `adapter`.

    Raises ValueError for data that the model's head was not made for, and a model without a
    tokenizer.
    """
    task = load_task(data)
    _require_fit(model, task, adapter)
    if (tokenizer := tokenizer_of(where, words=task.kind == "token_classification")) is None:
        raise ValueError(f"{where} has no tokenizer, which reading the data needs: give model=")
    pad_with(model, tokenizer)
    train, dev = tokenize(task, tokenizer, data.max_length, model)
    return Rows(task, train, dev, collator(task, tokenizer))


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
