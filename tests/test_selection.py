"""The decision on plain numbers: thresholds, counts, budgets, ties, what it must not depend on."""

import itertools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loradrop.scores import Assignment, Scores, Target, group_numbers, layers_of
from loradrop.selection import assign, keep_frequency, reselect, select

property_test = settings(max_examples=150, deadline=None, derandomize=True)


def target(i: int, kind: str = "q", k: int = 8, n: int = 8, r: int = 2) -> Target:
    return Target(f"layers.{i}.{kind}", kind, k, n, r)


def scores_of(values: Sequence[float], targets: Sequence[Target] | None = None) -> Scores:
    targets = targets or [target(i) for i in range(len(values))]
    rows = torch.tensor([list(values)], dtype=torch.float64)
    return Scores(tuple(targets), rows, tokens=10, source="offline")


def grouped(*values: Sequence[float]) -> Scores:
    """One group per list: kinds a, b, c ... layer by layer within each."""
    kinds = "abcdefgh"
    targets = [target(i, kinds[g]) for g, group in enumerate(values) for i in range(len(group))]
    return scores_of([v for group in values for v in group], targets)


def kept(scores: Scores, *args: Any, **options: Any) -> list[int]:
    """Positions of the kept targets, which come in layer order."""
    names = [t.name for t in scores.targets]
    positions = [names.index(name) for name in select(scores, *args, **options)]
    assert positions == sorted(set(positions))
    return positions


def per_group(scores: Scores, positions: list[int]) -> list[int]:
    chosen = [scores.targets[i].kind for i in positions]
    return [chosen.count(kind) for kind in dict.fromkeys(t.kind for t in scores.targets)]


# Scores


def test_scores_are_a_mapping_with_shapes() -> None:
    targets = (target(0, "q"), target(1, "up", 8, 32))
    rows = torch.tensor([[1.0, 2.0], [0.5, 4.0]], dtype=torch.float64)
    scores = Scores(targets, rows, tokens=7, source="online")
    assert dict(scores) == {"layers.0.q": 1.5, "layers.1.up": 6.0}
    assert len(scores) == 2 and "layers.0.q" in scores and "q" not in scores
    assert (scores.tokens, scores.source) == (7, "online")
    assert [t[1:4] for t in scores.targets] == [("q", 8, 8), ("up", 8, 32)]
    with pytest.raises(KeyError, match=r"layers\.9"):
        scores["layers.9"]
    plain = scores.to_dict()
    assert plain["values"] == dict(scores)
    assert (plain["source"], plain["tokens"], plain["rows"]) == ("online", 7, 2)


# Thresholds

THRESHOLDS = {
    "none at 0": ([3, 1, 2], 0.0, []),
    "all at 1": ([3, 1, 2], 1.0, [0, 1, 2]),
    "all at 1, zeros too": ([3, 0, 2], 1.0, [0, 1, 2]),
    "the largest": ([1, 5, 2], 0.5, [1]),
    "exactly the sum": ([5, 3, 2], 0.8, [0, 1]),
    "just above the sum": ([5, 3, 2], 0.81, [0, 1, 2]),
    "exactly, in decimals": ([0.5, 0.3, 0.1, 0.1], 0.9, [0, 1, 2]),
    "exactly, but not as floats": ([0.3, 0.1], 0.75, [0]),
    "a small one": ([5, 3, 2], 0.001, [0]),
    "ties in layer order": ([1, 2, 2, 2], 0.5, [1, 2]),
    "all equal": ([1, 1, 1, 1], 0.5, [0, 1]),
    "zeros are not needed": ([0, 4, 0, 1], 0.9, [1, 3]),
    "one target": ([7], 0.9, [0]),
}


@pytest.mark.parametrize(("values", "threshold", "expected"), THRESHOLDS.values(), ids=THRESHOLDS)
@pytest.mark.parametrize("scope", ["per_module", "joint"])
def test_threshold(values: Any, threshold: float, expected: list[int], scope: str) -> None:
    assert kept(scores_of(values), threshold, scope=scope) == expected
    scaled = scores_of([value * 2.0**40 for value in values])
    assert kept(scaled, threshold=threshold, scope=scope) == expected


def test_threshold_is_of_the_norm_or_of_its_square() -> None:
    scores = scores_of([16, 9, 1])  # norms 4, 3, 1: halves are 13 of 26 and 4 of 8
    assert kept(scores, 0.6) == kept(scores, 0.6, importance="sqnorm") == [0]
    assert kept(scores, 0.6, importance="root") == [0, 1]


