"""How a budget is spent on the directions of all targets: pure functions on plain data."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from loradrop.options import at_least, check_choice, check_one, check_whole, is_number
from loradrop.scores import layer_of, layers_of, stem_of
from loradrop.spectral.spectra import Spectrum

SCOPES = ("joint", "per_module", "per_target")


def allocate(
    spectrum: Spectrum,
    *,
    budget: float | None = None,
    threshold: float | None = None,
    max_loss: float | None = None,
    rank: int | None = None,
    scope: str = "joint",
    multiple: int = 1,
    budget_time: float | None = None,
) -> dict[str, int]:
    """Name -> the rank that is left, 0 included: the directions worth most per element.

    Exactly one of
      budget      in (0, 1]: at most that part of the elements of the adapters as they are
      threshold   in (0, 1]: that part of the sum of the values, or more, in as few elements as
                  taking directions by worth per element comes to
      max_loss    a predicted rise of the loss of at most this; as few elements as a search over
                  thresholds finds
      rank        this rank for every target, where it has as many directions
    scope      "joint": one pool of all targets; "per_module": a pool for each module type and
               shape; "per_target": every target the same part
    multiple   ranks are multiples of it (8 for some engines); an adapter of fewer directions keeps
               all of them or none
    budget_time   in (0.5, 1]: also, no adapter in so many of the lowest layers that a step of
               training takes about that part of its time, since the backward pass ends above them:
               1 − k / 2L for k of L equal layers. Targets that the model lists before its first
               layer, as a projection of its embeddings, go with that

    Ties go to the earlier target. Raises TypeError for what `spectrum` did not make; ValueError for
    options out of range, for a budget below one step of the smallest target, and for a max_loss or
    a budget_time that leaves nothing.
    """
    if not isinstance(spectrum, Spectrum):
        raise TypeError(
            f"spectrum is a {type(spectrum).__name__}: give what loradrop.spectrum(scores) returns"
        )
    check_choice("scope", scope, SCOPES)
    given = {"budget": budget, "threshold": threshold, "max_loss": max_loss, "rank": rank}
    check_amounts(given)
    if max_loss is not None and spectrum.metric != "loss":
        raise ValueError(f"max_loss needs metric='loss', and the spectrum has {spectrum.metric!r}")
    check_steps(multiple, budget_time)
    low = _lowest(spectrum, budget_time)
    if rank is not None:
        if rank % multiple:
            raise ValueError(f"rank={rank} is not a multiple of multiple={multiple}: leave one out")
        most = {name: _most(len(spectrum[name]), multiple) for name in spectrum}
        return {name: 0 if name in low else min(rank, most[name]) for name in spectrum}
    pools = _allowed(spectrum, scope, low)
    if max_loss is None:
        ranks = _spend(spectrum, pools, budget, threshold, multiple)
    else:
        ranks = _within(spectrum, pools, max_loss, multiple)
    if budget is not None and spectrum.full and not any(ranks.values()):
        raise ValueError(below_one(budget, _least(spectrum, pools, multiple), scope, multiple))
    if max_loss is not None:
        require_trained(spectrum, f"max_loss={max_loss:g}: the adapter")
    if max_loss is not None and spectrum.full and not any(ranks.values()):
        raise ValueError(
            f"max_loss={max_loss:g} leaves no adapter at all, which would cost "
            f"{spectrum.loss(ranks):.2g}: choose less"
        )
    return ranks


def require_trained(spectrum: Spectrum, what: str) -> None:
    """Raises ValueError where no direction of `what` is worth anything."""
    if spectrum.full and not spectrum.total:
        raise ValueError(
            f"{what} does nothing, as every direction is worth 0 (B is zero until it is trained): "
            "give an adapter that was trained"
        )


def least_budget(
    spectrum: Spectrum, *, scope: str = "joint", multiple: int = 1, budget_time: float | None = None
) -> float:
    """The smallest budget for which `allocate` leaves anything, whatever the values are."""
    return _least(spectrum, _allowed(spectrum, scope, _lowest(spectrum, budget_time)), multiple)


def below_one(budget: float, least: float, scope: str, multiple: int) -> str:
    """The error for a budget that leaves nothing in pools of this `scope`."""
    what = "one direction" if multiple == 1 else f"one step of multiple={multiple} directions"
    wider = "" if scope == SCOPES[0] else ", or a scope that pools more targets"
    return f"budget={budget:g} is below {what}: choose at least {at_least(least)}{wider}"


# All of a pool's adapters, and those that may keep some directions.
_Pool = tuple[list[int], list[int]]


def _allowed(spectrum: Spectrum, scope: str, low: set[str]) -> list[_Pool]:
    """The pools; targets in `low` get nothing."""
    return [
        (pool, [i for i in pool if not low & _names(spectrum, i)])
        for pool in _pools(spectrum, scope)
    ]


def _least(spectrum: Spectrum, pools: Sequence[_Pool], step: int) -> float:
    """The part of a pool's elements that its smallest step is, of the pool where that is least."""
    found = []
    for pool, upper in pools:
        full = _elements(spectrum, pool)
        steps = [min(step, len(spectrum.by_target[i])) * spectrum.cost(i) for i in upper]
        found += [size / full for size in steps if size]
    return min(found, default=0.0)


