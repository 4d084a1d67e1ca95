"""The check that a provider computes the layer: against float64, before it is timed."""

from dataclasses import replace

import torch

from lib.providers import Provider
from loradrop.measuring.cases import Case
from loradrop.measuring.correct import compare, doubled, results
from loradrop.testing import assert_within


def check(provider: Provider, case: Case, backward: bool) -> None:
    """Values, gradients and norm against float64, within twice the error of PyTorch's own path.

    A provider whose dropout mask is not ours is checked without dropout. Raises AssertionError.
    """
    if provider.formula is not None:
        exact, plain = provider.formula(doubled(case)), provider.formula(case)
        assert_within(provider.make(case)()[0], plain, exact, factor=2.0)
        return
    case = case if provider.masks else replace(case, dropout=0.0)
    actual = results(case, provider.make(case), backward)
    compare(actual, case, norm=provider.norm, bare=provider.bare)
    if provider.silent is not None:
        y = results(case, provider.silent(case), backward)["y"]
        if not torch.equal(y, actual["y"]):
            raise AssertionError("y: other bits than without the norm")