def test_the_default_scope_is_a_module_type_and_shape() -> None:
    scores = grouped([8, 1, 1], [1000, 900])
    assert kept(scores, 0.6) == kept(scores, 0.6, scope="per_module") == [0, 3, 4]
    assert kept(scores, 0.6, scope="joint") == kept(scores, keep=2, scope="joint") == [3, 4]
    wide = [target(0), target(1), target(2, n=32), target(3, n=32)]
    assert kept(scores_of([1, 9, 900, 100], wide), 0.5) == [1, 2]
    ranks = [target(0), target(1, r=4)]
    assert kept(scores_of([1, 900], ranks), 0.5) == [0, 1]


finite = st.floats(1e-6, 1e6)
values_of_some = st.lists(finite | st.just(0.0) | st.just(1.0), min_size=1, max_size=12).filter(any)


@property_test
@given(values_of_some, st.floats(0, 1))
def test_threshold_keeps_the_fewest_that_suffice(values: list[float], threshold: float) -> None:
    positions = kept(scores_of(values), threshold)
    if threshold == 1.0:
        assert positions == list(range(len(values)))
        return
    mass = math.fsum(values[i] for i in positions)
    need, near = threshold * math.fsum(values), 1e-9 * math.fsum(values)
    assert mass >= need - near
    best = sorted(values, reverse=True)
    assert mass == pytest.approx(math.fsum(best[: len(positions)]))
    if positions and threshold > 0:
        assert math.fsum(best[: len(positions) - 1]) < need + near


@property_test
@given(values_of_some, st.floats(0, 1), st.floats(0, 1), st.sampled_from(["per_module", "joint"]))
def test_a_larger_threshold_keeps_what_a_smaller_one_keeps(
    values: list[float], one: float, two: float, scope: str
) -> None:
    half = (len(values) + 1) // 2
    scores = grouped([1.0, *values[:half]], [1.0, *values[half:]])
    small, large = (set(kept(scores, t, scope=scope)) for t in sorted((one, two)))
    assert small <= large


of_mass = ({"threshold": 0.7}, {"threshold": 0.7, "scope": "joint"})
of_count = ({"keep_ratio": 0.4}, {"budget": 0.6})
decisions = st.sampled_from([*of_mass, {"threshold": 0.7, "importance": "root"}, *of_count])


@property_test
@given(st.lists(finite, min_size=2, max_size=10, unique=True), st.randoms(), decisions)
def test_the_order_of_the_targets_does_not_matter(values: Any, shuffler: Any, options: Any) -> None:
    """For one type; where values differ. Between types a tie of remainders goes by order."""
    order = list(range(len(values)))
    shuffler.shuffle(order)
    shuffled = scores_of([values[i] for i in order], [target(i) for i in order])
    assert set(select(shuffled, **options)) == set(select(scores_of(values), **options))


@property_test
@given(values_of_some.filter(lambda values: len(values) > 1), decisions, st.integers(-30, 30))
def test_the_unit_of_the_scores_does_not_matter(values: Any, options: Any, exponent: int) -> None:
    scaled = scores_of([value * 4.0**exponent for value in values])
    assert select(scaled, **options) == select(scores_of(values), **options)


# Counts


def test_keep_takes_the_largest() -> None:
    scores = scores_of([1, 5, 2, 4, 3])
    for keep, expected in enumerate(([], [1], [1, 3], [1, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4])):
        assert kept(scores, keep=keep) == expected
    assert kept(scores_of([2, 2, 2, 2]), keep=2) == [0, 1]
    assert kept(scores_of([0, 3, 0]), keep=2) == [0, 1]


SPLITS = {  # keep -> counts per group: floors, then by remainder, ties to the earlier group
    "even": ((4, 4), 4, [2, 2]),
    "odd, tie to the first": ((4, 4), 5, [3, 2]),
    "by size": ((6, 3), 3, [2, 1]),
    "largest remainder": ((6, 3), 4, [3, 1]),
    "small groups may get none": ((10, 1), 3, [3, 0]),
    "small groups may get one": ((2, 10), 4, [1, 3]),
    "tie of all": ((1, 1, 1), 2, [1, 1, 0]),
    "tie of unlike sizes": ((4, 1, 1), 2, [2, 0, 0]),
    "tie of unlike sizes, reversed": ((1, 1, 4), 2, [1, 0, 1]),
    "none": ((3, 2), 0, [0, 0]),
    "all": ((3, 2), 5, [3, 2]),
}


