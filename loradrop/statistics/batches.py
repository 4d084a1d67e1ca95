"""Running a model on batches: mappings of keyword arguments, tuples of positional ones, tensors."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from loradrop.bank import execution_device
from loradrop.ranks import place
from loradrop.sampling import some_of

MEASURED, BATCH = 1024, 2  # rows, and how many at a time


def small_batches(
    rows: Any, collate: Callable[[list[Any]], Any] | None, seed: int, count: int = MEASURED
) -> DataLoader[Any]:
    """A sample of the rows, `BATCH` at a time: what a probe of directions takes. Equal rows are in
    it once, and each rank has its own part of it, as a probe sums over ranks.

    Raises ValueError for rows that cannot be drawn from.
    """
    require_rows(rows)
    columns = getattr(collate, "signature_columns", None)  # what a Trainer's collator leaves
    with random_state_kept():  # rows may be made at random as they are read
        sample = some_of(rows, count, seed, columns)
    return DataLoader(_own(sample), batch_size=BATCH, collate_fn=collate)


def _own(sample: "Subset[Any]") -> "Subset[Any]":
    """Every n-th batch for each of n ranks. All get as many, since ranks that gather a sharded
    model wait for each other: what is left at the end is left out, and where there is not one batch
    for each, every rank takes all.
    """
    rank, ranks = place()
    even = len(sample) // (BATCH * ranks) * BATCH * ranks
    if ranks == 1 or even == 0:
        return sample
    mine = [at for i, at in enumerate(sample.indices[:even]) if i // BATCH % ranks == rank]
    return Subset(sample.dataset, mine)


def require_rows(rows: Any) -> None:
    """Raises ValueError for data that comes as a stream."""
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ValueError(
            f"a {type(rows).__name__} has no rows to draw some of, which measuring directions at "
            'fixed weights needs: give a Dataset with a length, or the method source="online"'
        )


def require_several(batches: Any) -> None:
    """Raises ValueError for one batch in the place of several: its keys would be taken for them."""
    if isinstance(batches, (Mapping, str)):
        raise ValueError(
            f"batches is a {type(batches).__name__}, which is one batch: give a list, [batch], or "
            "a DataLoader"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards each of its modules has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Afterwards Python, NumPy and torch draw as if nothing had been drawn inside."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def call(model: nn.Module, batch: Any) -> Any:
    """What the model returns for the batch, whose tensors are moved to its device first.

    Raises ValueError where the model fails on a batch that has no tensor in it.
    """
    device = next(model.parameters()).device
    if device.type == "meta":  # offloaded by accelerate, whose hooks know where it computes
        device = execution_device(*model.modules()) or device
    batch = _to(batch, device)
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    except (AttributeError, TypeError, ValueError) as error:
        if _has_tensor(batch):
            raise
        raise ValueError(
            f"a batch is a {type(batch).__name__} without a tensor, on which "
            f"{type(model).__name__} fails ({error}): give batches of tensors, as "
            "tokenizer(..., return_tensors='pt') or a DataLoader makes them"
        ) from error


def _has_tensor(batch: Any) -> bool:
    values = batch.values() if isinstance(batch, Mapping) else batch
    nested = isinstance(batch, (Mapping, tuple, list))
    return any(map(_has_tensor, values)) if nested else isinstance(batch, Tensor)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [_to(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch
