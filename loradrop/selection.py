"""Which targets keep their own adapter, and which share: pure functions on plain data."""

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from loradrop.options import check_choice, check_one, check_part, check_whole
from loradrop.scores import Assignment, Scores, Target, layers_of, require_scores

CHOICES = {
    "scope": ("per_module", "joint"),
    "importance": ("sqnorm", "root"),
    "share": ("group", "shape", "interval", "none"),
    "selection": ("importance", "inverse", "random", "top", "bottom"),
}
INTERVAL = 4  # neighbouring layers that share with share="interval"


def select(
    scores: Scores,
    threshold: float | None = None,
    *,
    keep: int | None = None,
    keep_ratio: float | None = None,
    budget: float | None = None,
    scope: str = "per_module",
    importance: str = "sqnorm",
    share: str = "group",
    interval: int = INTERVAL,
) -> list[str]:
    """The targets that keep their own adapter, in layer order (Zhou et al., COLING 2025).

    Exactly one of
      threshold    in [0, 1]: in every group, the fewest targets whose importances sum to that part
                   of the group's; 0 keeps none and 1 keeps all
      keep         a count in total, split over the groups by largest remainder of their size
      keep_ratio   in [0, 1]: the same with keep = ratio · targets, rounded half up
      budget       in [0, 1]: the largest `keep` whose own and shared adapters together have at most
                   that part of the parameters of LoRA on all targets
    scope          "per_module": a group is a module type and shape; "joint": all targets are one
                   group
    importance     "sqnorm": the score; "root": its square root
    share, interval   of `assign`, by which a budget counts; "none" counts as "group"
    Ties go to the earlier target, and so it is in a group that no input has reached. Raises
    ValueError for options out of range, for NaN or infinite scores and, where the decision depends
    on them, for scores that are all zero.
    """
    require_scores(scores)
    check_choice("scope", scope, CHOICES["scope"])
    check_choice("importance", importance, CHOICES["importance"])
    given = {"threshold": threshold, "keep": keep, "keep_ratio": keep_ratio, "budget": budget}
    _check(scores, given)
    values = scores.values_by_target
    if importance == "root":
        values = [math.sqrt(value) for value in values]
    groups = _groups(scores.targets, scope)
    if threshold is not None:
        prefixes = [_prefix(values, members, threshold) for members in groups]
        return _names(scores, {i for prefix in prefixes for i in prefix})
    n = len(scores)
    ranked = functools.cache(lambda g: _ranking(values, groups[g]))
    if budget is None:
        if keep is None:
            assert keep_ratio is not None
            keep = math.floor(keep_ratio * n + 0.5 + 1e-9)  # 0.29 · 50 is a little below 14.5
        return _names(scores, _quota(groups, ranked, keep))
    sizes = [target.parameters for target in scores.targets]
    keys = _shared_keys(scores.targets, "group" if share == "none" else share, interval)
    for count in range(n, -1, -1):
        picked = _quota(groups, ranked, count)
        shared = {key: sizes[i] for i, key in enumerate(keys) if i not in picked}
        size = sum(sizes[i] for i in picked) + sum(shared.values())
        if size <= budget * sum(sizes) * (1 + 1e-12):  # 0.29 · 100 is a little below 29
            return _names(scores, picked)
    raise ValueError(f"budget={budget}: one shared adapter per group takes more; raise it")


def reselect(scores: Scores, kept: Sequence[str], selection: str, seed: int = 0) -> list[str]:
    """As many targets of every module type and shape as `kept` has, chosen otherwise: an ablation
    with the parameters of what it is compared with.

    selection   "importance": the largest scores; "inverse": the smallest; "random": by lot, with
                the seed; "top": the last layers; "bottom": the first
    """
    check_choice("selection", selection, CHOICES["selection"])
    draw, values = random.Random(seed), scores.values_by_target
    worth: list[float] = {
        "importance": values,
        "inverse": [-value for value in values],
        "random": [draw.random() for _ in values],
        "top": list(map(float, range(len(values)))),
        "bottom": [0.0] * len(values),
    }[selection]
    picked: set[int] = set()
    for members in _groups(scores.targets, "per_module"):
        count = sum(scores.targets[i].name in kept for i in members)
        picked.update(sorted(members, key=lambda i: -worth[i])[:count])
    return _names(scores, picked)


def _names(scores: Scores, picked: set[int]) -> list[str]:
    return [target.name for i, target in enumerate(scores.targets) if i in picked]


def _groups(targets: Sequence[Target], scope: str) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for i, target in enumerate(targets):
        groups.setdefault(target.group if scope == "per_module" else None, []).append(i)
    return list(groups.values())


