"""Draws that keep the proportions of the classes."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loradrop.sampling import stratified_indices


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_a_stratified_draw_has_every_class_within_one_of_its_share(labels, share, seed):
    n = len(labels)
    drawn = stratified_indices(labels, n, share, seed)
    count = max(1, math.floor(share * n + 0.5))
    assert drawn == sorted(set(drawn)) and len(drawn) == count
    assert drawn == stratified_indices(labels, n, count, seed)
    found = Counter(labels[i] for i in drawn)
    for label, size in Counter(labels).items():
        assert abs(found[label] - size * count / n) < 1


def test_draws_by_largest_remainder_and_by_seed():
    labels = [0] * 50 + [1] * 30 + [2] * 20
    assert Counter(labels[i] for i in stratified_indices(labels, 100, 7, 0)) == {0: 4, 1: 2, 2: 1}
    assert stratified_indices(labels, 100, 7, 0) != stratified_indices(labels, 100, 7, 1)
    assert stratified_indices(None, 10, 10, 0) == list(range(10))
    assert len(stratified_indices(None, 10, 0.25, 0)) == 3
    for size in (0, 11, 1.5, 0.0):
        with pytest.raises(ValueError, match="of 10 rows"):
            stratified_indices(None, 10, size, 0)
    with pytest.raises(ValueError, match="3 labels for 10 rows: give one label per row"):
        stratified_indices([0, 1, 2], 10, 5, 0)
