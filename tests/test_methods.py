"""The seam: what every method must do, LoRA-drop's options and sharing, a method from outside."""

import copy
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig, LoRADrop, LoraDropConfig, methods
from loradrop.bank import AdapterBank
from loradrop.methods import LoRA, Method
from loradrop.selection import Scores
from loradrop.sharing import AFTER, INITS

pytestmark = pytest.mark.numbers

WIDTH, R, DEPTH = 10, 3, 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.query(x)) * self.value(x)
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.classifier = (
            nn.ModuleList(Layer() for _ in range(DEPTH)),
            nn.Linear(WIDTH, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


TARGETS = ("query", "value", "up")
X = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))


def net(method: Method | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Net()
    options = {"r": R, "lora_alpha": 5, "target_modules": TARGETS} | options
    loradrop.inject(model, LoRAConfig(method=method or LoRA(), **options))
    return model


def train(model: nn.Module, steps: int = 4, rate: float = 0.02) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        loss = (model(X) - 1.0).square().mean()
        penalty = model.lora_bank.config.method.penalty(model.lora_bank)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: Any) -> list[Tensor]:
    """The factors of every target, copied."""
    bank = model.lora_bank
    return [f.detach().clone() for i in range(len(bank.targets)) for f in bank.factors(i) or ()]


def scores(model: Any, by_name: dict[str, float] | None = None) -> Scores:
    """Given ones, else rising with the layer."""
    targets = model.lora_bank.targets
    numbers = [float(i + 1) for i in range(len(targets))]
    for name, value in (by_name or {}).items():
        numbers[model.lora_bank.index(name)] = value
    rows = torch.tensor([numbers], dtype=torch.float64)
    model.lora_bank.scores = Scores(targets, rows, tokens=1, source="offline")
    return model.lora_bank.scores


# What every method must do


@dataclass(frozen=True, kw_only=True)
class Scaled(Method):
    """VeRA (Kopiczko et al., ICLR 2024) in outline: frozen matrices, two vectors per target.

    All targets of one input size have one A, all of one output size one B; d_i and b_i scale them.
    """

    name: ClassVar[str] = "scaled"
    start: float = 0.1
    decay: float = 0.0

    def build(self, bank: AdapterBank) -> None:
        generator = torch.Generator().manual_seed(0)
        like = bank.A[0]
        bank.A, bank.B = nn.ParameterList(), nn.ParameterList()
        for axis, name in ((0, "shared_A"), (1, "shared_B")):
            sizes = {(t.in_features, t.out_features)[axis]: t.r for t in bank.targets}
            shapes = {str(n): (r, n) if axis == 0 else (n, r) for n, r in sizes.items()}
            frozen = {
                key: nn.Parameter(
                    torch.randn(shape, generator=generator).to(like), requires_grad=False
                )
                for key, shape in shapes.items()
            }
            bank.add_module(name, nn.ParameterDict(frozen))
        bank.d = nn.ParameterList(torch.full((t.r,), self.start) for t in bank.targets)
        bank.b = nn.ParameterList(torch.zeros(t.out_features) for t in bank.targets)

    def factors(self, bank: AdapterBank, i: int) -> tuple[Tensor, Tensor]:
        t = bank.targets[i]
        A = bank.d[i].unsqueeze(1) * bank.shared_A[str(t.in_features)]
        return A, bank.b[i].unsqueeze(1) * bank.shared_B[str(t.out_features)]

    def penalty(self, bank: AdapterBank) -> Tensor | None:
        return self.decay * sum(d.square().sum() for d in bank.d) if self.decay else None


EVERY: dict[str, Method] = {name: cls() for name, cls in methods.available().items()}
EVERY["from outside"] = Scaled(decay=0.01)
each_method = pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)


