"""A running optimiser whose parameters change under it: its groups, and what it knows."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from loradrop.bank import AdapterBank, bank_of
from loradrop.pairs import LoRABank, Update
from loradrop.wrapped import of_inner

MOMENTS = ("projected", "reset")
Known = dict[str, Any]  # what an optimiser keeps of one parameter
_log = logging.getLogger(__name__)
# What an optimiser keeps for each element of a parameter: of its gradients, or of their squares.
_LINEAR, _SQUARED = ("exp_avg", "momentum_buffer"), ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


class Groups(NamedTuple):
    """Where an optimiser holds the bank's parameters, before they change.

    of_user   (target, "A" or "B") -> the number of the group of that factor; None: not held
    of_kind   the same for each kind of tensor in the bank, for what has no such user; one of a new
              kind goes to the first of these groups
    bank      the parameters themselves
    """

    of_user: Mapping[tuple[str, str], int | None]
    of_kind: Mapping[str, int]
    bank: Sequence[nn.Parameter]


def groups_of(model: nn.Module, optimizer: Any) -> Groups:
    """The optimiser's groups of the bank as it is now."""
    places, bank = _places(optimizer), bank_of(model)
    kinds = {_kind(n): places[id(p)] for n, p in bank.named_parameters() if id(p) in places}
    users = {user: places.get(p) for p, users in _users(bank).items() for user in users}
    return Groups(users, kinds, [*bank.parameters()])


def _users(bank: AdapterBank) -> dict[int, list[tuple[str, str]]]:
    """The id of each parameter that is a factor by itself -> (target, "A" or "B") that use it."""
    found: dict[int, list[tuple[str, str]]] = {}
    if isinstance(bank, LoRABank):  # others compose theirs
        for i, target in enumerate(bank.targets):
            for side, factor in zip("AB", bank.factors(i) or (), strict=False):
                found.setdefault(id(factor), []).append((target.name, side))
    return found


@of_inner
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


def regroup(model: nn.Module, optimizer: Any, groups: Groups) -> None:
    """The optimiser forgets what it knew, holds what is trained now: in the model's order, a new
    parameter of the bank in the group of the one before it, and then what is not of the model.
    """
    places, known = _places(optimizer), {id(p) for p in (*model.parameters(), *groups.bank)}
    others = [[p for p in g["params"] if id(p) not in known] for g in optimizer.param_groups]
    new = _places_of_new(bank_of(model), groups)
    for group in optimizer.param_groups:
        group["params"] = []
    for parameter in model.parameters():
        place = places.get(id(parameter), new.get(id(parameter)))
        if place is not None and parameter.requires_grad:
            optimizer.param_groups[place]["params"].append(parameter)
    for group, beside in zip(optimizer.param_groups, others, strict=True):
        group["params"] += beside
    unwrapped(optimizer).state.clear()


def _places_of_new(bank: AdapterBank, groups: Groups) -> dict[int, int | None]:
    """The id of each parameter of the bank -> the group of what it stands for."""
    users, found = _users(bank), dict[int, int | None]()
    any_kind = min(groups.of_kind.values(), default=None)
    for name, parameter in bank.named_parameters():
        before = [user for user in users.get(id(parameter), ()) if user in groups.of_user]
        kind = groups.of_kind.get(_kind(name), any_kind)
        found[id(parameter)] = groups.of_user[before[0]] if before else kind
    return found


def follow(model: nn.Module, optimizer: Any, groups: Groups, update: Update | None) -> None:
    """The optimiser goes on after an update with what is trained now; `groups` are those before it.
    None: it forgets what it knew.
    """
    state = {} if update is None else kept_state(optimizer, update)
    regroup(model, optimizer, groups)
    held, inside = _places(optimizer), unwrapped(optimizer)
    if inside.state:  # computed, as of several optimisers in one: what is in it can be emptied
        for known in (known for p, known in inside.state.items() if p not in state):
            known.clear()
        if update is not None and update.narrowed:
            what = type(inside).__name__
            _log.warning("the state of %s is computed, so that of cut adapters begins anew", what)
        return
    inside.state.update({p: known for p, known in state.items() if id(p) in held})


def unwrapped(optimizer: Any) -> Any:
    """The optimiser of torch inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def kept_state(optimizer: Any, update: Update) -> dict[Any, Known]:
    """Parameter -> what the optimiser knows of it after an update: nothing of those that begin
    anew, of narrowed adapters as A' = P A and B' = B Q say, of the others as it is.

    ∂A' = √g Qᵀ ∂A and ∂B' = √g ∂B Pᵀ, with s grown by g, hold for gradients and so for their means;
    means of squares go over with the squares of these, as if the elements were independent. What
    cannot go over begins anew, with a warning.
    """
    state, why = unwrapped(optimizer).state, None
    found = {parameter: state[parameter] for parameter in state}
    for parameter in update.fresh:
        found.pop(parameter, None)
    for before, after, down, up, growth in update.narrowed:
        root = math.sqrt(growth)
        for old, new, left, right in (
            (before[0], after[0], root * up.T, None), (before[1], after[1], None, root * down.T),
        ):  # fmt: skip
            known = found.pop(old, {})
            why = _odd(known, old) or why
            if known and not why:
                moved = {n: _moved(n, value, old, left, right) for n, value in known.items()}
                found[new] = moved
    if why is not None:
        what = f"{type(unwrapped(optimizer)).__name__} keeps {why!r} of each parameter"
        _log.warning("%s, which cannot be cut: it begins anew with the adapters", what)
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
    """What an optimiser keeps of adapters that cannot be cut with them: all but means of gradients
    and of their squares, element by element, and numbers. None where it can.
    """
    state = unwrapped(optimizer).state
    found = (_odd(state.get(parameter, {}), parameter) for parameter in bank_of(model).parameters())
    return next(filter(None, found), None)


def _odd(known: Known, parameter: Tensor) -> str | None:
    """The name of what cannot be cut with the parameter."""
    for name, value in known.items():
        number = not isinstance(value, Tensor) or not value.ndim
        if not (number or (value.shape == parameter.shape and name in _LINEAR + _SQUARED)):
            return name
    return None


def state_by_name(model: nn.Module, state: Mapping[Any, Known]) -> dict[str, Known]:
    """The same by the parameters' names in the model, as `learn` takes it."""
    found = {name: state[p] for name, p in model.named_parameters() if p in state}
    if state and not found and not any(isinstance(key, Tensor) for key in state):
        _log.warning("the optimiser keeps nothing by parameter, so it begins anew here")
    return found


def learn(model: nn.Module, optimizer: Any, known: Mapping[str, Known]) -> None:
    """The optimiser takes over what another one knew."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]
    state = {i: known[name] for i, name in enumerate(held) if name in known}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _places(optimizer: Any) -> dict[int, int]:
    """The id of each parameter that it holds -> the number of its group."""
    return {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}


def _kind(name: str) -> str:
    """The name of a tensor in the bank without its numbers."""
    return re.sub(r"\.\d+", "", name)
