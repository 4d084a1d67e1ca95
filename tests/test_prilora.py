"""PRILoRA against NumPy: ranks by depth, the moving average of the inputs, and which entries go."""

import json
import re
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import training_runs as tiny
from torch import nn

import loradrop
from loradrop import LoRAConfig
from loradrop.files import read_json
from loradrop.injection import plan_of
from loradrop.methods.prilora import PRILoRA, smallest
from loradrop.plan import Plan
from loradrop.report.terminal import plan_table
from loradrop.scores import Target
from loradrop.statistics.collector import Collector
from loradrop.statistics.masks import EVERY_TOKEN

WIDTH, R = 12, 4


def targets(layers: int, r: int = 8) -> list[Target]:
    names = [f"encoder.layer.{i}.{kind}" for i in range(layers) for kind in ("query", "value")]
    return [Target(name, name[-5:], 64, 64, r) for name in [*names, "pooler.dense"]]


@pytest.mark.parametrize(
    ("options", "layers", "ranks"),
    [
        ({"r_start": 4, "r_end": 12}, 12, [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]),
        ({}, 12, [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]),  # a half and one and a half of 8
        ({"r_start": 9, "r_end": 3}, 3, [9, 6, 3]),
        ({"r_start": 5, "r_end": 7}, 1, [5]),
    ],
)
def test_ranks_grow_with_depth(options: dict[str, int], layers: int, ranks: list[int]) -> None:
    found = PRILoRA(**options).ranked(targets(layers))
    assert [target.r for target in found] == [r for r in ranks for _ in range(2)] + [8]


def test_stacks_count_on() -> None:
    """Layers are those of the model, in its order: a decoder's come after the encoder's."""
    names = [f"{stack}.block.{i}.q" for stack in ("encoder", "decoder") for i in range(2)]
    found = PRILoRA(r_start=2, r_end=8).ranked([Target(n, "q", 64, 64, 4) for n in names])
    assert [target.r for target in found] == [2, 4, 6, 8]


def test_a_number_above_the_layers_is_not_theirs() -> None:
    """nn.Sequential(embed, nn.TransformerEncoder): "1" is common to all layers."""
    names = [f"1.layers.{i}.{kind}" for i in range(3) for kind in ("linear1", "linear2")]
    found = PRILoRA().ranked([Target(n, n[-7:], 64, 64, 8) for n in [*names, "1.pooler", "out"]])
    assert [target.r for target in found] == [4, 4, 8, 8, 12, 12, 8, 8]


def test_ranks_have_the_mean_of_the_config() -> None:
    """Also where all layers are one, as in ALBERT, and at the rank 1."""
    for layers, r in ((1, 8), (1, 1), (2, 1), (12, 1), (3, 2), (3, 7)):
        ranks = [target.r for target in PRILoRA().ranked(targets(layers, r))]
        assert sum(ranks) == r * len(ranks), (layers, r, ranks)
    assert [target.r for target in PRILoRA(r_end=3).ranked(targets(1))] == [4, 4, 8]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def config(**options: float) -> LoRAConfig:
    return LoRAConfig(r=R, target_modules=["0", "2"], method=PRILoRA(**options))


def test_pruning_is_that_of_the_formula() -> None:
    """S_ij = |A_ij|·X̄_j with X̄ <- β·X̄ + (1 − β)·‖x_j‖₂, over batches whose columns differ."""
    net, beta, ratio = model(), 0.75, 0.4
    options = config(beta=beta, prune_ratio=ratio, prune_every=3)
    bank = loradrop.inject(net, options)
    collector = Collector(net, bank, online=True, statistics=["moment"], masking=EVERY_TOKEN)
    average = np.zeros(WIDTH)
    scales = torch.logspace(-2, 2, WIDTH)
    for step in range(1, 4):
        x = torch.randn(9, WIDTH) * scales.roll(step)
        net(x).square().sum().backward()
        before = bank.A[0].detach().numpy().copy()
        options.method.on_step_end(bank, step, collector.close_row())
        average = beta * average + (1 - beta) * np.sqrt((x.double().numpy() ** 2).sum(0))
        np.testing.assert_allclose(bank.input_norm(0).numpy(), average, rtol=1e-5)
        if step < 3:
            assert np.array_equal(bank.A[0].detach().numpy(), before)
    count = int(ratio * WIDTH)
    expected = before.copy()
    for row in expected:
        row[np.argsort(np.abs(row) * average)[:count]] = 0.0
    assert np.array_equal(bank.A[0].detach().numpy(), expected)
    assert ((expected == 0).sum(1) == count).all() and not np.array_equal(before, expected)
    assert bank.B[0].shape == (WIDTH, bank.targets[0].r)