def test_the_first_two_methods_are_there() -> None:
    assert {"lora": LoRA, "lora_drop": LoRADrop}.items() <= methods.available().items()
    for name, cls in methods.available().items():
        assert cls.name == name and methods.get(name) is cls and issubclass(cls, Method)


@each_method
def test_the_model_is_unchanged_at_injection(method: Method) -> None:
    torch.manual_seed(0)
    expected = Net()(X)
    assert torch.equal(net(method)(X), expected)


@each_method
def test_a_step_changes_only_adapters_and_the_head(method: Method) -> None:
    model = net(method)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("lora_bank.") for name in trainable)
    assert all(name.startswith(("lora_bank.", "classifier.")) for name in trainable)
    first = (model(X) - 1.0).square().mean()
    train(model)
    assert (model(X) - 1.0).square().mean() < first
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == trainable


@each_method
def test_factors_have_their_shapes_and_gradients(method: Method) -> None:
    model = net(method)
    bank = model.lora_bank
    train(model)
    for i, t in enumerate(bank.targets):
        A, B = bank.factors(i)
        assert (A.shape, B.shape) == ((t.r, t.in_features), (t.out_features, t.r))
        assert A.requires_grad or B.requires_grad
        delta = bank.delta(i)
        torch.testing.assert_close(delta, bank.scaling[i] * B.detach() @ A.detach())
        assert delta.any() and delta.isfinite().all()


@each_method
def test_merged_equals_adapted(method: Method) -> None:
    model = net(method)
    train(model)
    adapted = model(X).detach()
    with loradrop.disabled(model):
        assert not torch.allclose(model(X), adapted)
    loradrop.merge(model)
    torch.testing.assert_close(model(X), adapted, rtol=1e-4, atol=1e-5)


@each_method
def test_remove_restores(method: Method) -> None:
    torch.manual_seed(0)
    expected = Net().state_dict()
    model = net(method)
    train(model)
    loradrop.remove(model)
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


