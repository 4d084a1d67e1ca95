"""A running optimiser whose parameters change under it: its groups, and what it knows."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from loradrop.bank import bank_of
from loradrop.pairs import Narrowed

MOMENTS = ("projected", "reset")
Known = dict[str, Any]  # what an optimiser keeps of one parameter
# What an optimiser keeps for each element of a parameter: of its gradients, or of their squares.
_LINEAR, _SQUARED = ("exp_avg", "momentum_buffer"), ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


def groups_of(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """The optimiser's group of each kind of tensor in the bank."""
    places = _places(optimizer)
    named = bank_of(model).named_parameters()
    return {_kind(name): places[id(p)] for name, p in named if id(p) in places}


def parameter_groups(model: nn.Module, *, head_learning_rate: float) -> list[dict[str, Any]]:
    """What is trained, for an optimiser: the adapters, and what is trained whole beside them, as a
    new head, at a learning rate of its own.

        groups = loradrop.parameter_groups(model, head_learning_rate=0.1)
        optimizer = torch.optim.AdamW(groups, lr=1e-3)        # of the adapters
        Trainer(model, args, ..., optimizers=(optimizer, None))

    Raises ValueError where nothing is trained whole.
    """
    bank = {id(p) for p in bank_of(model).parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = [p for p in trained if id(p) not in bank]
    if not whole:
        raise ValueError(_no_head(head_learning_rate))
    adapters = [p for p in trained if id(p) in bank]
    return [{"params": adapters}, {"params": whole, "lr": head_learning_rate}]


def _no_head(rate: float) -> str:
    return (
        f"head_learning_rate={rate:g}: nothing is trained whole beside the adapters. Leave it out, "
        "or name modules in modules_to_save"
    )


def set_head_rate(model: nn.Module, optimizer: Any, rate: float) -> None:
    """What is trained outside of the bank has groups of its own, at this learning rate.

    Raises ValueError where there is nothing.
    """
    bank, heads = {id(p) for p in bank_of(model).parameters()}, []
    for group in optimizer.param_groups:
        whole = [p for p in group["params"] if id(p) not in bank]
        group["params"] = [p for p in group["params"] if id(p) in bank]
        heads.append(group | {"params": whole, "lr": rate})
    if not any(head["params"] for head in heads):
        raise ValueError(_no_head(rate))
    for head in heads:
        if head["params"]:
            optimizer.add_param_group(head)


def regroup(model: nn.Module, optimizer: Any, groups: Mapping[str, int]) -> None:
    """The optimiser forgets what it knew, holds what is trained now, in the model's order."""
    bank = {id(p): _kind(name) for name, p in bank_of(model).named_parameters()}
    places = _places(optimizer)
    for group in optimizer.param_groups:
        group["params"] = []
    for parameter in model.parameters():
        place = places.get(id(parameter), groups.get(bank.get(id(parameter), "")))
        if place is not None and parameter.requires_grad:
            optimizer.param_groups[place]["params"].append(parameter)
    plain(optimizer).state.clear()


def follow(
    model: nn.Module,
    optimizer: Any,
    groups: Mapping[str, int],
    changed: Sequence[Narrowed],
    moments: str,
) -> None:
    """The optimiser goes on with what a cut left: `groups` are those of before, `changed` the
    adapters that have new factors.
    """
    state = narrowed_state(optimizer, changed) if moments == "projected" else {}
    regroup(model, optimizer, groups)
    held = _places(optimizer)
    plain(optimizer).state.update({p: known for p, known in state.items() if id(p) in held})


def plain(optimizer: Any) -> Any:
    """The optimiser of torch inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def narrowed_state(optimizer: Any, changed: Sequence[Narrowed]) -> dict[Any, Known]:
    """Parameter -> what the optimiser would know of it: of narrowed adapters as A' = P A and
    B' = B Q say, of the others as it is.

    ∂A' = √g Qᵀ ∂A and ∂B' = √g ∂B Pᵀ, with s grown by g, hold for gradients and so for their means;
    means of squares go over with the squares of these, as if the elements were independent.
    """
    state = plain(optimizer).state
    found = {parameter: state[parameter] for parameter in state}
    for before, after, down, up, growth in changed:
        root = math.sqrt(growth)
        for old, new, left, right in (
            (before[0], after[0], root * up.T, None), (before[1], after[1], None, root * down.T),
        ):  # fmt: skip
            if known := found.pop(old, None):
                found[new] = {
                    name: _moved(name, value, old, left, right) for name, value in known.items()
                }
    return found


def _moved(name: str, value: Any, of: Tensor, left: Tensor | None, right: Tensor | None) -> Any:
    if not isinstance(value, Tensor) or value.shape != of.shape:
        return value
    square = name in _SQUARED
    wide = value.double()
    if left is not None:
        left = left.to(wide)
        wide = (left.square() if square else left) @ wide
    if right is not None:
        right = right.to(wide)
        wide = wide @ (right.square() if square else right)
    return wide.to(value.dtype).contiguous()


def unprojectable(model: nn.Module, optimizer: Any) -> str | None:
    """Why what an optimiser knows of adapters cannot be cut with them: it keeps more than means of
    gradients and of their squares, element by element, and numbers. None where it can.
    """
    kind, state = type(plain(optimizer)).__name__, plain(optimizer).state
    parameters = list(bank_of(model).parameters())
    if state and not any(parameter in state for parameter in parameters):
        return f"{kind} keeps nothing by parameter, so what it knows cannot be projected"
    for parameter in parameters:
        for name, value in state.get(parameter, {}).items():
            number = not isinstance(value, Tensor) or not value.ndim
            if not (number or (value.shape == parameter.shape and name in _LINEAR + _SQUARED)):
                return f"{kind} keeps {name!r} of each parameter, which cannot be projected"
    return None


def by_name(model: nn.Module, state: Mapping[Any, Known]) -> dict[str, Known]:
    """The same by the parameters' names in the model, as `learn` takes it."""
    return {name: state[p] for name, p in model.named_parameters() if p in state}


def learn(model: nn.Module, optimizer: Any, known: Mapping[str, Known]) -> None:
    """The optimiser takes over what another one knew."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {i: known[name] for i, name in enumerate(held) if name in known}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _places(optimizer: Any) -> dict[int, int]:
    """The id of each parameter that it holds -> the number of its group."""
    return {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}


def _kind(name: str) -> str:
    """The name of a tensor in the bank without its numbers."""
    return re.sub(r"\.\d+", "", name)
