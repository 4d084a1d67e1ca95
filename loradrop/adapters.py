"""A snapshot of the adapters of a model, for files and exports."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loradrop.bank import AdapterBank, Pair, bank_of, delta_of
from loradrop.extra_state import STATE
from loradrop.injection import (
    Injection,
    injection_of,
    plan_of,
    require_adapted,
    require_loaded,
    require_trained,
    trained_since,
)
from loradrop.plan import Plan
from loradrop.ranks import full_tensor, is_sharded
from loradrop.wrapped import names_by_tensor, tensors_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapters:
    """A snapshot of everything that files and exports need.

    factors   (A (r, K), B (N, r)) of each target, detached; None where it has no adapter
    scaling   s of each target
    state     the bank's own tensors by their names in a file
    trained   the base tensors that are trained whole, by their names in the model: those of
              modules_to_save, and what was made trainable or added since `inject`
    tied      name of one of these -> the other names that its tensor has in the model, where it has
              any; None where nobody knows
    """

    plan: Plan
    factors: tuple[Pair | None, ...]
    scaling: tuple[float, ...]
    state: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    tied: Mapping[str, Sequence[str]] | None = None

    def delta(self, i: int) -> Tensor | None:
        """s·B·A (N, K) of target i, as `bank.delta_of`."""
        return delta_of(self.factors[i], self.scaling[i])


def adapters_of(model: nn.Module) -> Adapters:
    """The adapters of an injected model as they are now. Tensors are not copied, but those that
    FSDP2 shards are put together, for which every rank has to call this.

    Raises ValueError where a target was replaced, or a trained tensor is offloaded.
    """
    bank, injection, base = bank_of(model), injection_of(model), tensors_of(model)
    require_adapted(model)
    require_trained(model)
    since = trained_since(model)
    if new := [name for name in since if name not in injection.told]:
        injection.told.update(new)
        _log.warning(
            "trainable since inject, and saved with the adapters: %s. A base model that loads them "
            "must have them", ", ".join(new),
        )  # fmt: skip
    trained = {name: base[name].detach() for name in (*injection.originals, *since)}
    trained |= _left_behind(injection, base)
    require_loaded(trained)
    state = {k: full_tensor(v) for k, v in bank.state_dict().items() if k != STATE}
    pairs = composed(bank, state)
    return Adapters(
        plan=plan_of(model),
        factors=tuple(None if p is None else (p[0].detach(), p[1].detach()) for p in pairs),
        scaling=tuple(bank.scaling),
        state=bank.in_file(state),
        trained={k: full_tensor(v) for k, v in trained.items()},
        tied=tied_in(model, trained),
    )


def tied_in(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]] | None:
    """Name -> the other names of the same tensor in the model, for those of `names` that have any.
    None where some are offloaded, which does not tell.
    """
    state = tensors_of(model, keep_vars=True)
    if any(tensor.is_meta for tensor in state.values()):
        return None
    by_tensor = names_by_tensor(state)
    found = {name: by_tensor[id(state[name])] for name in names if name in state}
    return {name: [o for o in all if o != name] for name, all in found.items() if len(all) > 1}


def _left_behind(injection: Injection, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was tied to a module before PEFT trained a copy of that apart: without it a file would
    load the copy into both.
    """

    def place(tensor: Tensor) -> tuple[int, torch.Size] | None:
        apart = is_sharded(tensor) or tensor.is_meta
        return None if apart else (tensor.data_ptr(), tensor.shape)

    before = {*map(place, injection.originals.values())} - {None}
    left = {name: tensor for name, tensor in base.items() if name not in injection.originals}
    return {name: tensor.detach() for name, tensor in left.items() if place(tensor) in before}


def composed(bank: AdapterBank, state: Mapping[str, Tensor]) -> list[Pair | None]:
    """The factors of every target, of whole tensors by their names where FSDP2 shards those of the
    bank: there parts do not mix with what is not sharded.
    """
    made = _Composed(bank)
    if not any(map(is_sharded, bank.parameters())):
        return made.forward()
    tensors = {f"bank.{name}": tensor for name, tensor in state.items()}
    found: list[Pair | None] = torch.func.functional_call(made, tensors, ())
    return found


class _Composed(nn.Module):
    """All factors of a bank, as a module to call with other tensors."""

    def __init__(self, bank: AdapterBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self) -> list[Pair | None]:
        return [self.bank.factors(i) for i in range(len(self.bank.targets))]