def _elements(spectrum: Spectrum, pool: Sequence[int]) -> int:
    """Of the pool's adapters as they are."""
    return sum(len(spectrum.by_target[i]) * spectrum.cost(i) for i in pool)


def _within(
    spectrum: Spectrum, pools: Sequence[_Pool], max_loss: float, step: int
) -> dict[str, int]:
    """Few directions, in the order of their worth, whose cut costs no more than max_loss: found by
    bisection, as if the cost fell with every direction more.
    """
    low, high = 0.0, 1.0  # parts of the values to keep
    ranks = _spend(spectrum, pools, None, low, step)
    if spectrum.loss(ranks) <= max_loss:
        return ranks
    ranks = _spend(spectrum, pools, None, None, step)
    if (least := spectrum.loss(ranks)) > max_loss:
        cut = any(len(allowed) < len(pool) for pool, allowed in pools)  # by budget_time
        how = ["without adapters in the lowest layers"] * cut
        how += [f"with multiple={step}"] * (step > 1)
        raise ValueError(
            f"max_loss={max_loss:g} cannot be kept {' and '.join(how)}, which costs {least:.2g}: "
            f"choose more, or {'a larger budget_time' if cut else 'leave multiple out'}"
        )
    for _ in range(50):
        middle = (low + high) / 2
        tried = _spend(spectrum, pools, None, middle, step)
        if spectrum.loss(tried) <= max_loss:
            high, ranks = middle, tried
        else:
            low = middle
    return ranks


def _spend(
    spectrum: Spectrum,
    pools: Sequence[_Pool],
    budget: float | None,
    threshold: float | None,
    step: int,
) -> dict[str, int]:
    """Name -> rank: in each pool by falling value per element, as `allocate` says."""
    ranks = dict.fromkeys(spectrum, 0)
    for pool, upper in pools:
        whole = sum(sum(spectrum.by_target[i]) for i in pool)
        full = _elements(spectrum, pool)
        limit = math.inf if budget is None else budget * full * (1 + 1e-12)
        wanted = math.inf if threshold is None else threshold * whole * (1 - 1e-12)
        for i, k in _of_pool(spectrum, upper, limit, wanted, step).items():
            ranks |= dict.fromkeys(_names(spectrum, i), k)
    return ranks


def _of_pool(
    spectrum: Spectrum, pool: Sequence[int], limit: float, wanted: float, step: int
) -> dict[int, int]:
    """First target of an adapter -> rank, by falling value per element."""
    offers = []
    for order, i in enumerate(pool):
        values, worth = spectrum.by_target[i], math.inf
        most = _most(len(values), step)
        for start in range(0, most, step):
            part = values[start : min(start + step, most)]
            # A step is never worth more than the one before it, whatever a sum rounds to.
            worth = min(worth, sum(part) / len(part) / spectrum.cost(i))
            offers.append((-worth, order, start, i, part))
    ranks, closed, spent, kept = dict.fromkeys(pool, 0), set[int](), 0, 0.0
    for *_, start, i, part in sorted(offers):
        size = len(part) * spectrum.cost(i)
        if kept >= wanted:
            break
        if i in closed or spent + size > limit:
            closed.add(i)
            continue
        ranks[i], spent, kept = start + len(part), spent + size, kept + sum(part)
    return ranks


def _most(directions: int, step: int) -> int:
    """The largest rank that an adapter of so many directions can keep."""
    return directions - directions % step if directions >= step else directions


