"""The benchmark of the composition runs for every method, and takes gradients into all of it."""

import pytest
import torch

import bench_compose
from loradrop import methods

NAMES = [*methods.available()]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_composition(name: str) -> None:
    bank = bench_compose.bank_of(name, 24, 32, targets=3)
    bench_compose.composition(bank)()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in bank.parameters())


def test_a_row_for_each_method() -> None:
    threads = torch.get_num_threads()
    sizes = {"M": 4, "K": 24, "N": 32, "targets": 2}
    try:
        rows = bench_compose.measure(NAMES, sizes, rounds=3)
    finally:
        torch.set_num_threads(threads)
    assert [row["method"] for row in rows] == NAMES
    for row in rows:
        assert row["compose_us"] > 0 and row["layer_us"] > 0 and row["parameters"] > 0
        assert 0 < row["p20"] <= row["part"] <= row["p80"]
