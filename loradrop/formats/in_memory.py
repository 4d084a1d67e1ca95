"""An adapter for an engine in the same machine: tensors by their names, without a disk.

The names, the scale and the configuration are those of the PEFT folder that `export` writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loradrop.adapters import adapters_of
from loradrop.bank import bank_of
from loradrop.formats.peft import peft_file_of, verdicts_on
from loradrop.injection import injected, injection_of
from loradrop.remarks import tell_untouched
from loradrop.wrapped import of_inner


@dataclass(frozen=True)
class AdapterTensors:
    """What `adapter_tensors` found.

    config    as in adapter_config.json
    tensors   every tensor by its key in a PEFT file: new ones, that no training step changes
    changed   the keys whose values are not those of `since`; all without one
    gone      the keys that `since` had and this has not
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    changed: tuple[str, ...]
    gone: tuple[str, ...] = ()

    @property
    def update(self) -> dict[str, Tensor]:
        """The changed tensors alone, for a receiver that keeps the others."""
        return {key: self.tensors[key] for key in self.changed}


@of_inner
@torch.no_grad()
def adapter_tensors(
    model: nn.Module,
    engine: str | None = None,
    *,
    dtype: str | None = None,
    padded: bool = True,
    device: torch.device | str | None = None,
    since: AdapterTensors | None = None,
) -> AdapterTensors:
    """The adapters of `model` as an engine takes them, in memory: name -> A (r, K) or B (N, r).

    engine   "vllm", "sglang", "peft" or "llama.cpp" has to take them; None is "peft"
    dtype    of A and B, "float32" (None), "bfloat16" or "float16"; padded as for `export`
    device   where the tensors are; None is the bank's
    since    what the last call gave: `changed` are then the keys whose values differ. They are
             compared themselves, in `dtype`, and no counter of PyTorch's is asked: a write through
             `.data` counts, and a step too small for the dtype does not

    A shared adapter is in the tensors of each of its layers, so a step changes all of those.
    Of a model that FSDP2 shards, every rank has to call it, and every rank gets all tensors. Raises
    ValueError where the adapters are merged, and with its reason for an engine that cannot take
    them.
    """
    bank = bank_of(model)
    if injection_of(model).merged is not None:
        raise ValueError(
            "the adapters are merged into the weights, and an engine with these weights would add "
            "them twice: merge a copy of the model (copy.deepcopy), or a loaded one, instead"
        )
    place = torch.device(bank.device if device is None else device)
    how: dict[str, Any] = {"dtype": dtype, "base_id": None, "padded": padded, "device": place}
    with injected(model) as own:
        tell_untouched(own)
        file = peft_file_of(own, adapters_of(own), **how)
    verdicts_on(file, None if engine is None else [engine])
    before = {} if since is None else since.tensors
    changed = [key for key, new in file.tensors.items() if not _equal(before.get(key), new)]
    gone = [key for key in before if key not in file.tensors]
    return AdapterTensors(file.config, file.tensors, tuple(changed), tuple(gone))


def _equal(old: Tensor | None, new: Tensor) -> bool:
    if old is None or old.dtype != new.dtype or old.shape != new.shape:
        return False
    return torch.equal(old.to(new.device), new)