@pytest.mark.parametrize(("sizes", "keep", "expected"), SPLITS.values(), ids=SPLITS)
def test_keep_is_split_by_largest_remainder(sizes: Any, keep: int, expected: list[int]) -> None:
    scores = grouped(*([float(i + 1) for i in range(size)] for size in sizes))
    positions = kept(scores, keep=keep)
    assert len(positions) == keep and per_group(scores, positions) == expected


def by_largest_remainder(sizes: list[int], keep: int) -> list[int]:
    """Floors of the exact shares, then one more by remainder; a tie goes to the earlier group."""
    exact = [Fraction(keep * size, sum(sizes)) for size in sizes]
    counts = [math.floor(share) for share in exact]
    left = sorted(range(len(sizes)), key=lambda g: (counts[g] - exact[g], g))
    for g in left[: keep - sum(counts)]:
        counts[g] += 1
    return counts


@property_test
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_keep_is_split_exactly(sizes: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, sum(sizes)))
    scores = grouped(*([1.0] * size for size in sizes))
    positions = kept(scores, keep=keep)
    assert len(positions) == keep
    assert per_group(scores, positions) == by_largest_remainder(sizes, keep)


RATIOS = [  # ratio, targets, kept
    *((0.0, 5, 0), (0.09, 5, 0), (0.1, 5, 1), (0.3, 5, 2), (0.5, 5, 3), (0.7, 5, 4), (1.0, 5, 5)),
    *((0.01, 3, 0), (0.17, 3, 1), (1 / 6, 3, 1), (0.5, 4, 2), (0.49, 1, 0), (0.5, 1, 1)),
    *((0.29, 50, 15), (0.57, 50, 29), (0.35, 90, 32), (0.145, 100, 15)),  # 14.5 in decimals
]


@pytest.mark.parametrize(("ratio", "n", "expected"), RATIOS)
def test_keep_ratio_rounds_half_up(ratio: float, n: int, expected: int) -> None:
    assert len(kept(scores_of(range(1, n + 1)), keep_ratio=ratio)) == expected


# Budgets


@pytest.mark.parametrize(("budget", "n", "expected"), [(0.29, 100, 28), (0.58, 50, 28)])
def test_a_budget_in_decimals(budget: float, n: int, expected: int) -> None:
    """Of n equal targets, one is the shared adapter; 0.29 · 100 is a little below 29."""
    assert len(kept(scores_of(range(1, n + 1)), budget=budget)) == expected


@pytest.mark.parametrize("scope", ["per_module", "joint"])
@pytest.mark.parametrize("budget", [0.25, 0.5, 0.75, 1.0])
def test_budget_is_the_largest_count_that_fits(budget: float, scope: str) -> None:
    targets = [target(i, "q") for i in range(6)] + [target(i, "up", 8, 40) for i in range(6)]
    scores = scores_of([1, 9, 3, 7, 5, 2, 40, 80, 10, 20, 60, 30], targets)
    full = sum(t.r * (t.in_features + t.out_features) for t in targets)

    def used(names: list[str]) -> int:
        adapters = {t.name if t.name in names else t.group: t for t in targets}
        return sum(t.parameters for t in adapters.values())

    names = select(scores, budget=budget, scope=scope)
    assert used(names) <= budget * full
    assert assign(targets, names).parameters == used(names)
    assert names == select(scores, keep=len(names), scope=scope)
    for more in range(len(names) + 1, len(targets) + 1):
        assert used(select(scores, keep=more, scope=scope)) > budget * full


def test_budgets_of_equal_layers() -> None:
    """Own plus shared: of twelve equal targets, five and the shared one are half."""
    assert len(kept(scores_of(range(1, 13)), budget=0.5)) == 5
    with pytest.raises(ValueError, match=r"budget=0\.1"):
        select(scores_of([1, 2, 3]), budget=0.1)


def test_parameters_of_an_assignment() -> None:
    targets = [target(0), target(1), target(2, "up", 8, 32)]
    assert assign(targets, []).parameters == 2 * 16 + 2 * 40
    assert assign(targets, ["layers.0.q"]).parameters == 2 * 16 * 2 + 2 * 40
    assert assign(targets, [t.name for t in targets]).parameters == 2 * (16 + 16 + 40)
    assert assign(targets, ["layers.0.q"], "none").parameters == 2 * 16


