"""The processes of a distributed run, before and after torch.distributed has begun."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from loradrop.machine import is_distributed, is_first_rank


def world_size() -> int:
    """How many processes train together."""
    return (
        distributed.get_world_size() if is_distributed() else int(os.environ.get("WORLD_SIZE", 1))
    )


def place() -> tuple[int, int]:
    """The number of this rank, and of how many; (0, 1) where torch.distributed does not run."""
    if not is_distributed():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def wait() -> None:
    """Waits until every rank is here."""
    if is_distributed():
        distributed.barrier()


def reduced(values: Tensor, op: "distributed.ReduceOp.RedOpType") -> Tensor:
    """`values` over all ranks, on the CPU."""
    values = values.to("cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(values, op)
    return values.cpu()


def any_rank(here: bool) -> bool:
    """Whether it is so on some rank, which every rank asks."""
    if not is_distributed():
        return here
    return bool(reduced(torch.tensor(int(here)), distributed.ReduceOp.MAX))


@torch.no_grad()
def as_on_the_first(tensors: Iterable[Tensor]) -> None:
    """Gives every rank the first one's values, of which some were drawn at random."""
    if not is_distributed():
        return
    for tensor in tensors:
        value = tensor.to("cuda" if distributed.get_backend() == "nccl" else "cpu")
        distributed.broadcast(value, 0)
        tensor.copy_(value)


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, of which every rank holds a part (fully_shard, FSDP2)."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "device_mesh")


def is_partitioned(tensor: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 has taken it apart: its shape is then (0,) between its uses."""
    return hasattr(tensor, "ds_id")


ZERO_3 = (
    "DeepSpeed's ZeRO-3 takes parameters apart behind the layers that use them, and layers here "
    "share adapters that none of them owns: use ZeRO-1 or 2, or FSDP2 (fully_shard), which shards "
    "them too"
)


def writes(model: nn.Module) -> bool:
    """Whether this rank writes where it is told to save: of a sharded model, which all ranks put
    together, only the first.
    """
    return is_first_rank() or not any(map(is_sharded, model.parameters()))


def is_needed(model: nn.Module) -> bool:
    """Whether this rank has to call what writes files that the first one writes: of a sharded model
    all put it together.
    """
    return is_first_rank() or any(map(is_sharded, model.parameters()))


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all parts of a sharded one: then every rank has to call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_part(tensor: Tensor) -> Tensor:
    """The tensor itself, or this rank's part of a sharded one, without asking the others."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, sharded as `like` is."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.device), mesh, like.placements)  # type: ignore[attr-defined]


def replicated_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which every rank has: where `like` is sharded a DTensor over the same ranks."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
