"""ShareLoRA: who shares what, and that ShareAB is LoRA-drop with an empty set of kept targets."""

import numpy as np
import pytest
import torch
from method_cases import (
    ALPHA,
    KINDS,
    LAYERS,
    R,
    adapted,
    awake,
    by_kind,
    equal,
    factors,
    gradcheck,
    grads,
    train,
    trained_elements,
)

from loradrop import LoRADrop
from loradrop.methods import LoRA
from loradrop.methods.share_lora import SHARES, ShareLoRA

each_share = pytest.mark.parametrize("share", SHARES)


def elements(share: str) -> int:
    """Of three kinds in three layers each, and one target alone."""
    a, b = (1 if side in share else LAYERS for side in "AB")
    return R * (sum(a * k + b * n for k, n in KINDS.values()) + 6 + 4)


@each_share
def test_parameters(share: str) -> None:
    model, bank = adapted(ShareLoRA(share=share))
    assert bank.trainable == trained_elements(model) == elements(share)
    storages = {p.untyped_storage().data_ptr() for p in bank.parameters()}
    assert len(storages) == len(list(bank.parameters())) == len(bank.A) + len(bank.B)


@each_share
def test_who_shares_and_the_start(share: str) -> None:
    _, bank = adapted(ShareLoRA(share=share))
    for members in by_kind(bank).values():
        for side, factor in enumerate("AB"):
            first, *others = [bank.factors(i)[side] for i, _ in members]
            assert all((other is first) == (factor in share) for other in others)
    for i, target in enumerate(bank.targets):
        A, B = bank.factors(i)
        assert 0 < A.detach().abs().max() <= target.in_features**-0.5 and not B.any()


@each_share
def test_the_delta_is_that_of_the_formula(share: str) -> None:
    _, bank = adapted(ShareLoRA(share=share))
    awake(bank)
    for members in by_kind(bank).values():
        for i, _ in members:
            A = bank.factors(members[0][0] if "A" in share else i)[0].detach().double().numpy()
            B = bank.factors(members[0][0] if "B" in share else i)[1].detach().double().numpy()
            expected = ALPHA / R * B @ A
            np.testing.assert_allclose(bank.delta(i).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_both_shared_is_lora_drop_that_keeps_nothing() -> None:
    """The same start from the same seed, the same gradients, the same end."""
    model, bank = adapted(ShareLoRA(share="AB"), seed=7)
    other, dropped = adapted(LoRADrop())
    torch.manual_seed(7)
    dropped.share([], None, share="group", init="fresh", after_select="reinit")
    assert bank.slots == dropped.slots and bank.trainable == dropped.trainable
    assert equal(factors(bank), factors(dropped))
    for _ in range(3):
        ours, theirs = (
            {id(p): g for p, g in zip(m.lora_bank.parameters(), grads(m), strict=True)}
            for m in (model, other)
        )
        pairs = (zip(bank.factors(i), dropped.factors(i), strict=True) for i in range(10))
        assert all(torch.equal(ours[id(a)], theirs[id(b)]) for pair in pairs for a, b in pair)
        assert any(g.any() for g in ours.values())
        train(model), train(other)
        assert equal(factors(bank), factors(dropped))


@each_share
def test_the_gradient_of_what_is_shared_is_the_sum_over_its_targets(share: str) -> None:
    one, bank = adapted(ShareLoRA(share=share))
    two, plain = adapted(LoRA())
    one.double(), two.double()
    awake(bank)
    with torch.no_grad():
        for i in range(len(plain.targets)):
            for mine, theirs in zip(bank.factors(i), plain.factors(i), strict=True):
                theirs.copy_(mine)
    single = dict(zip(map(id, plain.parameters()), grads(two), strict=True))
    expected = {id(p): torch.zeros_like(p) for p in bank.parameters()}
    for i in range(len(plain.targets)):
        for mine, theirs in zip(bank.factors(i), plain.factors(i), strict=True):
            expected[id(mine)] += single[id(theirs)]
    torch.testing.assert_close(grads(one), list(expected.values()), rtol=1e-9, atol=1e-12)


@each_share
def test_gradients_through_the_factors(share: str) -> None:
    assert gradcheck(adapted(ShareLoRA(share=share), ["query", "last"])[1])


def test_ranks_that_differ_share_nothing() -> None:
    ranks = {"layers.1.query": 2}
    _, bank = adapted(ShareLoRA(share="AB"), ["query"], rank_pattern=ranks)
    assert [len(A) for A in bank.A] == [R, 2] and bank.which_A == [0, 1, 0]
    assert bank.factors(0)[0] is bank.factors(2)[0]


def test_an_unknown_way_to_share() -> None:
    with pytest.raises(ValueError, match=r"share='BA': choose one of A, B, AB"):
        ShareLoRA(share="BA")