@pytest.mark.parametrize("share", ["shape", "interval"])
@pytest.mark.parametrize("budget", [0.4, 0.5])
def test_a_budget_counts_what_really_shares(budget: float, share: str) -> None:
    targets = [target(i, kind) for i in range(6) for kind in "qv"]
    scores, how = scores_of(range(1, 13), targets), {"share": share, "interval": 3}
    names = select(scores, budget=budget, **how)
    assert assign(targets, names, **how).parameters <= budget * 12 * 32
    more = select(scores, keep=len(names) + 1)
    assert assign(targets, more, **how).parameters > budget * 12 * 32
    assert len(names) != len(select(scores, budget=budget))


# Ablations

OTHERWISE = {"inverse": [0, 2, 6], "top": [2, 3, 7], "bottom": [0, 1, 4], "importance": [1, 3, 5]}


@pytest.mark.parametrize(("selection", "expected"), OTHERWISE.items())
def test_as_many_chosen_otherwise(selection: str, expected: list[int]) -> None:
    """Two of the first type and one of the second, whatever the choice."""
    scores = grouped([1, 3, 2, 4], [6, 9, 5, 8])
    names = [t.name for t in scores.targets]
    chosen = [names[i] for i in (1, 3, 5)]
    assert [names.index(n) for n in reselect(scores, chosen, selection)] == expected


def test_chosen_by_lot() -> None:
    scores = grouped([1, 3, 2, 4], [6, 9, 5, 8])
    chosen = select(scores, keep=4)
    drawn = [tuple(reselect(scores, chosen, "random", seed)) for seed in range(60)]
    assert drawn[5] == tuple(reselect(scores, chosen, "random", 5))
    assert {sum(n.endswith("a") for n in names) for names in drawn} == {2}
    assert len(set(drawn)) > 20  # of 36
    assert set().union(*drawn) == set(scores)
    with pytest.raises(ValueError, match=r"selection='best'.*importance, inverse, random"):
        reselect(scores, chosen, "best")


@property_test
@given(values_of_some.filter(lambda v: len(v) > 1), decisions)
def test_chosen_by_importance_is_the_decision_itself(values: Any, options: Any) -> None:
    half = (len(values) + 1) // 2
    scores = grouped([1.0, *values[:half]], [1.0, *values[half:]])
    kept_by_score = select(scores, **options)
    assert reselect(scores, kept_by_score, "importance") == kept_by_score


# Refusals


PARTS = (-0.1, 1.1, math.nan, math.inf, 90)
OUTSIDE = [*itertools.product(("threshold", "keep_ratio", "budget"), PARTS)]
OUTSIDE += [("keep", count) for count in (-1, 3, 1.5)]


@pytest.mark.parametrize(("option", "value"), OUTSIDE)
def test_a_number_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{option}={value}")):
        select(scores_of([1, 2]), **{option: value})


def test_exactly_one_criterion() -> None:
    options = {"threshold": 0.5, "keep": 1, "keep_ratio": 0.5, "budget": 0.9}
    for one, two in itertools.combinations(options, 2):
        with pytest.raises(ValueError, match=f"{one}.*{two}"):
            select(scores_of([1, 2]), **{one: options[one], two: options[two]})
    with pytest.raises(ValueError, match=r"threshold.*keep"):
        select(scores_of([1, 2]))


@pytest.mark.parametrize(
    ("option", "known"), [("scope", "per_module, joint"), ("importance", "sqnorm, root")]
)
def test_an_unknown_word_lists_the_known(option: str, known: str) -> None:
    with pytest.raises(ValueError, match=f"{option}='no_such'.*{known}"):
        select(scores_of([1, 2]), 0.5, **{option: "no_such"})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_a_score_that_is_no_number_names_its_target(value: float, threshold: float) -> None:
    with pytest.raises(ValueError, match=rf"layers\.1\.q is {value}"):
        select(scores_of([1, value, 2]), threshold)


@pytest.mark.parametrize("options", [{"threshold": 0.9}, {"keep": 2}, {"keep_ratio": 0.5}], ids=str)
def test_scores_that_are_all_zero_say_that_b_is_zero(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="B is still zero"):
        select(scores_of([0, 0, 0]), **options)


