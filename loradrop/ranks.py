"""The processes of a distributed run, before and after torch.distributed has begun."""

import os

from torch import Tensor, distributed


def is_distributed() -> bool:
    """Whether torch.distributed runs."""
    return distributed.is_available() and distributed.is_initialized()


def is_first() -> bool:
    """Whether this process writes the files of a run: rank 0, also before the ranks have met."""
    return (distributed.get_rank() if is_distributed() else int(os.environ.get("RANK", 0))) == 0


def world_size() -> int:
    """How many processes train together."""
    return (
        distributed.get_world_size() if is_distributed() else int(os.environ.get("WORLD_SIZE", 1))
    )


def wait() -> None:
    """Until every rank is here."""
    if is_distributed():
        distributed.barrier()


def reduced(values: Tensor, op: "distributed.ReduceOp.RedOpType") -> Tensor:
    """`values` over all ranks, on the CPU."""
    values = values.to("cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(values, op)
    return values.cpu()