def _names(spectrum: Spectrum, i: int) -> set[str]:
    """The names of the targets that use the adapter of target i."""
    users = zip(spectrum.targets, spectrum.slots, strict=True)
    return {target.name for target, slot in users if slot == spectrum.slots[i]}


def _lowest(spectrum: Spectrum, budget_time: float | None) -> set[str]:
    """The targets in the lowest layers and before them, which must go for this part of a step's
    time, and those that share an adapter with one of them.

    Raises ValueError where every adapter would go.
    """
    names = list(spectrum)
    cleared, left = _divided(names, budget_time)
    if not cleared:
        return set()
    of_target = dict(zip(names, layers_of(names), strict=True))
    before = itertools.takewhile(lambda name: not of_target[name], names)
    low = {*before, *(name for name in names if of_target[name] in cleared)}
    used = [(i, _names(spectrum, i)) for i in spectrum.adapters]
    low |= {name for _, users in used if low & users for name in users}
    if spectrum.full and not any(spectrum.by_target[i] for i, users in used if not low & users):
        raise ValueError(
            f"budget_time={budget_time:g} leaves no adapter at all, as each is used in the lowest "
            f"{len(cleared)} of {len(cleared + left)} layers: choose a larger one, or leave it out"
        )
    return low


def _divided(targets: Sequence[str], budget_time: float | None) -> tuple[list[str], list[str]]:
    """The layers that must go for this part of a step's time, and those above them."""
    layers = list(dict.fromkeys(filter(None, layers_of(targets))))
    if budget_time is None:
        return [], layers
    if not layers:
        raise ValueError(
            f"budget_time={budget_time} needs targets in numbered layers, as layers.0.query, and "
            "there are none: leave it out"
        )
    count = math.ceil(2 * len(layers) * (1 - budget_time) - 1e-9)
    if count >= len(layers):
        raise ValueError(
            f"budget_time={budget_time} leaves none of the {len(layers)} layers an adapter: choose "
            f"at least {1 - (len(layers) - 1) / (2 * len(layers)):.3g}"
        )
    return layers[:count], layers[count:]


def time_in_vain(
    targets: Sequence[str], parameters: Mapping[str, bool], budget_time: float | None
) -> str | None:
    """Why `budget_time` saves nothing though layers lose their adapters; None where it does.

    parameters   name -> whether it is trained whole, in the order in which the model lists them
    """
    cleared, left = _divided(targets, budget_time)
    stem = stem_of(targets)
    below = itertools.takewhile(lambda name: layer_of(name, stem) not in left, parameters)
    lowest = next((name for name in below if parameters[name]), None)
    if not cleared or lowest is None:
        return None
    return (
        f"budget_time={budget_time:g} saves little or nothing: {lowest} is trained whole below the "
        "layers that keep adapters, and every backward pass goes down to it. Leave it out of "
        "modules_to_save, or leave budget_time out"
    )


def _pools(spectrum: Spectrum, scope: str) -> list[list[int]]:
    pools: dict[Any, list[int]] = {}
    for i in spectrum.adapters:
        target = spectrum.targets[i]
        key = {"joint": None, "per_target": i, "per_module": target.group[:3]}[scope]
        pools.setdefault(key, []).append(i)
    return list(pools.values())


def check_amounts(given: Mapping[str, Any]) -> None:
    """Raises ValueError unless exactly one of them is given, and is in its range."""
    check_one(given)
    for name in ("budget", "threshold"):
        part = given.get(name)
        if part is not None and not (is_number(part) and 0.0 < part <= 1.0):
            shown = f"{part:g}" if is_number(part) else repr(part)
            raise ValueError(f"{name}={shown}: choose a number in (0, 1]")
    rank, max_loss = given.get("rank"), given.get("max_loss")
    if rank is not None:
        check_whole("rank", rank, 0)
    if max_loss is not None and not (is_number(max_loss) and 0.0 <= max_loss < math.inf):
        raise ValueError(f"max_loss={max_loss!r}: choose a number from 0 up")


def check_steps(multiple: int, budget_time: float | None) -> None:
    """Raises ValueError naming the one that is out of range."""
    check_whole("multiple", multiple, 1)
    if budget_time is not None and not (is_number(budget_time) and 0.5 < budget_time <= 1.0):
        raise ValueError(
            f"budget_time={budget_time!r}: choose a number in (0.5, 1], as the forward pass stays"
        )
