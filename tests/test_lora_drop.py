"""LoRA-drop: its options, its sharing, and the ablations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import DEPTH, OWN, TARGETS, X, loss, net, scores, train, values
from method_cases import equal
from torch import Tensor

import loradrop
from loradrop import LoRAConfig, LoRADrop, LoraDropConfig
from loradrop.formats.peft_file import read as read_peft
from loradrop.injection import injection_of, plan_of
from loradrop.pairs import AFTER, SHARE_INITS
from loradrop.scores import Scores
from loradrop.selection import assign, reselect

pytestmark = pytest.mark.numbers


# Its options


NAN = float("nan")
OPTIONS: dict[str, tuple[list[Any], str]] = {
    "threshold": ([1.01, -0.5, 90, NAN], r"\[0, 1\]"),
    "keep_ratio": ([2], r"\[0, 1\]"),
    "budget": ([-1], r"\[0, 1\]"),
    "keep": ([-1, 2.5], "a whole number from 0 up, or None"),
    "scope": (["global"], "per_module, joint"),
    "importance": (["l1"], "sqnorm, root"),
    "share": (["all"], "group, shape, interval, none"),
    "interval": ([0, 1.5], "a whole number from 1 up"),
    "selection": (["best"], "importance, inverse, random, top, bottom"),
    "share_init": (["zero"], "fresh, mean, top"),
    "after_select": (["keep"], "reinit, continue"),
    "source": (["both"], "online, offline"),
    "probe_steps": ([0, -3, 2.5, NAN], r"a part of all steps in \(0, 1\), or a whole number"),
    "sample_ratio": ([0.0, 1.5], r"\(0, 1\]"),
    "settle_margin": ([0.5], r"\[0, 0\.5\), or None"),
    "settle_every": ([0], "a whole number from 1 up"),
}


@pytest.mark.parametrize("make", [LoRADrop, LoraDropConfig])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_out_of_range(name: str, make: Any) -> None:
    values, choices = OPTIONS[name]
    for value in values:
        with pytest.raises(ValueError, match=f"{name}={value!r}: choose .*{choices}"):
            make(**{name: value})


def test_defaults_and_unknown_options() -> None:
    assert LoRADrop().budget == 0.5 and LoRADrop().scope == "per_module"
    assert LoRADrop(threshold=0.9).budget is None
    with pytest.raises(ValueError, match="one of threshold and keep, not both"):
        LoRADrop(threshold=0.9, keep=3)
    flat = LoraDropConfig(r=4, threshold=0.7, target_modules=["query"])
    assert flat == LoRAConfig(r=4, target_modules=["query"], method=LoRADrop(threshold=0.7))
    with pytest.raises(ValueError, match=r"'treshold'.*'threshold'"):
        LoraDropConfig(treshold=0.9)
    with pytest.raises(ValueError, match=r"'lora_alhpa'.*'lora_alpha'"):
        LoraDropConfig(lora_alhpa=16)


@pytest.mark.parametrize(
    ("probe_steps", "total", "expected"),
    [(0.1, 100, 10), (0.1, 20, 3), (0.1, 4, 3), (0.1, 3, 2), (7, 100, 7), (0.5, 9, 4)],
)
def test_warmup_steps(probe_steps: float, total: int, expected: int) -> None:
    assert LoRADrop(probe_steps=probe_steps).warmup(total).steps == expected


def test_the_warmup_has_the_options_and_leaves_some_steps() -> None:
    stage = LoRADrop(sample_ratio=0.5, source="offline", settle_every=7).warmup(10)
    assert (stage.sample_ratio, stage.source, stage.settle_every) == (0.5, "offline", 0)
    assert LoRADrop(settle_margin=0.1, settle_every=7).warmup(10).settle_every == 7
    with pytest.raises(ValueError, match=r"probe_steps=10.*10 steps"):
        LoRADrop(probe_steps=10).warmup(10)


def test_settled() -> None:
    targets = net(LoRADrop()).lora_bank.targets
    cubes = torch.tensor([[float(i + 1) ** 3 for i in range(3 * DEPTH)]] * 20).double()
    noise = torch.rand(20, 3 * DEPTH, generator=torch.Generator().manual_seed(0)).double()
    clear, doubtful = (Scores(targets, rows, tokens=1, source="online") for rows in (cubes, noise))
    method = LoRADrop(keep_ratio=0.5, settle_margin=0.05)
    assert method.settled(clear) and not method.settled(doubtful)
    assert not LoRADrop(keep_ratio=0.5).settled(clear)


# Its sharing


def test_sharing_before_probing() -> None:
    model = net(LoRADrop())
    with pytest.raises(ValueError, match="probe"):
        loradrop.share(model)
    with pytest.raises(ValueError, match="probe"):
        loradrop.share(model, ["layers.0.up"], init="top")
    assert model.lora_bank.slots == tuple(range(3 * DEPTH))


def test_share_by_the_methods_own_options() -> None:
    model = train(net(LoRADrop(keep=3, share="none", after_select="continue")))
    before, kept, bank = values(model), loradrop.select(scores(model), keep=3), model.lora_bank
    loradrop.share(model)
    assert [t.name for t, s in zip(bank.targets, bank.slots, strict=True) if s is not None] == kept
    i = bank.index(kept[0])
    assert torch.equal(bank.factors(i)[0], before[2 * i])


@pytest.mark.parametrize(
    "options", [{"share": "none"}, {"init": "mean"}, {"after_select": "continue"}, {"interval": 2}]
)
def test_the_methods_own_options_and_others(options: dict[str, Any]) -> None:
    model = train(net(LoRADrop(keep=3)))
    scores(model)
    with pytest.raises(ValueError, match=r"kept=None decides .*own options"):
        loradrop.share(model, **options)
    assert model.lora_bank.slots == tuple(range(3 * DEPTH))


@pytest.mark.parametrize("kept", [["layers.2.up"], None])
def test_the_plan_has_the_scores_that_decided(kept: list[str] | None, tmp_path: Path) -> None:
    """Also where an earlier decision was recorded, as after `load`."""
    first = train(net(LoRADrop(keep=3)))
    scores(first)
    loradrop.save(first, tmp_path)
    model = net(LoRADrop(keep=3))
    loradrop.load(model, tmp_path)
    now = Scores(model.lora_bank.targets, scores(model).rows.flip(1), tokens=2, source="offline")
    injection_of(model).scores = now
    assert plan_of(model).scores != now.to_dict()
    loradrop.share(model, kept)
    plan = plan_of(model)
    assert plan.scores == now.to_dict() and plan.warmup is None and plan.kept
    assert kept is None or list(plan.kept) == kept


@pytest.mark.parametrize("init", SHARE_INITS)
@pytest.mark.parametrize("after_select", AFTER)
def test_where_adapters_start(init: str, after_select: str) -> None:
    model = train(net(LoRADrop()))
    before, bank = values(model), model.lora_bank
    scores(model)  # of the two that share, layers.2.query has the larger one
    kept = ["layers.0.query", "layers.2.up"]
    loradrop.share(model, kept, init=init, after_select=after_select)

    def old(name: str) -> tuple[Tensor, Tensor]:
        return tuple(before[2 * bank.index(name) + part] for part in (0, 1))

    def is_fresh(pair: tuple[Tensor, Tensor]) -> bool:
        A, B = pair
        assert A.any() and float(A.detach().abs().max()) <= A.shape[1] ** -0.5
        return not B.any() and not any(torch.equal(A, old(t.name)[0]) for t in bank.targets)

    for name in kept:
        pair = bank.factors(bank.index(name))
        if after_select == "continue":
            assert equal(pair, old(name))
        else:
            assert is_fresh(pair)

    shared = bank.factors(bank.index("layers.1.query"))
    members = [old("layers.1.query"), old("layers.2.query")]
    assert shared[0] is bank.factors(bank.index("layers.2.query"))[0]
    if init == "fresh":
        assert is_fresh(shared)
    elif init == "top":
        assert equal(shared, members[1])
    else:
        for part in (0, 1):
            torch.testing.assert_close(shared[part], (members[0][part] + members[1][part]) / 2)
    for p in bank.parameters():
        assert p.requires_grad and p.is_leaf and p.grad is None and p.dtype == torch.float32


KEPT: dict[str, tuple[list[str], str, int]] = {
    "one kept": (["layers.0.query"], "group", 1 + 3),
    "none kept": ([], "group", 3),
    "nothing left": ([], "none", 0),
    "two alone": (["layers.0.query", "layers.1.up"], "none", 2),
    "nothing to share": ([f"layers.{i}.query" for i in range(DEPTH)], "group", 3 + 2),
    "all kept": ([f"layers.{i}.{k}" for i in range(DEPTH) for k in TARGETS], "group", 9),
}


@pytest.mark.parametrize(("kept", "share", "adapters"), KEPT.values(), ids=KEPT)
def test_adapters_after_sharing(kept: list[str], share: str, adapters: int) -> None:
    model = net(LoRADrop())
    loradrop.share(model, kept, share=share)
    bank = model.lora_bank
    assert len(bank.A) == len(bank.B) == adapters
    assert set(bank.slots) - {None} == set(range(adapters))
    adapted = train(model)(X).detach()
    loradrop.merge(model)
    torch.testing.assert_close(model(X), adapted, rtol=1e-4, atol=1e-5)


def test_a_group_of_one() -> None:
    model = net(LoRADrop(), target_modules=["layers.0.down", "query"], strict=False)
    loradrop.share(model, ["layers.1.query"])
    slots = model.lora_bank.slots
    assert len(model.lora_bank.A) == 3 and [slots.count(s) for s in slots].count(1) == 2


WRONG = {
    "kept": (["layers.9.query"], r"'layers\.9\.query'.*layers\.0\.query"),
    "share": ("all", r"share='all'.*group, shape, interval, none"),
    "interval": (0, r"interval=0.*from 1 up"),
    "init": ("zero", r"init='zero'.*fresh, mean, top"),
    "after_select": ("keep", r"after_select='keep'.*reinit, continue"),
}


@pytest.mark.parametrize("name", WRONG)
def test_sharing_refuses(name: str) -> None:
    model, (value, message) = net(LoRADrop()), WRONG[name]
    before = values(model)
    with pytest.raises(ValueError, match=message):
        loradrop.share(model, **({"kept": []} | {name: value}))
    assert equal(values(model), before)


def test_sharing_is_repeated_by_the_seed() -> None:
    models = [net(LoRADrop()), net(LoRADrop())]
    for model in models:
        torch.manual_seed(5)
        loradrop.share(model, ["layers.0.query"])
    assert equal(*map(values, models))


ABLATIONS: dict[str, dict[str, Any]] = {
    **{name: {"selection": name} for name in ("inverse", "random", "top", "bottom")},
    **{name: {"share": name, "interval": 2} for name in ("shape", "interval", "none")},
}


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
def test_ablations(options: dict[str, Any], tmp_path: Path) -> None:
    """As many targets of each type are kept, they train, and the export is the adapted model."""
    model = train(net(LoRADrop(budget=0.7, after_select="continue", **options)))
    scores(model)
    loradrop.share(model)
    bank = model.lora_bank
    kept = bank.assignment.kept
    if "selection" in options:
        usual = loradrop.select(scores(model), budget=0.7)
        assert list(kept) == reselect(scores(model), usual, options["selection"])
        assert len(kept) == len(usual) == 3
    if "share" in options:
        expected = assign(bank.targets, kept, **options)
        assert bank.slots == expected.slots and bank.trainable == expected.parameters
        assert bank.trainable <= 0.7 * OWN
    before = loss(model)
    assert loss(train(model, 8)) < before
    loradrop.export(model, tmp_path)
    for i, target in enumerate(bank.targets):
        if bank.slots[i] is not None:
            A, B = read_peft(tmp_path).modules[target.name]
            torch.testing.assert_close(B @ A, bank.delta(i))


def test_the_whole_of_it() -> None:
    """Train, probe, select, share, train on: half the parameters, and what is left still learns."""
    model = train(net(LoRADrop(budget=0.5)))
    found = loradrop.probe(model, [X], mask=None)
    loradrop.share(model)
    assert sum(p.numel() for p in model.lora_bank.parameters()) <= OWN / 2
    kept = loradrop.select(found, budget=0.5)
    assert 0 < len(kept) < 3 * DEPTH
    before = loss(model)
    assert loss(train(model, 20)) < before
    assert all(value > 0 for value in loradrop.probe(model, [X], mask=None).values())
