"""Each target's importance: the squared norm of its LoRA output (Zhou et al., COLING 2025)."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from loradrop.bank import bank_of
from loradrop.batches import call, evaluating
from loradrop.collector import Collector
from loradrop.injection import injection_of
from loradrop.masks import MASK, MaskFn
from loradrop.scores import Scores


@torch.no_grad()
def probe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mask: str | None = MASK,
    mask_fn: MaskFn | None = None,
) -> Scores:
    """Name -> Σ over real tokens of ‖s·B·A·x‖² for fixed weights, in float64.

    batches   mappings of keyword arguments, tuples of positional ones, or single tensors
    mask      the input that marks real tokens; a batch without it, and mask=None, count every
              token. Decoders have their own (decoder_attention_mask), and targets whose rows are
              not its tokens, as a pooler's, count whole
    mask_fn   (target name, x, that input) -> weights of x's shape without its last axis, or None

    The model runs in eval mode without dropout. Weights, modes and random states are as before
    afterwards. Under `torch.distributed` the scores are summed over ranks. Raises ValueError for no
    batches or a mask that does not fit, RuntimeError naming targets whose forward was never called.
    """
    bank, injection = bank_of(model), injection_of(model)
    if injection.merged is not None:
        raise ValueError("the adapters are merged into the weights: call loradrop.remove(model)")
    with _random_state_kept(), evaluating(model):
        collector = Collector(model, bank, online=False, mask=mask, mask_fn=mask_fn)
        try:
            for batch in batches:
                call(model, batch)
                collector.close_row()
        finally:
            collector.detach()
    if not collector.rows:
        raise ValueError("batches is empty: give at least one batch to probe with")
    collector.require_called()
    scores = injection.scores = collector.scores()
    return scores


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
