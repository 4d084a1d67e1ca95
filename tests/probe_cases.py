"""Batches, and their scores offline and from the passes of training, for the tests of both."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models import VOCABULARY
from torch import Tensor, nn

import loradrop
from loradrop.scores import Scores
from loradrop.statistics.collector import Collector

RANKS = 2  # of a run of several processes
Batch = dict[str, Tensor]


EXACT = {"rtol": 1e-12, "atol": 0}


def batches(count: int = 4) -> list[Batch]:
    """Of different sizes, with padding."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for i in range(count):
        ids = torch.randint(0, VOCABULARY, (2 + i % 2, 5 + i), generator=generator)
        lengths = torch.randint(1, 5 + i, (len(ids), 1), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(5 + i) < lengths).long()})
    return made


def probed(model: nn.Module, data: Iterable[Any], **options: Any) -> dict[str, float]:
    return dict(loradrop.probe(model, data, **options))


def step(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    return model(**batch).square().mean()


@contextmanager
def collecting(model: Any, **options: Any) -> Iterator[Collector]:
    """Online; detached at the end, whatever happens."""
    collector = Collector(model, model.lora_bank, online=True, **options)
    try:
        yield collector
    finally:
        collector.detach()


def online(model: Any, data: list[Batch], run: Any = None, accumulate: int = 1) -> Scores:
    """Scores of training passes over `data` with fixed weights."""
    model.train()
    with collecting(model) as collector:
        for i, batch in enumerate(data, 1):
            (1000.0 * step(model if run is None else run, batch)).backward()
            if i % accumulate == 0:
                collector.close_row()
                model.zero_grad()
        return collector.scores()


def in_two_parts(
    model: nn.Module, data: list[Batch], loss: Callable[..., Tensor] = step, **options: Any
) -> Scores:
    """As `online`, by two collectors, of which the second goes on from the state of the first."""
    state = None
    for part in (data[:2], data[2:]):
        with collecting(model, **options) as collector:
            if state is not None:
                collector.load_state_dict(state)
            for batch in part:
                loss(model, batch).backward()
                collector.close_row()
            state = copy.deepcopy(collector.state_dict())
    return collector.scores()
