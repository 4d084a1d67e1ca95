"""An optimiser goes on with what a cut leaves: its groups, and what it knows of it."""

from typing import Any

import pytest
import torch
from models import adapt, bert, wake
from torch import Tensor, nn
from torch.testing import assert_close

import loradrop
from loradrop.config import LoRAConfig
from loradrop.methods import LoRA, Method, Spectral
from loradrop.optimizers import groups_of

K, N, R = 12, 10, 6
LORA = LoRA()


def chain(used: int = R, method: Method = LORA) -> Any:
    """One adapted layer in float64, of whose R directions only `used` do anything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N)).double()
    lora = LoRAConfig(r=R, lora_alpha=2 * R, target_modules=["0"], method=method)
    loradrop.inject(model, lora)
    wake(model.double())
    with torch.no_grad():
        model.lora_bank.B[0][:, used:] = 0.0
    return model


def loss(model: Any) -> Tensor:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(40, K, generator=random, dtype=torch.float64)
    found: Tensor = model(x).square().mean()
    return found


def batches() -> list[Tensor]:
    return list(torch.randn(20, 2, K, dtype=torch.float64))


@pytest.mark.parametrize("method", [LORA, Spectral(r_start=R)], ids=["lora", "another s"])
def test_projected_gradients_are_those_of_the_cut_adapter(method: Method) -> None:
    """Where the cut takes away nothing that is used, the model is the same and so are they."""
    model = chain(3, method)
    optimizer = torch.optim.SGD(model.lora_bank.parameters(), lr=0.0, momentum=0.9)
    loss(model).backward()
    optimizer.step()  # the first mean is the gradient itself
    loradrop.probe(model, batches(), gram=True)
    before = float(loss(model))
    loradrop.truncate(model, {"0": 3}, metric="output", optimizer=optimizer)
    after = loss(model)
    assert float(after) == pytest.approx(before)
    optimizer.zero_grad()
    after.backward()
    for parameter in (model.lora_bank.A[0], model.lora_bank.B[0]):
        assert parameter.shape in ((3, K), (N, 3))
        assert_close(optimizer.state[parameter]["momentum_buffer"], parameter.grad)


def test_means_of_squares_are_projected_by_squares() -> None:
    """A' = P A has the gradient Qᵀ dA, so each entry of its mean of squares is (Qᵀ)² v, where
    entries of a gradient are independent; of B', v (Pᵀ)².
    """
    model = chain()
    optimizer = torch.optim.Adam(model.lora_bank.parameters(), lr=1e-2)
    loss(model).backward()
    optimizer.step()
    A, B = (factor.detach().clone() for factor in model.lora_bank.factors(0))
    of_A, of_B = (optimizer.state[p]["exp_avg_sq"].clone() for p in model.lora_bank.factors(0))
    loradrop.truncate(model, {"0": 2}, metric="weight", optimizer=optimizer)
    cut_A, cut_B = model.lora_bank.factors(0)
    P = cut_A.detach() @ torch.linalg.pinv(A)
    Q = torch.linalg.pinv(B) @ cut_B.detach()
    assert_close(optimizer.state[cut_A]["exp_avg_sq"], Q.T.square() @ of_A)
    assert_close(optimizer.state[cut_B]["exp_avg_sq"], of_B @ P.T.square())


@pytest.mark.parametrize("compensate", [True, False])
def test_training_goes_on_with_means_of_squares(compensate: bool) -> None:
    model = chain()
    optimizer = torch.optim.AdamW(model.lora_bank.parameters(), lr=1e-2, amsgrad=True)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    loradrop.probe(model, batches(), gram=True)
    loradrop.truncate(model, {"0": 2}, compensate=compensate, optimizer=optimizer)
    for parameter in (model.lora_bank.A[0], model.lora_bank.B[0]):
        known = optimizer.state[parameter]
        assert float(known["step"]) == 5
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert known[name].shape == parameter.shape and known[name].any()
            assert name == "exp_avg" or bool((known[name] >= 0).all())
    before = float(loss(model))
    for _ in range(20):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert float(loss(model)) < before


def trained() -> tuple[Any, torch.optim.Optimizer]:
    """A classifier after a step of an optimiser with a rate for A, one for B, one for the head."""
    model = wake(adapt(bert(2)))
    bank = model.lora_bank
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lora_bank" not in n]
    groups = [
        {"params": list(bank.A), "lr": 1e-3}, {"params": list(bank.B), "lr": 2e-3},
        {"params": head, "lr": 3e-3},
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    model(input_ids=torch.arange(1, 9)[None]).logits.sum().backward()
    optimizer.step()
    return model, optimizer


def test_what_is_not_of_the_model_stays_where_it_is() -> None:
    """As a head beside an encoder, and a parameter of the loss."""
    model = wake(adapt(bert(2)))
    head, heat = nn.Linear(2, 1), nn.Parameter(torch.ones(()))
    groups = [
        {"params": [heat, *(p for p in model.parameters() if p.requires_grad)], "lr": 1e-3},
        {"params": [*head.parameters()], "lr": 2e-3},
    ]
    optimizer = torch.optim.AdamW(groups)
    (heat * head(model(input_ids=torch.arange(1, 9)[None]).logits)).sum().backward()
    optimizer.step()
    known = {p: dict(optimizer.state[p]) for p in (heat, *head.parameters())}
    ranks = dict.fromkeys((target.name for target in model.lora_bank.targets), 1)
    loradrop.truncate(model, ranks, metric="weight", optimizer=optimizer)
    first, second = (group["params"] for group in optimizer.param_groups)
    assert first[-1] is heat and second == [*head.parameters()]
    assert {id(p) for p in first[:-1]} == {id(p) for p in model.parameters() if p.requires_grad}
    for parameter, before in known.items():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], before["exp_avg"])


def test_layers_keep_their_rates_and_frozen_adapters_stay_frozen() -> None:
    model = wake(adapt(bert(2)))
    bank = model.lora_bank
    bank.pairs[0].requires_grad_(False)
    rates = {target.name: 10.0**-i for i, target in enumerate(bank.targets)}
    groups = [
        {"params": [*bank.factors(i)], "lr": rates[target.name]}
        for i, target in enumerate(bank.targets)
        if i
    ]
    optimizer = torch.optim.AdamW(groups)
    names = [*rates]
    ranks = dict.fromkeys(names, 2) | {names[1]: 0}  # the adapters behind it get other numbers
    loradrop.truncate(model, ranks, metric="weight", optimizer=optimizer)
    bank = model.lora_bank
    held = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for i, name in enumerate(names):
        factors = bank.factors(i)
        assert (factors is None) == (i == 1)
        for factor in factors or ():
            assert factor.requires_grad == (i > 0)
            assert held.get(id(factor)) == (rates[name] if i else None)
    assert len(held) == 2 * (len(names) - 2)


@pytest.mark.parametrize("moments", ["projected", "reset"])
def test_groups_stay_and_what_was_not_cut_keeps_its_state(moments: str) -> None:
    model, optimizer = trained()
    bank, groups = model.lora_bank, groups_of(model, optimizer)
    names = [target.name for target in bank.targets]
    state = {parameter: dict(known) for parameter, known in optimizer.state.items()}
    head = list(optimizer.param_groups[2]["params"])
    whole = bank.factors(1)
    loradrop.truncate(
        model, {names[0]: 1, names[3]: 0}, metric="weight", optimizer=optimizer, moments=moments
    )
    bank = model.lora_bank
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in bank.A] == [1e-3] * 3
    assert [rates[id(p)] for p in bank.B] == [2e-3] * 3
    assert optimizer.param_groups[2]["params"] == head
    assert groups_of(model, optimizer).of_kind == groups.of_kind
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
    if moments == "reset":
        assert not optimizer.state
        return
    for parameter in (*whole, *head):
        for name, value in state[parameter].items():
            assert torch.equal(optimizer.state[parameter][name], value)
    assert set(map(id, optimizer.state)) == set(rates)


def test_what_cannot_be_projected_is_refused_before_anything_changes() -> None:
    model = chain()
    optimizer = torch.optim.Rprop(model.lora_bank.parameters())
    loss(model).backward()
    optimizer.step()
    before = model.lora_bank.factors(0)
    with pytest.raises(ValueError, match=r"Rprop keeps 'prev'.*moments='reset'"):
        loradrop.truncate(model, {"0": 2}, metric="weight", optimizer=optimizer)
    assert all(a is b for a, b in zip(before, model.lora_bank.factors(0), strict=True))
    with pytest.raises(ValueError, match="moments='kept': choose one of projected, reset"):
        loradrop.truncate(model, {"0": 2}, metric="weight", optimizer=optimizer, moments="kept")
    loradrop.truncate(model, {"0": 2}, metric="weight", optimizer=optimizer, moments="reset")
    assert not optimizer.state and len(optimizer.param_groups[0]["params"]) == 2


def test_along_s_times_the_rate_squared_alpha_is_the_start_of_a() -> None:
    """docs/spectral.md: with Adam s, the rate and A train as s/4, twice the rate and 2·A do."""
    losses = []
    for c in (1.0, 2.0):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(K, N)).double()
        loradrop.inject(model, LoRAConfig(r=2, lora_alpha=4 / c**2, target_modules=["0"]))
        (pair,) = model.double().lora_bank.pairs
        with torch.no_grad():
            pair.A.mul_(c)
        adam = torch.optim.Adam(pair.parameters(), lr=0.05 * c, eps=1e-30)
        losses.append([])
        for _ in range(20):
            losses[-1].append(step := loss(model))
            adam.zero_grad()
            step.backward()
            adam.step()
    found, expected = map(torch.stack, losses)
    assert_close(found, expected, rtol=1e-9, atol=0)
    assert found[-1] < 0.9 * found[0]