def test_pruned_entries_may_grow_again() -> None:
    net = model()
    options = config(prune_every=1)
    bank = loradrop.inject(net, options)
    collector = Collector(net, bank, online=True, statistics=["moment"], masking=EVERY_TOKEN)
    with torch.no_grad():
        bank.B[0].normal_()
    optimizer = torch.optim.SGD([bank.A[0]], lr=0.1)
    for step in (1, 2):
        net(torch.randn(9, WIDTH)).square().sum().backward()
        optimizer.step()
        grown = (bank.A[0] != 0).all()
        assert grown  # before the pruning of this step
        options.method.on_step_end(bank, step, collector.close_row())
        assert (bank.A[0] == 0).sum() == bank.targets[0].r * (WIDTH // 2)


@pytest.mark.parametrize("every", [3, 40])
def test_the_last_step_prunes_too(every: int) -> None:
    """Of a run of 4 steps, whatever divides them."""
    net, options, pruned = model(), config(prune_every=every), []
    bank = loradrop.inject(net, options)
    for step in range(1, 5):
        with torch.no_grad():
            bank.A[0].fill_(1.0)
        options.method.before_step(bank, step, 4)
        moments = [torch.rand(WIDTH, dtype=torch.float64) for _ in range(2)]
        options.method.on_step_end(bank, step, {"moment": moments})
        pruned.append(bool((bank.A[0] == 0).any()))
    assert pruned == [False, False, every == 3, True] and bank.sparsity == 0.5


def test_a_run_shorter_than_the_cadence_ends_pruned(tmp_path: Path) -> None:
    options = LoRAConfig(**tiny.LORA, method=PRILoRA(prune_every=1000))
    assert tiny.run(tmp_path, options).plan.facts["zeros of A"] == 0.5


S = [[5.0, 1.0, 4.0, 2.0], [9.0, 8.0, 7.0, 6.0]], [[0.5, 3.0, 0.1]]
SCOPES = {  # the smallest half: of each row of 4 or 3, of 8 or 3 entries, of all 11
    "row": ([[0, 1, 0, 1], [0, 0, 1, 1]], [[0, 0, 1]]),
    "target": ([[1, 1, 1, 1], [0, 0, 0, 0]], [[0, 0, 1]]),
    "all": ([[0, 1, 0, 1], [0, 0, 0, 0]], [[1, 1, 1]]),
}


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_smallest(scope: str) -> None:
    found = smallest([torch.tensor(part) for part in S], 0.5, scope)
    assert [mask.int().tolist() for mask in found] == list(SCOPES[scope])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("regrow", [True, False])
def test_the_state_says_what_was_pruned(scope: str, regrow: bool) -> None:
    """Pruned at step 2 of 4 alone: afterwards entries regrow, or stay zero and are chosen again."""
    net, options = model(), config(prune_every=2, prune_scope=scope, regrow=regrow)
    bank = loradrop.inject(net, options)
    collector = Collector(net, bank, online=True, statistics=["moment"], masking=EVERY_TOKEN)
    with torch.no_grad():
        for B in bank.B:
            B.normal_(0.0, 0.1)
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.01)
    zeros, masks = [], []
    for step in range(1, 5):
        net(torch.randn(9, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        options.method.on_step_end(bank, step, collector.close_row())
        zeros.append([A == 0 for A in bank.A])
        masks.append([bank.pruned(i).clone() for i in range(2)])
    assert not any(mask.any() for mask in masks[0]) and bank.sparsity > 0
    size = sum(A.numel() for A in bank.A)
    assert sum(int(mask.sum()) for mask in masks[1]) == size // 2
    for of in (1, 3):
        assert all(torch.equal(z, m) for z, m in zip(zeros[of], masks[of], strict=True))
    grown = [int(z.sum()) for z in zeros[2]]
    assert grown == ([0, 0] if regrow else [int(mask.sum()) for mask in masks[1]])
    if not regrow:
        assert all(torch.equal(a, b) for a, b in zip(masks[1], masks[3], strict=True))


def test_the_plan_says_how_much_is_zero_and_what_rank_is_equal() -> None:
    names = ["layers.0.q", "layers.1.q"]
    net = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 24)}) for _ in (0, 1))}
    )
    bank = loradrop.inject(net, LoRAConfig(r=4, target_modules=["q"], method=PRILoRA(r_end=8)))
    assert [t.r for t in bank.targets] == [2, 8] and [t.name for t in bank.targets] == names
    with torch.no_grad():
        bank.A[0][:, :2] = 0.0
        bank.A[1][:3] = 0.0
    facts = plan_of(net).facts
    assert facts == {"zeros of A": (2 * 2 + 3 * 8) / (10 * 8), "equal rank": 5.0}
    assert bank.trainable == facts["equal rank"] * 2 * (8 + 24)
    table = plan_table(plan_of(net))
    assert re.search(r"zeros of A +0\.35$", table, re.M) and re.search(
        r"equal rank +5$", table, re.M
    )
    assert Plan.from_dict(json.loads(json.dumps(plan_of(net).to_dict()))).facts == facts