def test_a_group_that_no_input_has_reached_is_in_order() -> None:
    """As the layers of images are, in steps that have none: the others say enough."""
    scores = grouped([1, 2, 4], [0, 0, 0])
    assert kept(scores, 0.5) == [2] and kept(scores, keep=4) == [1, 2, 3, 4]
    rows = torch.tensor([[1.0, 2.0, 0.0, 0.0], [2.0, 1.0, 0.0, 3.0]], dtype=torch.float64)
    some = Scores(grouped([1, 2], [0, 0]).targets, rows, 10, "online")
    found = keep_frequency(some, lambda drawn: select(drawn, keep=2))
    assert found["layers.1.b"] > 0.5 and sum(found.values()) == pytest.approx(2)


# Slots


def test_assign() -> None:
    targets = [target(0, "q"), target(0, "v"), target(1, "q"), target(1, "v"), target(2, "q")]
    names = [t.name for t in targets]
    assert assign(targets, names).slots == (0, 1, 2, 3, 4)
    assert assign(targets, []).slots == (0, 1, 0, 1, 0)
    assert assign(targets, [names[2]]).slots == (0, 1, 2, 1, 0)
    assert assign(targets, [names[2], names[1]], "none").slots == (None, 0, 1, None, None)
    assert assign(targets, [], "none").slots == (None,) * 5
    with pytest.raises(ValueError, match=r"'layers\.9\.q'.*layers\.0\.q"):
        assign(targets, ["layers.9.q"])
    with pytest.raises(ValueError, match=r"share='no_such'.*group, shape, interval, none"):
        assign(targets, [], "no_such")
    with pytest.raises(ValueError, match=r"interval=0: choose a whole number from 1 up"):
        assign(targets, [], "interval", 0)


def test_groups_are_counted_as_they_appear() -> None:
    """By type, shape and rank: those that share where no target keeps an adapter of its own."""
    wide, other = target(2, n=16), target(3, r=4)
    targets = [target(0, "v"), target(0), wide, target(1, "v"), other, target(1), wide]
    assert group_numbers(targets) == [0, 1, 2, 0, 3, 1, 2]
    assert assign(targets, ()).slots == tuple(group_numbers(targets))
    assert group_numbers([]) == []


def test_sharing_by_shape_alone() -> None:
    targets = [target(0, "q"), target(0, "v"), target(0, "up", 8, 32), target(1, "q", r=4)]
    assert assign(targets, [], "shape").slots == (0, 0, 1, 2)
    assert assign(targets, ["layers.0.v"], "shape").slots == (0, 1, 2, 3)


def test_sharing_by_neighbouring_layers() -> None:
    """Runs of layers are counted over the layers that have targets, a group at a time."""
    targets = [target(i, kind) for i in (0, 1, 4, 5, 9) for kind in "qv"]
    head = Target("pooler.dense", "dense", 8, 8, 2)
    found = assign([*targets, head], [], "interval", 2).slots
    assert found == (0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 6)
    found = assign([*targets, head], ["layers.1.q"], "interval", 3).slots
    assert found == (0, 1, 2, 1, 0, 1, 3, 4, 3, 4, 5)
    assert assign(targets, [], "interval", 5).slots == assign(targets, []).slots
    assert not assign(targets, [], "interval", 1).shares


def test_a_number_above_the_layers_is_not_theirs() -> None:
    names = [f"1.{i}.{kind}" for i in (0, 1, 4) for kind in "qv"]
    targets = [Target(name, name[-1], 8, 8, 2) for name in names]
    assert assign(targets, [], "interval", 2).slots == (0, 1, 0, 1, 2, 3)


LAYERS = {
    "encoder.layer.0.q encoder.layer.1.q pooler": ["encoder.layer.0", "encoder.layer.1", ""],
    "encoder.block.0.q decoder.block.0.q": ["encoder.block.0", "decoder.block.0"],
    "layers.0.blocks.1.q layers.1.blocks.0.q": ["layers.0", "layers.1"],  # as in Swin
    "0 2": ["0", "2"],
    "layers.0.q layers.0.v": ["layers.0", "layers.0"],
    "groups.0.layers.0.q groups.0.layers.0.v": ["groups.0", "groups.0"],  # as in ALBERT
    "1.layers.0.q 1.layers.1.q 1.pooler out": ["1.layers.0", "1.layers.1", "", ""],
    "0.1.h.0.q 0.1.h.10.q": ["0.1.h.0", "0.1.h.10"],
    "1.h.0.q 10.h.0.q": ["1", "10"],
}