@each_method
def test_copies_and_state(method: Method) -> None:
    model = net(method)
    train(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    train(twin)
    assert not torch.equal(twin(X), model(X))
    fresh = net(method)
    fresh.load_state_dict(model.state_dict())
    fresh.lora_bank.config.method.load_state_dict(
        fresh.lora_bank, model.lora_bank.config.method.state_dict(model.lora_bank)
    )
    assert torch.equal(fresh(X), model(X))
    storages = [v.untyped_storage().data_ptr() for v in model.lora_bank.state_dict().values()]
    assert len(set(storages)) == len(storages)


@each_method
def test_any_method_can_be_probed(method: Method) -> None:
    model = net(method)
    train(model)
    found = loradrop.probe(model, [X], mask=None)
    assert len(found) == 3 * DEPTH and all(value > 0 for value in found.values())


@each_method
def test_options_survive_a_file(method: Method) -> None:
    config = LoRAConfig(r=R, method=method)
    if method.name not in methods.available():
        return
    assert LoRAConfig.from_dict(config.to_dict()) == config


OWN = 3 * 2 * R * WIDTH * 2 + 3 * R * 3 * WIDTH  # query and value, and up


@pytest.mark.parametrize(
    ("method", "expected"),
    [(LoRA(), OWN), (LoRADrop(), OWN), (Scaled(), 3 * (3 * R + 4 * WIDTH))],
    ids=["lora", "lora_drop", "from outside"],
)
def test_trainable_parameters(method: Method, expected: int) -> None:
    bank = net(method).lora_bank
    assert sum(p.numel() for p in bank.parameters() if p.requires_grad) == expected


# A method from outside


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if another package had the entry point."""

    class Entry:
        def load(self) -> type[Method]:
            return Scaled

    def entry_points(**selection: str) -> list[Entry]:
        return [Entry()] if selection == {"group": "loradrop.methods"} else []

    methods.available.cache_clear()
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    yield
    methods.available.cache_clear()


@pytest.mark.usefixtures("registered")
def test_an_entry_point_is_found() -> None:
    assert methods.get("scaled") is Scaled
    assert set(methods.available()) >= {"lora", "lora_drop", "scaled"}
    config = LoRAConfig(r=R, method=Scaled(start=0.5))
    assert LoRAConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"'strat'.*'start'"):
        LoRAConfig.from_dict({"method": {"name": "scaled", "strat": 1.0}})


def test_it_is_not_found_without_one() -> None:
    with pytest.raises(ValueError, match=r"'scaled'.*lora, lora_drop"):
        methods.get("scaled")


def test_its_shared_matrices_stay_frozen_and_single() -> None:
    model = net(Scaled())
    before = {k: v.clone() for k, v in model.lora_bank.shared_A.items()}
    train(model)
    assert all(torch.equal(v, before[k]) for k, v in model.lora_bank.shared_A.items())
    keys = [k for k in model.state_dict() if "shared" in k]
    assert len(keys) == 1 + 2


def test_its_penalty_is_differentiable() -> None:
    model = net(Scaled(decay=0.5))
    penalty = model.lora_bank.config.method.penalty(model.lora_bank)
    penalty.backward()
    assert torch.equal(model.lora_bank.d[0].grad, torch.full((R,), 0.1))


def test_a_method_that_selects_nothing_says_so() -> None:
    model = net(LoRA())
    loradrop.probe(model, [X], mask=None)
    with pytest.raises(ValueError, match=r"'lora'.*kept"):
        loradrop.share(model)


def test_the_seam_has_its_events() -> None:
    bank, method = net(LoRA()).lora_bank, LoRA()
    assert method.penalty(bank) is None and method.state_dict(bank) == {}
    assert method.on_backward_end(bank, 0) is None and method.on_step_end(bank, 0) is None
    assert method.update(bank, None) is None
    with pytest.raises(AttributeError):
        method.name = "other"


# LoRA-drop: its options

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "threshold too large": ({"threshold": 1.01}, r"threshold=1\.01.*\[0, 1\]"),
    "threshold negative": ({"threshold": -0.5}, r"threshold=-0\.5.*\[0, 1\]"),
    "threshold in percent": ({"threshold": 90}, "threshold=90"),
    "threshold NaN": ({"threshold": float("nan")}, "threshold=nan"),
    "ratio": ({"keep_ratio": 2}, "keep_ratio=2"),
    "budget": ({"budget": -1}, "budget=-1"),
    "keep": ({"keep": -1}, "keep=-1"),
    "keep in parts": ({"keep": 2.5}, r"keep=2\.5"),
    "two criteria": ({"threshold": 0.9, "keep": 3}, r"threshold.*keep"),
    "scope": ({"scope": "global"}, r"scope='global'.*per_module, joint"),
    "importance": ({"importance": "l1"}, r"importance='l1'.*sqnorm, norm"),
    "share": ({"share": "all"}, r"share='all'.*group, none"),
    "share_init": ({"share_init": "zero"}, r"share_init='zero'.*fresh, mean, top"),
    "after_select": ({"after_select": "keep"}, r"after_select='keep'.*reinit, continue"),
    "source": ({"source": "both"}, r"source='both'.*online, offline"),
    "no warm-up": ({"probe_steps": 0}, "probe_steps=0"),
    "negative warm-up": ({"probe_steps": -3}, "probe_steps=-3"),
    "warm-up of 2.5 steps": ({"probe_steps": 2.5}, r"probe_steps=2\.5"),
    "warm-up NaN": ({"probe_steps": float("nan")}, "probe_steps=nan"),
    "sample 0": ({"sample_ratio": 0.0}, r"sample_ratio=0\.0"),
    "sample too large": ({"sample_ratio": 1.5}, r"sample_ratio=1\.5"),
    "margin": ({"settle_margin": 0.5}, r"settle_margin=0\.5"),
    "interval": ({"settle_every": 0}, "settle_every=0"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRADrop(**options)
    with pytest.raises(ValueError, match=message):
        LoraDropConfig(**options)


def test_defaults() -> None:
    assert LoRADrop().threshold == 0.9 and LoRADrop().scope == "per_module"
    assert LoRADrop(keep=3).threshold is None
    flat = LoraDropConfig(r=4, threshold=0.7, target_modules=["query"])
    assert flat == LoRAConfig(r=4, target_modules=["query"], method=LoRADrop(threshold=0.7))


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'treshold'.*'threshold'"):
        LoraDropConfig(treshold=0.9)
    with pytest.raises(ValueError, match=r"'lora_alhpa'.*'lora_alpha'"):
        LoraDropConfig(lora_alhpa=16)


@pytest.mark.parametrize(
    ("probe_steps", "total", "expected"), [(0.1, 100, 10), (0.1, 3, 1), (7, 100, 7), (0.5, 9, 4)]
)
def test_warmup_steps(probe_steps: float, total: int, expected: int) -> None:
    assert LoRADrop(probe_steps=probe_steps).warmup_steps(total) == expected
    assert LoRA().warmup_steps(total) == 0


def test_a_warmup_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match=r"probe_steps=10.*10 steps"):
        LoRADrop(probe_steps=10).warmup_steps(10)


def test_settled() -> None:
    model = net(LoRADrop())
    clear = Scores(
        model.lora_bank.targets,
        torch.tensor([[float(i + 1) ** 3 for i in range(3 * DEPTH)]] * 20, dtype=torch.float64),
        tokens=1,
        source="online",
    )
    noise = torch.rand(20, 3 * DEPTH, generator=torch.Generator().manual_seed(0)).double()
    doubtful = Scores(clear.targets, noise, tokens=1, source="online")
    method = LoRADrop(keep_ratio=0.5, settle_margin=0.05)
    assert method.settled(clear) and not method.settled(doubtful)
    assert not LoRADrop(keep_ratio=0.5).settled(clear)


# LoRA-drop: sharing


def test_sharing_before_probing() -> None:
    model = net(LoRADrop())
    with pytest.raises(ValueError, match="probe"):
        loradrop.share(model)
    with pytest.raises(ValueError, match="probe"):
        loradrop.share(model, ["layers.0.up"], init="top")
    assert model.lora_bank.slots == list(range(3 * DEPTH))


def test_share_by_the_methods_own_options() -> None:
    model = net(LoRADrop(keep=3, share="none", after_select="continue"))
    train(model)
    before, found = values(model), scores(model)
    loradrop.share(model)
    kept = loradrop.select(found, keep=3)
    bank = model.lora_bank
    assert [t.name for t, s in zip(bank.targets, bank.slots, strict=True) if s is not None] == kept
    i = bank.index(kept[0])
    assert torch.equal(bank.factors(i)[0], before[2 * i])


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("after_select", AFTER)
def test_where_adapters_start(init: str, after_select: str) -> None:
    model = net(LoRADrop())
    train(model)
    before, bank = values(model), model.lora_bank
    scores(model, {"layers.1.query": 90.0})
    kept = ["layers.0.query", "layers.2.up"]
    loradrop.share(model, kept, init=init, after_select=after_select)

    def old(name: str) -> tuple[Tensor, Tensor]:
        return tuple(before[2 * bank.index(name) + part] for part in (0, 1))

    def is_fresh(pair: tuple[Tensor, Tensor]) -> bool:
        known = [old(t.name)[0] for t in bank.targets]
        bound = pair[0].shape[1] ** -0.5
        assert pair[0].any() and float(pair[0].detach().abs().max()) <= bound
        return not pair[1].any() and not any(
            torch.equal(pair[0], A) for A in known if A.shape == pair[0].shape
        )

    for name in kept:
        pair = bank.factors(bank.index(name))
        if after_select == "continue":
            assert all(torch.equal(one, two) for one, two in zip(pair, old(name), strict=True))
        else:
            assert is_fresh(pair)

    shared = bank.factors(bank.index("layers.1.query"))
    members = [old("layers.1.query"), old("layers.2.query")]
    assert shared[0] is bank.factors(bank.index("layers.2.query"))[0]
    if init == "fresh":
        assert is_fresh(shared)
    elif init == "top":
        assert all(torch.equal(one, two) for one, two in zip(shared, members[0], strict=True))
    else:
        for part in (0, 1):
            torch.testing.assert_close(shared[part], (members[0][part] + members[1][part]) / 2)
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in bank.parameters())
    assert all(p.dtype == torch.float32 for p in bank.parameters())


@pytest.mark.parametrize(
    ("kept", "share", "adapters"),
    [
        (["layers.0.query"], "group", 1 + 3),
        ([], "group", 3),
        ([], "none", 0),
        (["layers.0.query", "layers.1.up"], "none", 2),
        ([f"layers.{i}.query" for i in range(DEPTH)], "group", 3 + 2),
        ([f"layers.{i}.{kind}" for i in range(DEPTH) for kind in TARGETS], "group", 9),
    ],
    ids=["one kept", "none kept", "nothing left", "two alone", "nothing to share", "all kept"],
)
def test_adapters_after_sharing(kept: list[str], share: str, adapters: int) -> None:
    model = net(LoRADrop())
    loradrop.share(model, kept, share=share)
    bank = model.lora_bank
    assert len(bank.A) == len(bank.B) == adapters
    used = {slot for slot in bank.slots if slot is not None}
    assert used == set(range(adapters))
    train(model)
    adapted = model(X).detach()
    loradrop.merge(model)
    torch.testing.assert_close(model(X), adapted, rtol=1e-4, atol=1e-5)


def test_a_group_of_one() -> None:
    model = net(LoRADrop(), target_modules=["layers.0.down", "query"], strict=False)
    loradrop.share(model, ["layers.1.query"])
    bank = model.lora_bank
    assert len(bank.A) == 3
    alone = [slot for slot in bank.slots if bank.slots.count(slot) == 1]
    assert len(alone) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kept": ["layers.9.query"]}, r"'layers\.9\.query'.*layers\.0\.query"),
        ({"kept": [], "share": "all"}, r"share='all'.*group, none"),
        ({"kept": [], "init": "zero"}, r"init='zero'.*fresh, mean, top"),
        ({"kept": [], "after_select": "keep"}, r"after_select='keep'.*reinit, continue"),
    ],
    ids=["kept", "share", "init", "after_select"],
)
def test_sharing_refuses(options: dict[str, Any], message: str) -> None:
    model = net(LoRADrop())
    before = values(model)
    with pytest.raises(ValueError, match=message):
        loradrop.share(model, **options)
    assert all(torch.equal(one, two) for one, two in zip(values(model), before, strict=True))


def test_sharing_is_repeated_by_the_seed() -> None:
    results = []
    for _ in range(2):
        model = net(LoRADrop())
        torch.manual_seed(5)
        loradrop.share(model, ["layers.0.query"])
        results.append(values(model))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_the_whole_of_it() -> None:
    """Train, probe, select, share, train on: half the parameters, and what is left still learns."""
    model = net(LoRADrop(budget=0.5))
    train(model)
    found = loradrop.probe(model, [X], mask=None)
    loradrop.share(model)
    trainable = sum(p.numel() for p in model.lora_bank.parameters())
    assert trainable <= OWN / 2
    kept = loradrop.select(found, budget=0.5)
    assert 0 < len(kept) < 3 * DEPTH
    before = (model(X) - 1.0).square().mean()
    train(model, 20)
    assert (model(X) - 1.0).square().mean() < before
    later = loradrop.probe(model, [X], mask=None)
    assert all(value > 0 for value in later.values())
