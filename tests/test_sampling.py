"""Draws that keep the proportions of the classes."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loradrop.sampling import some_of, stratified_indices


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


IDS = [[1, 2], [3, 4], [1, 2], [1, 2, 0], [3, 4]]


@pytest.mark.parametrize(
    "made",
    [list, torch.tensor, np.array, lambda ids: torch.tensor(ids, dtype=torch.bfloat16)],
    ids=["lists", "tensors", "arrays", "bfloat16"],
)
def test_equal_rows_are_drawn_once(made):
    """Whatever their labels and columns that the model does not take."""
    rows = [{"input_ids": made(ids), "labels": i, "idx": i} for i, ids in enumerate(IDS)]
    assert some_of(rows, 9, 0, {"input_ids", "labels"}).indices == [0, 1, 3]
    assert some_of(rows, 9, 0).indices == [0, 1, 2, 3, 4]
    assert some_of([(made(ids),) for ids in IDS], 9, 0).indices == [0, 1, 3]


def test_rows_that_cannot_be_compared_are_taken_as_they_are():
    assert len(some_of([{"input_ids": object()}] * 3, 9, 0)) == 3


def test_only_the_sample_is_read():
    class Rows(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read: list[int] = []
    drawn = some_of(Rows({"x": i} for i in range(1000)), 10, 0).indices
    assert read == drawn and len(read) == 10