RUN = LoRAConfig(**tiny.LORA, method=PRILoRA(prune_every=3, prune_scope="target", regrow=False))


def test_resumed_to_the_same_end(tmp_path: Path) -> None:
    """Cut off between two prunings, with what is pruned in the checkpoint."""
    whole = tiny.run(tmp_path / "whole", RUN)
    tiny.interrupted(tmp_path / "part", "main", 11, config=RUN)
    tiny.run(tmp_path / "part", RUN, resume=True)
    assert tiny.outcome(tmp_path / "part") == tiny.outcome(tmp_path / "whole")
    assert whole.plan.facts == {"zeros of A": 0.5, "equal rank": 4.0}
    bank = loradrop.load(tiny.make_model(), tmp_path / "whole" / "adapter")
    assert all(torch.equal(bank.pruned(i), A == 0) for i, A in enumerate(bank.A))


def half(net: nn.Module) -> None:
    """Every adapter at half of its rank."""
    ranks = {target.name: target.r // 2 for target in net.lora_bank.targets}
    loradrop.truncate(net, ranks, metric="weight")


def one(net: nn.Module) -> None:
    """All targets of a kind and a rank on one adapter."""
    loradrop.share(net, [], init="mean")


@pytest.mark.parametrize("decide", [half, one])
@pytest.mark.parametrize("regrow", [True, False])
def test_trained_saved_and_resumed_after_a_decision(
    decide: Any, regrow: bool, tmp_path: Path
) -> None:
    method = PRILoRA(prune_every=3, r_start=4, r_end=4, regrow=regrow)
    options = LoRAConfig(**tiny.LORA, method=method)

    def decided() -> Any:
        net = tiny.make_model()
        loradrop.inject(net, options)
        with torch.no_grad():
            for A, B in zip(net.lora_bank.A, net.lora_bank.B, strict=True):
                A[:, :4] = 0.0
                B.normal_(0.0, 0.1)
        torch.manual_seed(0)
        decide(net)
        return net

    net = decided()
    for i, (A, _) in enumerate(map(net.lora_bank.factors, range(4))):
        assert torch.equal(net.lora_bank.pruned(i), A == 0) and (A == 0).any()
    first = net.lora_bank.A[0].detach().clone()
    result = tiny.run(tmp_path / "whole", options, model=net)
    bank = net.lora_bank
    assert all(bank.input_norm(i).all() for i in range(4)) and not torch.equal(bank.A[0], first)
    assert result.plan.facts["equal rank"] == 2 and bank.trainable == 4 * 64 * 2
    if not regrow:
        assert result.plan.facts["zeros of A"] == 0.5
    tiny.interrupted(tmp_path / "part", "main", 11, config=options, model=decided())
    tiny.run(tmp_path / "part", options, model=decided(), resume=True)
    assert tiny.outcome(tmp_path / "part") == tiny.outcome(tmp_path / "whole")
    loaded = loradrop.load(tiny.make_model(), tmp_path / "whole" / "adapter")
    assert all(torch.equal(loaded.pruned(i), bank.pruned(i)) for i in range(4))
    options.method.on_step_end(loaded, 3, {"moment": [None] * 4})


@pytest.mark.parametrize("scope", SCOPES)
def test_a_shared_A_is_pruned_by_the_inputs_of_all_its_targets(scope: str) -> None:  # noqa: N802
    net, options = model(), config(r_start=R, r_end=R, prune_every=1, prune_scope=scope, beta=0.0)
    bank = loradrop.inject(net, options)
    loradrop.share(net, [], share="shape")
    moments = [torch.rand(WIDTH, dtype=torch.float64) for _ in range(2)]
    before = bank.A[0].detach().clone()
    options.method.on_step_end(bank, 1, {"moment": moments})
    S = before.abs() * (moments[0] + moments[1]).sqrt().float()
    (mask,) = smallest([S], 0.5, scope)
    assert torch.equal(bank.A[0] == 0, mask) and bank.sparsity == 0.5
    assert torch.equal(bank.pruned(0), mask) and torch.equal(bank.pruned(1), mask)


@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_is_left_to_prune(scope: str) -> None:
    net, options = model(), config(prune_every=1, prune_scope=scope)
    bank = loradrop.inject(net, options)
    loradrop.truncate(net, {"0": 0, "2": 0}, metric="weight")
    options.method.on_step_end(bank, 1, {"moment": [None, None]})
    assert bank.sparsity == 0 and not bank.trainable


@pytest.mark.parametrize("padded", [True, False])
def test_exports_load_in_peft(padded: bool, tmp_path: Path) -> None:
    """Ranks that grow with depth: padded to one, and each its own in `rank_pattern`."""
    peft = pytest.importorskip("peft")
    net = models.adapt(models.bert(), r=4, target_modules=["query", "value"], method=PRILoRA())
    ranks = [t.r for t in net.lora_bank.targets]
    assert sorted(set(ranks)) == [2, 4, 6]
    with torch.no_grad():
        for A in net.lora_bank.A:
            A[:, ::2] = 0.0
    loradrop.export(net, tmp_path, padded=padded)
    written = read_json(tmp_path / "adapter_config.json")
    names = [t.name for t in net.lora_bank.targets]
    assert written.get("rank_pattern") == (None if padded else dict(zip(names, ranks, strict=True)))
    loaded = peft.PeftModel.from_pretrained(models.bert(), tmp_path)
    expected = models.outputs(net)
    torch.testing.assert_close(models.outputs(loaded), expected, rtol=1e-5, atol=1e-6)
    with loradrop.disabled(net):
        assert not torch.allclose(models.outputs(net), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_scope": "column"}, r"prune_scope='column': choose one of row, target, all"),
        ({"r_start": 0}, "r_start=0"),
        ({"r_end": 2.5}, r"r_end=2\.5"),
        ({"prune_every": 0}, "prune_every=0"),
        ({"prune_ratio": 1.0}, r"prune_ratio=1\.0.*\[0, 1\)"),
        ({"beta": -0.1}, r"beta=-0\.1.*\[0, 1\)"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRILoRA(**options)


def test_a_rank_that_grows_beyond_a_layer() -> None:
    remedy = rf"r={WIDTH + 1} for 2 .*Choose r_start and r_end <= {WIDTH}, or .*exclude_modules"
    with pytest.raises(ValueError, match=remedy):
        loradrop.inject(model(), config(r_end=WIDTH + 1))
    bank = loradrop.inject(model(), config(r_end=WIDTH))
    assert bank.targets[1].r == WIDTH


@pytest.mark.parametrize(("ratio", "n", "count"), [(0.29, 100, 29), (0.5, 5, 2), (0.57, 100, 57)])
def test_ratios_in_decimals(ratio: float, n: int, count: int) -> None:
    """Rounded down, but 0.29 · 100 is a little below 29."""
    (mask,) = smallest([torch.arange(n).float().unsqueeze(0)], ratio, "row")
    assert int(mask.sum()) == count


def test_a_rank_pattern_without_an_effect() -> None:
    ends: dict[str, Any] = {"r": R, "target_modules": ["0", "2"], "rank_pattern": {"2": 6}}
    message = r"0 the rank 4 and 2 the rank 6, and r_start=2 with r_end=5 .*or leave out r_start"
    with pytest.raises(ValueError, match=message):
        loradrop.inject(model(), LoRAConfig(**ends, method=PRILoRA(r_start=2, r_end=5)))
    bank = loradrop.inject(model(), LoRAConfig(**ends, method=PRILoRA(r_start=2)))
    assert [target.r for target in bank.targets] == [2, 9]  # one and a half of 6
    head = Target("pooler", "pooler", 64, 64, 3)
    assert PRILoRA(r_start=2, r_end=5).ranked([*targets(2), head])[-1] == head
