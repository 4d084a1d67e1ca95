"""AdaLoRA against NumPy: the SVD form, its penalty, the importance of triplets, and the budget."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import training_runs as tiny
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig
from loradrop.methods.adalora import SIDES, AdaLoRA, AdaLoRABank
from loradrop.methods.orthogonality import add_gradient

pytestmark = pytest.mark.numbers

R, START = 2, 3


class Net(nn.Module):
    """Targets of two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(9, 7), nn.Linear(7, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.tall(torch.tanh(self.wide(x)))


def injected(**options: Any) -> tuple[Net, AdaLoRABank]:
    torch.manual_seed(0)
    net = Net()
    config = LoRAConfig(
        r=R, lora_alpha=3, target_modules=["wide", "tall"], method=AdaLoRA(**options)
    )
    bank = loradrop.inject(net, config)
    assert isinstance(bank, AdaLoRABank)
    return net, bank


def noise(bank: AdaLoRABank, seed: int = 0) -> None:
    """Every parameter and every gradient is drawn."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in bank.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def test_the_delta_is_that_of_the_formula() -> None:
    """ΔW = s·P·diag(λ)·Q with s = α/r of the configuration, whatever rank it starts with."""
    net, bank = injected()
    noise(bank)
    x = torch.randn(5, 9)
    with loradrop.disabled(net):
        base = net.wide(x)
    for i, (K, N) in enumerate(((9, 7), (7, 8))):
        P, values, Q = (getattr(bank, side)[i].detach().numpy() for side in SIDES)
        assert (P.shape, values.shape, Q.shape) == ((N, START), (START,), (START, K))
        expected = 3 / R * P @ np.diag(values) @ Q
        np.testing.assert_allclose(bank.delta(i).numpy(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.wide(x), base + x @ bank.delta(0).T, rtol=1e-4, atol=1e-4)


def test_the_start() -> None:
    torch.manual_seed(0)
    net = nn.Linear(400, 300)
    model = nn.Sequential(net)
    x = torch.randn(2, 400)
    before = model(x)
    bank = loradrop.inject(model, LoRAConfig(r=8, target_modules=["0"], method=AdaLoRA()))
    assert torch.equal(model(x), before)
    assert bank.targets[0].r == 12 and not bank.Lambda[0].any()
    for factor in (bank.P[0], bank.Q[0]):  # 3,600 and 4,800 draws of N(0, 0.02²)
        assert float(factor.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert abs(float(factor.detach().mean())) < 0.002
    assert bank.trainable == 12 * (400 + 300 + 1)


def test_ranks_of_the_start() -> None:
    assert [t.r for t in injected()[1].targets] == [START, START]
    assert [t.r for t in injected(r_start=100)[1].targets] == [7, 7]  # as many as there are
    assert injected()[1].final == 2 * R and injected()[1].full == 2 * START


@pytest.mark.parametrize("columns", [False, True])
def test_the_gradient_of_the_penalty(columns: bool) -> None:
    drawn = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factor = nn.Parameter(drawn.T.clone() if columns else drawn)
    gram = factor.T @ factor if columns else factor @ factor.T
    (0.3 * (gram - torch.eye(3)).square().sum()).backward()
    expected = factor.grad.clone()
    factor.grad = torch.ones_like(factor)
    add_gradient(factor, 0.3, columns)
    torch.testing.assert_close(factor.grad, expected + 1.0, rtol=1e-12, atol=1e-12)
    factor.grad = None
    add_gradient(factor, 0.3, columns)
    assert factor.grad is None


def test_gradients_through_the_composition() -> None:
    bank = injected()[1].double()
    noise(bank)
    parts = [bank.P[0], bank.Lambda[0], bank.Q[0]]
    x = torch.randn(4, 9, dtype=torch.float64)

    def out(*_: Tensor) -> Tensor:
        A, B = bank.factors(0)
        return x @ A.T @ B.T

    assert torch.autograd.gradcheck(out, parts)


def test_importance_and_mask_are_those_of_the_formula() -> None:
    """Over three steps of drawn weights and gradients, with a penalty, against NumPy."""
    _, bank = injected(gamma=0.2, beta1=0.6, beta2=0.7, t_initial=0.0, t_final=0.25)
    method = AdaLoRA(gamma=0.2, beta1=0.6, beta2=0.7, t_initial=0.0, t_final=0.25, mask_every=2)
    mean = {(side, i): 0.0 for side in SIDES for i in (0, 1)}
    doubt = dict(mean)
    for step in (1, 2, 3):
        noise(bank, step)
        for (side, i), average in mean.items():
            weight = getattr(bank, side)[i]
            w, g = weight.detach().double().numpy(), weight.grad.double().numpy()
            if side == "P":
                g = g + 4 * 0.2 * w @ (w.T @ w - np.eye(START))
            elif side == "Q":
                g = g + 4 * 0.2 * (w @ w.T - np.eye(START)) @ w
            found = np.abs(w * g)
            mean[side, i] = 0.6 * average + 0.4 * found
            doubt[side, i] = 0.7 * doubt[side, i] + 0.3 * np.abs(found - mean[side, i])
        method.before_step(bank, step, 4)
        score = {key: mean[key] * doubt[key] for key in mean}
        S = [score["Lambda", i] + score["P", i].mean(0) + score["Q", i].mean(1) for i in (0, 1)]
        for i in (0, 1):
            np.testing.assert_allclose(bank.importance(i).numpy(), S[i], rtol=1e-4)
        left = {1: 6, 2: 4 + round(2 * (1 - 2 / 3) ** 3), 3: 4}[step]
        ranking = np.argsort(-np.concatenate(S))
        expected = np.zeros(6)
        expected[ranking[:left]] = 1.0
        assert np.array_equal(np.concatenate([bank.mask(0), bank.mask(1)]), expected)
    before = [values.detach().clone() for values in bank.Lambda]
    method.on_step_end(bank, 3, {})
    assert bank.ranks == [int(bank.mask(i).sum()) for i in (0, 1)] and sum(bank.ranks) == 4
    for i, values in enumerate(bank.Lambda):
        assert torch.equal(values, before[i] * bank.mask(i))


def test_ties_go_to_the_earlier_triplet() -> None:
    bank = injected()[1]
    bank.select(4)
    assert [bank.mask(i).tolist() for i in (0, 1)] == [[1, 1, 1], [1, 0, 0]]


def test_the_budget_falls_with_a_cube() -> None:
    method = AdaLoRA(t_initial=0.2, t_final=0.3)
    assert method.ends(100) == (20, 70)
    found = [method.budget(t, 100, 200, 80) for t in range(1, 101)]
    for t, b in enumerate(found, 1):
        exact = 80 + 120 * (1 - (t - 20) / (100 - 20 - 30)) ** 3
        exact = 200 if t < 20 else 80 if t > 70 else exact
        assert abs(b - exact) <= 0.5 + 1e-9
    assert found == sorted(found, reverse=True) and (found[0], found[-1]) == (200, 80)


def test_when_masks_are_drawn() -> None:
    """Every ten steps and at T − t_f; in between all may grow, and afterwards none is redrawn."""
    bank = injected()[1]
    method, masked = AdaLoRA(t_initial=0.2, t_final=0.35), []
    for step in range(1, 101):
        noise(bank, step)
        method.before_step(bank, step, 100)
        method.on_step_end(bank, step, {})
        masked += [step] if sum(bank.ranks) < bank.full else []
        if step == 65:
            last = [bank.mask(i).clone() for i in (0, 1)]
    assert masked == [30, 40, 50, 60, *range(65, 101)]
    assert all(torch.equal(bank.mask(i), last[i]) for i in (0, 1)) and sum(bank.ranks) == bank.final


def test_at_full_budget_it_is_its_svd_form() -> None:
    """b_T = b_0 and γ = 0: bit for bit what plain training of P, λ and Q comes to."""
    found = []
    for events in (True, False):
        net, bank = injected(r_start=R, gamma=0.0, mask_every=1, t_initial=0.0)
        method = AdaLoRA(r_start=R, gamma=0.0, mask_every=1, t_initial=0.0)
        optimizer = torch.optim.AdamW(bank.parameters(), lr=0.02)
        x = torch.randn(6, 9, generator=torch.Generator().manual_seed(3))
        for step in range(1, 9):
            net(x).square().sum().backward()
            if events:
                method.before_step(bank, step, 8)
            optimizer.step()
            if events:
                method.on_step_end(bank, step, {})
            optimizer.zero_grad()
        found.append([parameter.detach().clone() for parameter in bank.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert all(values.all() for values in found[0][2:4])  # λ left zero


def test_a_target_without_a_gradient_is_left_alone() -> None:
    bank = injected()[1]
    noise(bank)
    for side in SIDES:
        getattr(bank, side)[1].grad = None
    AdaLoRA().before_step(bank, 1, 10)
    assert bank.importance(0).all() and not bank.importance(1).any()


def test_a_step_that_overflows_is_forgotten() -> None:
    """As fp16 leaves it out: the importance stays finite, and goes on from what it was."""
    bank = injected()[1]
    for step, broken in enumerate((None, float("inf"), float("nan"), None), 1):
        noise(bank, step)
        if broken is not None:
            bank.P[0].grad[0, 0] = bank.Lambda[0].grad[1] = broken
        AdaLoRA().before_step(bank, step, 10)
        assert bank.importance(0).isfinite().all() and bank.importance(0).all()


METHOD = AdaLoRA(mask_every=3, t_initial=0.1, t_final=0.4)
CONFIG = LoRAConfig(**tiny.LORA, method=METHOD)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder, model = tmp_path_factory.mktemp("whole"), tiny.make_model()
    result = tiny.run(folder, CONFIG, model=model)
    return SimpleNamespace(folder=folder, bank=model.lora_bank, result=result)


def test_a_run_ends_with_the_budget(whole: SimpleNamespace) -> None:
    bank = whole.bank
    assert sum(bank.ranks) == bank.final == 4 * 4 < bank.full == 4 * 6
    assert whole.result.plan.facts == {"mean rank": 4.0}
    assert whole.result.parameters == 4 * 6 * (32 + 32 + 1) and whole.result.steps == tiny.TOTAL
    losses = [entry["loss"] for entry in whole.result.history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("step", [6, 15])  # while the budget falls, and after it
def test_resumed_to_the_same_end(step: int, whole: SimpleNamespace, tmp_path: Path) -> None:
    tiny.interrupted(tmp_path, "main", step, config=CONFIG)
    tiny.run(tmp_path, CONFIG, resume=True)
    assert tiny.outcome(tmp_path) == tiny.outcome(whole.folder)


def test_saved_and_loaded(whole: SimpleNamespace) -> None:
    twin = tiny.make_model()
    bank = loradrop.load(twin, whole.folder / "adapter")
    before, after = whole.bank.state_dict(), bank.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert bank.ranks == whole.bank.ranks and copy.deepcopy(bank).ranks == bank.ranks


@pytest.mark.parametrize(("here", "there"), [(R, 5), (5, R + 1), (R, R + 1)])
def test_loaded_with_another_start_it_prunes(here: int, there: int, tmp_path: Path) -> None:
    """The budget falls from the triplets that are there, not from those of before."""
    loradrop.save(injected(r_start=there)[0], tmp_path)
    net, bank = injected(r_start=here)
    loradrop.load(net, tmp_path)
    assert (bank.full, bank.final) == (2 * there, 2 * R)
    method, left = AdaLoRA(r_start=here, mask_every=1), []
    for step in range(1, 11):
        noise(bank, step)
        method.before_step(bank, step, 10)
        method.on_step_end(bank, step, {})
        left.append(sum(bank.ranks))
    assert (left[0], left[-1]) == (2 * there, 2 * R)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_start": 0}, r"r_start=0: choose a whole number from 1 up, or None"),
        ({"mask_every": 0}, r"mask_every=0: choose a whole number"),
        ({"t_initial": -0.1}, r"t_initial=-0\.1: choose a number in \[0, 1\)"),
        ({"t_final": 1.0}, r"t_final=1\.0: choose a number in \[0, 1\)"),
        ({"t_initial": 0.5}, r"t_initial=0\.5 and t_final=0\.5 leave no step.*below 1"),
        ({"beta1": 1.0}, r"beta1=1\.0: choose a number in \[0, 1\)"),
        ({"beta2": float("nan")}, r"beta2=nan: choose"),
        ({"gamma": -1.0}, r"gamma=-1\.0: choose a number from 0 up"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoRA(**options)


def test_a_start_below_the_rank_of_the_end() -> None:
    with pytest.raises(ValueError, match=r"r_start=1 is below the rank r=2 that wide.*larger"):
        injected(r_start=1)
