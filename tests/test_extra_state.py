"""Who uses which adapter, written into one tensor and read again."""

import pytest
import torch

from loradrop.extra_state import ALONE, MERGED, assignment_in, written
from loradrop.scores import Assignment, Target

TARGETS = tuple(Target(f"layers.{i}.query", "query", 8, 6, 2) for i in range(3))
HERE = Assignment(TARGETS, (0, 1, 2))
OPTIONS = {"tiles": 2}


@pytest.mark.parametrize("slots", [(0, 1, 2), (0, 1, 1), (None, 0, None)])
@pytest.mark.parametrize("kept", [None, (), ("layers.0.query", "layers.2.query")])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float16])
def test_what_is_written_is_read(
    slots: tuple[int | None, ...], kept: tuple[str, ...] | None, dtype: torch.dtype
) -> None:
    """Also in the floats that an average or a cast of state dicts makes of it."""
    there = Assignment(TARGETS, slots, kept)
    state = written(there, OPTIONS, merged=False)
    assert state.shape == (4, 3) and state.dtype == torch.int64
    assert assignment_in(state.to(dtype), HERE, OPTIONS, merged=False) == there


def test_other_targets_and_options_are_refused() -> None:
    state = written(HERE, OPTIONS, merged=False)
    renamed = tuple(target._replace(name=f"other.{target.name}") for target in TARGETS)
    for here in (Assignment(renamed, (0, 1, 2)), Assignment(TARGETS[:2], (0, 1))):
        with pytest.raises(RuntimeError, match=f"other targets than the {len(here.targets)} of"):
            assignment_in(state, here, OPTIONS, merged=False)
    with pytest.raises(RuntimeError, match=r"or with other options than {'tiles': 3}"):
        assignment_in(state, HERE, {"tiles": 3}, merged=False)


def test_merged_weights_are_not_merged_into_again() -> None:
    state = written(HERE, {}, merged=True)
    assert (state[3] == MERGED).all()
    with pytest.raises(RuntimeError, match="while the adapters were merged"):
        assignment_in(state, HERE, {}, merged=False)
    assert assignment_in(state, HERE, {}, merged=True) == HERE
    state[3, -1] = ALONE  # the base is elsewhere; its weights may hold what they like
    state[3, :-1] = 0
    assert assignment_in(state, HERE, {}, merged=False) == HERE


def test_the_default_device_may_be_another() -> None:
    state = written(HERE, {}, merged=False)
    with torch.device("meta"):
        assert assignment_in(state, HERE, {}, merged=False) == HERE


def test_an_average_of_different_assignments_is_refused() -> None:
    one, other = (written(Assignment(TARGETS, s), {}, False) for s in ((0, 1, 2), (0, 1, 1)))
    with pytest.raises(RuntimeError, match="an average of state dicts that share differently"):
        assignment_in((one.double() + other.double()) / 2, HERE, {}, merged=False)