def _ranking(values: Sequence[float], members: list[int]) -> list[int]:
    """By falling score. A group that no input has reached is in order, and all of them are not."""
    if not any(values):
        raise ValueError(
            "the scores are all zero: B is still zero, so the LoRA outputs say nothing yet. Train "
            "before probing"
        )
    return sorted(members, key=lambda i: -values[i])


def _prefix(values: Sequence[float], members: list[int], threshold: float) -> list[int]:
    if threshold in (0.0, 1.0):
        return members if threshold == 1.0 else []
    order, total, mass = _ranking(values, members), sum(values[i] for i in members), 0.0
    for count, i in enumerate(order):
        if mass >= threshold * total * (1 - 1e-12):
            return order[:count]
        mass += values[i]
    return order


def _quota(groups: list[list[int]], ranked: Callable[[int], list[int]], keep: int) -> set[int]:
    """`keep` targets, split over the groups by the largest remainder of their size; of each the
    first by `ranked`, where that matters.
    """
    n = sum(map(len, groups))
    counts = [keep * len(members) // n for members in groups]
    by_remainder = sorted(range(len(groups)), key=lambda g: -(keep * len(groups[g]) % n))
    for g in by_remainder[: keep - sum(counts)]:
        counts[g] += 1
    picked: set[int] = set()
    for g, count in enumerate(counts):
        all_or_none = count in (0, len(groups[g]))
        picked.update((groups[g] if all_or_none else ranked(g))[:count])
    return picked


def _check(scores: Scores, given: Mapping[str, Any]) -> None:
    check_one(given)
    for name in ("threshold", "keep_ratio", "budget"):
        check_part(name, given[name])
    if given["keep"] is not None:
        check_keep(given["keep"], len(scores))
    for target, value in zip(scores.targets, scores.values_by_target, strict=True):
        if not math.isfinite(value):
            raise ValueError(
                f"the score of {target.name} is {value}: its LoRA output overflowed or met NaN. "
                "Lower the learning rate, or train in float32"
            )


def check_keep(keep: int, targets: int) -> None:
    """Raises ValueError unless so many of the targets can be kept."""
    if not isinstance(keep, int) or not 0 <= keep <= targets:
        raise ValueError(f"keep={keep}: choose a whole number from 0 to the {targets} targets")


def assign(
    targets: Sequence[Target], kept: Sequence[str], share: str = "group", interval: int = INTERVAL
) -> Assignment:
    """Kept targets have an adapter of their own, the others share.

    share      one adapter per "group", which is a module type and shape (K, N, r); per "shape", of
               whatever module type; per group and "interval" of so many neighbouring layers; or
               "none": the others have no adapter
    interval   of the layers of the targets, in the order in which they come

    Raises ValueError for a name that is not a target, and for unknown options.
    """
    check_choice("share", share, CHOICES["share"])
    check_whole("interval", interval, 1)
    names = [target.name for target in targets]
    for name in kept:
        if name not in names:
            known = ", ".join(sorted(names))
            raise ValueError(f"kept has {name!r}, which is not a target; the targets are {known}")
    chosen, numbers = set(kept), dict[Any, int]()
    slots: list[int | None] = []
    for name, shared in zip(names, _shared_keys(targets, share, interval), strict=True):
        key = name if name in chosen else shared
        slots.append(None if key is None else numbers.setdefault(key, len(numbers)))
    return Assignment(tuple(targets), tuple(slots), tuple(n for n in names if n in chosen))


def _shared_keys(targets: Sequence[Target], share: str, interval: int) -> list[Any]:
    """With whom each target shares where it has no adapter of its own; None with "none"."""
    if share == "none":
        return [None] * len(targets)
    if share == "shape":
        return [target.group[1:] for target in targets]
    if share == "group":
        return [target.group for target in targets]
    of_target = layers_of([target.name for target in targets])
    layers = {layer: i for i, layer in enumerate(dict.fromkeys(filter(None, of_target)))}
    return [
        (*target.group, layers[layer] // interval) if layer else target.group
        for target, layer in zip(targets, of_target, strict=True)
    ]


def keep_frequency(
    scores: Scores, decide: Callable[[Scores], list[str]], samples: int = 100, seed: int = 0
) -> dict[str, float]:
    """How often `decide` keeps each target when rows of `scores` are drawn with replacement.

    The bootstrap (Efron, 1979) over batches. Rows without any output (B still zero) are left out.
    """
    rows = scores.rows[scores.rows.any(1)]
    generator, n = torch.Generator().manual_seed(seed), len(rows)
    if n == 0:
        raise ValueError("every row of the scores is zero, as B still is: train before probing")
    counts = dict.fromkeys(scores, 0)
    for _ in range(samples):
        drawn = rows[torch.randint(0, n, (n,), generator=generator)]
        for name in decide(Scores(scores.targets, drawn, scores.tokens, scores.source)):
            counts[name] += 1
    return {name: count / samples for name, count in counts.items()}
