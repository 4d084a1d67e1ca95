"""Measuring every target's importance: the squared norm of its LoRA output (Zhou et al., COLING
2025).
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loradrop.bank import bank_of
from loradrop.collector import Collector, MaskFn
from loradrop.injection import injection_of
from loradrop.scores import Scores


@torch.no_grad()
def probe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mask: str | None = "attention_mask",
    mask_fn: MaskFn | None = None,
) -> Scores:
    """Name -> Σ over real tokens of ‖s·B·A·x‖² for fixed weights, in float64.

    batches   what the model takes: mappings of keyword arguments, tuples of positional ones, or one
              tensor
    mask      the input that marks real tokens; a batch without it, and mask=None, count every token
    mask_fn   (target name, x, that input) -> weights of x's shape without its last axis; None
              counts all

    The model runs in eval mode without dropout. Weights, modes and random states are as before
    afterwards. Under `torch.distributed` the scores are summed over ranks. Raises ValueError for no
    batches or a mask that does not fit, RuntimeError naming targets whose forward was never called.
    """
    bank, injection = bank_of(model), injection_of(model)
    if injection.merged is not None:
        raise ValueError("the adapters are merged into the weights: call loradrop.remove(model)")
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    with _random_state_kept():
        collector = Collector(model, bank, online=False, mask=mask, mask_fn=mask_fn)
        model.eval()
        try:
            for batch in batches:
                _call(model, _to(batch, device))
                collector.close_row()
        finally:
            collector.detach()
            for module, training in modes:
                module.training = training
    if not collector.rows:
        raise ValueError("batches is empty: give at least one batch to probe with")
    scores = injection.scores = collector.scores()
    return scores


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [_to(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