@pytest.mark.parametrize("names", LAYERS)
def test_the_layer_of_each_module(names: str) -> None:
    assert layers_of(names.split()) == LAYERS[names]


def test_an_assignment_says_who_shares() -> None:
    targets = [target(0, "q"), target(0, "v"), target(1, "q"), target(2, "q"), target(1, "v")]
    before = Assignment(tuple(targets), (0, 1, 2, 3, 4))
    assert before.states == ("own",) * 5 and not before.shares and before.kept is None
    shared = assign(targets, ["layers.1.q"])
    assert shared.states == ("shared", "shared", "own", "shared", "shared")
    assert shared.shares and shared.adapters == 3 and shared.kept == ("layers.1.q",)
    dropped = assign(targets, ["layers.1.v", "layers.1.q"], "none")
    assert dropped.states == ("none", "none", "own", "none", "own")
    assert dropped.shares and dropped.adapters == 2
    assert dropped.kept == ("layers.1.q", "layers.1.v")  # in the order of the layers


def test_a_group_of_one_keeps_its_adapter_either_way() -> None:
    targets = [target(0, "q"), target(1, "q"), target(0, "out")]
    scores = scores_of([2, 1, 5], targets)
    assert kept(scores, 0.0) == [] and kept(scores, 0.6) == [0, 2]
    assert assign(targets, []).slots == assign(targets, ["layers.0.out"]).slots == (0, 0, 1)


SHAPES = [("q",), ("v",), ("q", 4), ("q", 8, 32), ("q", 8, 8, 1)]


@property_test
@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=10), st.data())
def test_targets_of_a_type_shape_and_rank_share(shapes: list[Any], data: st.DataObject) -> None:
    """Slots are numbered in the order of the layers, without gaps."""
    targets = [target(i, *shape) for i, shape in enumerate(shapes)]
    names = data.draw(st.lists(st.sampled_from([t.name for t in targets]), unique=True))
    for how in ("group", "none"):
        slots = assign(targets, names, how).slots
        used = [slot for slot in slots if slot is not None]
        assert list(dict.fromkeys(used)) == list(range(len(set(used))))
        for t, shape, slot in zip(targets, shapes, slots, strict=True):
            users = [u for u, other in zip(targets, slots, strict=True) if other == slot]
            alike = [u for u, other in zip(targets, shapes, strict=True) if other == shape]
            sharing = [u for u in alike if u.name not in names]
            assert users == [t] if t.name in names else slot is None or users == sharing
            assert (slot is None) == (how == "none" and t.name not in names)


# The bootstrap


def many_rows(*columns: Sequence[float]) -> Scores:
    rows = torch.tensor(columns, dtype=torch.float64).T
    return Scores(tuple(target(i) for i in range(len(columns))), rows, 10, "online")


def keep_two(scores: Scores) -> list[str]:
    return select(scores, keep=2)


def test_keep_frequency_of_a_doubtful_case() -> None:
    scores = many_rows([9] * 6, [4, 1, 4, 1, 4, 1], [1, 4, 1, 4, 1, 4])
    before = torch.get_rng_state()
    frequency = keep_frequency(scores, keep_two, samples=200)
    assert torch.equal(torch.get_rng_state(), before)
    assert frequency["layers.0.q"] == 1.0
    assert 0.2 < frequency["layers.1.q"] < 0.8
    assert sum(frequency.values()) == pytest.approx(2)
    assert keep_frequency(scores, keep_two, samples=200) == frequency
    assert keep_frequency(scores, keep_two, samples=200, seed=1) != frequency


def test_keep_frequency_of_a_clear_case_and_of_steps_without_output() -> None:
    steps = ([9, 8, 9], [1, 2, 1], [5, 6, 5])
    expected = {"layers.0.q": 1, "layers.1.q": 0, "layers.2.q": 1}
    assert keep_frequency(many_rows(*steps), keep_two) == expected
    assert keep_frequency(many_rows(*([0, 0, *step] for step in steps)), keep_two) == expected
    with pytest.raises(ValueError, match="every row of the scores is zero, as B still is"):
        keep_frequency(many_rows([0, 0], [0, 0]), keep_two)
