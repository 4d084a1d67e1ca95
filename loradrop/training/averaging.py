"""Adapters that stay whole where FSDP2 shards the base: their gradients are averaged here."""

from typing import Any

import torch
from torch import Tensor, distributed, nn

from loradrop.bank import bank_of
from loradrop.machine import is_distributed
from loradrop.ranks import is_sharded
from loradrop.wrapped import of_inner


@of_inner
def keep_whole(model: nn.Module) -> set[nn.Parameter]:
    """All that the model trains, which every rank keeps whole: for `ignored_params` of FSDP2.

        trained = loradrop.keep_whole(model)
        for layer in model.model.layers:
            fully_shard(layer, ignored_params=trained)
        fully_shard(model, ignored_params=trained)

    The base is sharded; adapters and modules_to_save have rank 0's values, and from now on each
    backward pass ends with one all-reduce of the mean of their gradients, as under DDP. So they may
    have another dtype than the base, and `share`, `truncate` and `load` work in the middle of a
    run, when every rank calls them: make the optimiser anew afterwards.

    Raises ValueError before torch.distributed has begun, and for adapters that are sharded.
    """
    bank = bank_of(model)
    bank.require_whole()
    if not is_distributed():
        raise ValueError(
            "torch.distributed has not begun, so there is nobody to keep the adapters equal to: "
            "call torch.distributed.init_process_group first, in a process of torchrun"
        )
    if bank.changed is None:
        bank.changed = Averaging(model)
    return {p for p in model.parameters() if p.requires_grad}


class Averaging:
    """The trained Parameters of a model, equal on all ranks by the mean of their gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._trained: list[nn.Parameter] = []
        self._hooks: list[Any] = []
        self._pass = -1  # the backward pass at whose end they are averaged
        self()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None in a copy of the model, which is nobody else's concern."""
        return type(None), ()

    @torch.no_grad()
    def __call__(self) -> None:
        """Go on with what the model trains now, from rank 0's values."""
        for hook in self._hooks:
            hook.remove()
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]
            for p in self._trained
        ]
        for parameter in self._trained:
            if not is_sharded(parameter):
                distributed.broadcast(parameter.data, src=0)

    def _note(self, _: Tensor) -> None:
        """A gradient is there: at the end of this pass all of them are."""
        now = torch._C._current_graph_task_id()
        if now != self._pass:
            self._pass = now
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        """One all-reduce of all gradients, after which accumulated ones are their mean too.

        A Parameter without a gradient counts as zero where another rank has one, and keeps none
        where no rank has.
        """
        trained = [p for p in self._trained if not is_sharded(p)]
        wide = max((torch.float32, *(p.dtype for p in trained)), key=lambda dtype: dtype.itemsize)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        there = torch.tensor([p.grad is not None for p in trained])
        parts.append(there.to(parts[0].device))
        flat = torch.cat([part.flatten().to(wide) for part in parts])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        *means, counts = torch.split(flat, [*(p.numel() for p in trained), len(trained)])
        anywhere = there if bool(there.all()) else counts > 0  # the device is asked where one lacks
        for parameter, mean, found in zip(trained, means, anywhere.tolist(), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(mean.view_as(parameter))
            elif found:
                parameter.grad = mean.view_as(parameter).to(parameter.dtype, copy=True)
