"""For `sharded_fit.py`: a checkpoint in parts, of the adapters and the optimiser alone."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from loradrop.ranks import full_tensor

ADAPTERS = StateDictOptions(ignore_frozen_params=True, strict=False)


def state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer, options=ADAPTERS)
    return {"model": of_model, "optimizer": of_optimizer}


def load(model: Any, optimizer: Any, folder: str) -> None:
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        options=ADAPTERS,
    )  # fmt: skip


def values(model: Any) -> list[torch.Tensor]:
    return [full_tensor(p.detach()) for p in model.parameters() if p.requires_grad]


def gone_on(
    folder: str, make: Callable[..., Any], step: Callable[[Any, Any], None]
) -> dict[str, Any]:
    """What a sharded model is after a checkpoint and two steps, trained on and loaded anew."""

    def made(shared: bool) -> tuple[Any, Any]:
        model = make(shared)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-2)

    model, optimizer = made(shared=True)
    step(model, optimizer)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    step(model, optimizer)

    again, other = made(shared=True)
    load(again, other, folder)
    begun = values(again)
    step(again, other)
    moved = max(float((a - b).abs().max()) for a, b in zip(values(again), begun, strict=True))
    equal = [torch.equal(a, b) for a, b in zip(values(model), values(again), strict=True)]
    found = {"equal": all(equal), "moved": moved, "keys": sorted(state_of(*made(True))["model"])}
    try:
        load(*made(shared=False), folder)
    except CheckpointException as error:
        found["refused"] = str(error)
    return found
