"""Each target's importance: the squared norm of its LoRA output (Zhou et al., COLING 2025)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from loradrop.bank import bank_of
from loradrop.injection import injected, injection_of, require_unmerged
from loradrop.options import check_choice
from loradrop.ranks import any_rank, place
from loradrop.scores import Scores
from loradrop.statistics.batches import (
    BATCH,
    call,
    evaluating,
    random_state_kept,
    require_several,
    small_batches,
)
from loradrop.statistics.collector import GRAMS, Collector
from loradrop.statistics.losses import LABELS, Labels, losses, undrawable
from loradrop.statistics.masks import MASK, MaskFn, Masking
from loradrop.wrapped import of_inner


@of_inner
@torch.no_grad()
def probe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mask: str | None = MASK,
    mask_fn: MaskFn | None = None,
    gram: bool = False,
    labels: Labels = "sampled",
) -> Scores:
    """Name -> Σ over real tokens of ‖s·B·A·x‖² for fixed weights, in float64.

    batches   mappings of keyword arguments, tuples of positional ones, or single tensors
    mask      the input that marks real tokens; a batch without it, and mask=None, count every
              token. The decoder of an encoder–decoder has its own (decoder_attention_mask, else
              what has a label or is no padding), and targets whose rows are not its tokens, as a
              pooler's, count whole
    mask_fn   (target name, x, that input) -> weights of x's shape without its last axis, or None
    gram      also the Gram matrices that `spectrum` and `truncate` need, by a backward pass
    labels    of that pass's loss: "sampled", drawn from the model's own logits; "data", the loss
              that the model returns; a function (outputs, inputs) -> the loss of each sample, (n,);
              or None, which leaves the loss metric out

    For `truncate` and the loss that a cut is predicted to cost, give many small batches, and put
    identical rows into one of them: each batch is predicted from the others, and a copy of its
    rows among these would give the answer away.

    The model runs in eval mode without dropout. Weights, modes and random states are as before
    afterwards. Under `torch.distributed` the scores are summed over ranks. Raises ValueError for no
    batches or a mask that does not fit, RuntimeError naming targets whose forward was never called;
    of an adapter that was loaded or trained before, one line is logged, and they have a score of 0.
    """
    if isinstance(labels, str):
        check_choice("labels", labels, LABELS)
    require_several(batches)
    bank_of(model)
    with injected(model) as own:
        return _probe(own, batches, Masking(mask, mask_fn), gram, labels)


@of_inner
@torch.no_grad()
def require_drawable(model: nn.Module, rows: Any, collate: Any) -> None:
    """Raises ValueError, before any training, where a method could not draw labels from the model
    when it measures directions offline: one batch is tried.
    """
    with injected(model) as own, random_state_kept(), evaluating(own):
        batch = next(iter(small_batches(rows, collate, 0, BATCH)))
        why = undrawable(own, call(own, batch))
    if why is not None:
        name = injection_of(model).config.method.name
        raise ValueError(
            f"{why}, which the method {name} with source='offline' needs: choose source='online' "
            "(the command: lora.method.source=online), which takes the labels of the data"
        )


def _probe(
    model: nn.Module, batches: Iterable[Any], masking: Masking, gram: bool, labels: Labels
) -> Scores:
    """`probe` of an injected model."""
    bank, injection = bank_of(model), injection_of(model)
    require_unmerged(model)
    if not bank.enabled:
        raise ValueError("inside of loradrop.disabled no adapter computes: probe outside of it")
    grams = GRAMS if labels is not None else GRAMS[:1]
    statistics = ("sqnorm", *grams) if gram else ("sqnorm",)
    rank, ranks = place()  # each rank draws labels of its own
    with random_state_kept(), evaluating(model), _frozen(model) if gram else nullcontext():
        collector = Collector(
            model, bank, online=gram, statistics=statistics, source="offline", masking=masking,
        )  # fmt: skip
        try:
            for number, batch in enumerate(batches):
                if gram:
                    _measure(model, batch, labels, collector, number * ranks + rank)
                else:
                    call(model, batch)
                collector.close_row()
        finally:
            collector.detach()
    if not any_rank(bool(collector.rows)):
        raise ValueError("batches is empty: give at least one batch to probe with")
    # A model with a plan was trained as it is, whatever its configuration demanded at first.
    collector.require_called(injection.config.strict and injection.plan is None)
    scores = injection.scores = collector.scores()
    return scores


def _measure(model: nn.Module, batch: Any, labels: Labels, collector: Collector, seed: int) -> None:
    """One batch forward and backward: the gradients of the sum of its losses reach the sinks."""
    with torch.enable_grad():
        outputs = call(model, batch)
        if labels is None:
            total = sum(0.0 * value.float().sum() for value in _tensors(outputs))
            count = 0
        else:
            each = losses(model, outputs, collector.inputs, labels, seed)
            total, count = each.sum(), len(each)
        collector.set_samples(count)
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    found = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [v for v in found if isinstance(v, Tensor) and v.requires_grad]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter collects a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
