"""accelerate shards a model by FSDP2 on accelerators alone; with this, on CPUs too.

Two things of a CPU stand in its way: that it never takes FSDP for the kind of a run of CPUs, and
that torch leaves what it gathers there unwaited for.
"""

from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed._functional_collectives import AsyncCollectiveTensor

_init, _state_dict = AcceleratorState.__init__, Accelerator.get_state_dict


def allow() -> None:
    """Once in a process, before its first Trainer or Accelerator."""
    AcceleratorState.__init__ = _of_fsdp  # type: ignore[method-assign]
    Accelerator.get_state_dict = _waited_for  # type: ignore[method-assign]


def _of_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def _waited_for(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    found = _state_dict(self, *args, **kwargs)
    return {k: v.wait() if isinstance(v, AsyncCollectiveTensor) else v for k, v in found.items()}
