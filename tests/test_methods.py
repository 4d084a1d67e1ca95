"""The seam: what every method must do, LoRA-drop's options and sharing, a method from outside."""

import copy
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from test_distributed import torchrun
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig, LoRADrop, LoraDropConfig, methods, native
from loradrop.bank import AdapterBank
from loradrop.collector import Collector
from loradrop.formats.peft_file import read as read_peft
from loradrop.injection import injection_of, plan_of
from loradrop.loading import fill
from loradrop.methods import LoRA, Method, Spectral
from loradrop.methods.adalora import AdaLoRA
from loradrop.methods.lora_fa import LoRAFA
from loradrop.methods.prilora import PRILoRA
from loradrop.methods.rasa import RaSA
from loradrop.methods.share_lora import ShareLoRA
from loradrop.methods.tied_lora import TiedLoRA
from loradrop.methods.vera import VeRA
from loradrop.pairs import AFTER, INITS
from loradrop.scores import Scores, Target
from loradrop.selection import assign, reselect

pytestmark = pytest.mark.numbers

WIDTH, R, DEPTH = 10, 3, 3
TOTAL = 20  # steps, as a method is told them


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
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.classifier = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


TARGETS = ("query", "value", "up")
X = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))


def net(method: Method | None = None, seed: int | None = None, **options: Any) -> Any:
    """The same model every time; `seed` draws other adapters."""
    torch.manual_seed(0)
    model = Net()
    if seed is not None:
        torch.manual_seed(seed)
    options = {"r": R, "lora_alpha": 5, "target_modules": TARGETS} | options
    loradrop.inject(model, LoRAConfig(method=method or LoRA(), **options))
    return model


def optimizer_of(model: Any) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)


def rolled(step: int) -> Tensor:
    """Inputs whose columns have another size in every step."""
    return X * torch.logspace(-1, 1, WIDTH).roll(step)


def train(
    model: Any, steps: int = 4, done: int = 0, optimizer: Any = None, rows: Any = lambda step: X
) -> Any:
    """A loop of one's own with the method's events, up to step `steps` after `done` of them."""
    bank, method = model.lora_bank, injection_of(model).config.method
    optimizer = optimizer or optimizer_of(model)
    names = method.statistics or ("sqnorm",)
    collector = Collector(model, bank, online=True, statistics=names, mask=None)
    for step in range(done + 1, steps + 1):
        (model(rows(step).to(model.classifier.weight)) - 1.0).square().mean().backward()
        method.before_step(bank, step, TOTAL)
        optimizer.step()
        method.on_step_end(bank, step, collector.close_row())
        optimizer.zero_grad()
    collector.detach()
    return model


def by_sgd(model: Any, rows: Tensor, wrap: Any = lambda model: model, steps: int = 3) -> Any:
    """The factors after some steps of plain SGD, which no rounding of a gradient can turn round.

    wrap   makes the module that is called of the model
    """
    bank, method, called = model.lora_bank, injection_of(model).config.method, wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    names = method.statistics or ("sqnorm",)
    collector = Collector(model, bank, online=True, statistics=names, mask=None)
    for step in range(1, steps + 1):
        (called(rows) - 1.0).square().mean().backward()
        method.before_step(bank, step, TOTAL)
        optimizer.step()
        method.on_step_end(bank, step, collector.close_row())
        optimizer.zero_grad()
    collector.detach()
    return values(model)


def loss(model: Any) -> float:
    x = X.to(model.classifier.weight)
    return float((model(x) - 1.0).square().mean().detach())


def same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def values(model: Any) -> list[Tensor]:
    """The factors of every target, copied."""
    bank = model.lora_bank
    return [f.detach().clone() for i in range(len(bank.targets)) for f in bank.factors(i) or ()]


def scores(model: Any) -> Scores:
    """Rising with the layer."""
    targets = model.lora_bank.targets
    rows = torch.arange(1, len(targets) + 1, dtype=torch.float64)[None]
    found = injection_of(model).scores = Scores(targets, rows, tokens=1, source="offline")
    return found


# What every method must do


@dataclass(frozen=True, kw_only=True)
class Core(Method):
    """A method of another package: one trained pair for all targets of a shape, and a trained
    r x r core for each target between the two.
    """

    name: ClassVar[str] = "core"
    start: float = 0.1

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        return CoreBank(targets, scaling, self.start)


class CoreBank(AdapterBank):
    def __init__(self, targets: Sequence[Target], scaling: Sequence[float], start: float) -> None:
        super().__init__(targets, scaling)
        self.left, self.right = nn.ParameterDict(), nn.ParameterDict()
        for _, K, N, r in dict.fromkeys(t.group for t in targets):
            self.right[f"{r} {K}"] = torch.full((r, K), start)
            self.left[f"{N} {r}"] = torch.full((N, r), start)
        self.core = nn.ParameterList(torch.zeros(t.r, t.r) for t in targets)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def factors(self, i: int) -> tuple[Tensor, Tensor]:
        _, _, K, N, r = self.targets[i]
        return self.core[i] @ self.right[f"{r} {K}"], self.left[f"{N} {r}"]


EVERY: dict[str, Method] = {name: cls() for name, cls in methods.available().items()}
EVERY["prilora"] = PRILoRA(prune_every=2)
EVERY["adalora"] = AdaLoRA(r_start=R, mask_every=2)  # every target is left an adapter
EVERY["from outside"] = Core()
each_method = pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)


def test_the_methods_are_there() -> None:
    found = {"lora": LoRA, "lora_drop": LoRADrop, "prilora": PRILoRA, "vera": VeRA}
    found |= {"spectral": Spectral, "lora_fa": LoRAFA, "rasa": RaSA}
    found |= {"share_lora": ShareLoRA, "tied_lora": TiedLoRA}
    assert found.items() <= methods.available().items()
    for name, cls in methods.available().items():
        assert cls.name == name and methods.get(name) is cls and issubclass(cls, Method)


@each_method
def test_a_step_changes_only_adapters_and_the_head(method: Method) -> None:
    model = net(method)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    statistics = {f"lora_bank.{name}" for name, _ in model.lora_bank.named_buffers()}
    assert any(name.startswith("lora_bank.") for name in trainable)
    assert all(name.startswith(("lora_bank.", "classifier.")) for name in trainable)
    first = loss(model)
    assert loss(train(model)) < first
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert trainable <= changed <= trainable | statistics


@each_method
def test_factors_have_their_shapes_and_gradients(method: Method) -> None:
    bank = train(net(method)).lora_bank
    for i, t in enumerate(bank.targets):
        A, B = bank.factors(i)
        assert (A.shape, B.shape) == ((t.r, t.in_features), (t.out_features, t.r))
        assert A.requires_grad or B.requires_grad
        delta = bank.delta(i)
        torch.testing.assert_close(delta, bank.scaling[i] * B.detach() @ A.detach())
        assert delta.any() and delta.isfinite().all()


@each_method
def test_probed_exported_and_merged(method: Method, tmp_path: Path) -> None:
    model = train(net(method))
    found = loradrop.probe(model, [X], mask=None)
    assert len(found) == 3 * DEPTH and all(value > 0 for value in found.values())
    loradrop.export(model, tmp_path)
    modules = read_peft(tmp_path).modules
    assert len(modules) == 3 * DEPTH
    for i, target in enumerate(model.lora_bank.targets):
        A, B = modules[target.name]
        torch.testing.assert_close(B @ A, model.lora_bank.delta(i))
    adapted = model(X).detach()
    with loradrop.disabled(model):
        assert not torch.allclose(model(X), adapted)
    loradrop.merge(model)
    torch.testing.assert_close(model(X), adapted, rtol=1e-4, atol=1e-5)


@each_method
def test_injecting_changes_no_output_and_removing_restores(method: Method) -> None:
    torch.manual_seed(0)
    plain, model = Net(), net(method)
    assert torch.equal(model(X), plain(X))
    loradrop.remove(train(model))
    found, expected = model.state_dict(), plain.state_dict()
    assert list(found) == list(expected) and same([*found.values()], [*expected.values()])


@each_method
def test_copies_state_and_seed(method: Method) -> None:
    model = train(net(method))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    assert not torch.equal(train(twin)(X), model(X))
    assert torch.equal(train(net(method))(X), model(X))  # the same seed, the same adapters
    fresh = net(method)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))
    storages = [v.untyped_storage().data_ptr() for v in model.lora_bank.state_dict().values()]
    assert len(set(storages)) == len(storages)


@each_method
@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.usefixtures("registered")
def test_saved_and_loaded(method: Method, injected: bool, tmp_path: Path) -> None:
    model = train(net(method))
    loradrop.save(model, tmp_path)
    torch.manual_seed(0)
    found = net(method) if injected else Net()
    bank = loradrop.load(found, tmp_path)
    assert torch.equal(found(X), model(X)) and bank.targets == model.lora_bank.targets
    before, after = model.lora_bank.state_dict(), bank.state_dict()
    assert list(before) == list(after) and same([*before.values()], [*after.values()])
    assert plan_of(found) == plan_of(model)
    assert not torch.equal(train(found)(X), model(X))  # and it trains on


@each_method
@pytest.mark.usefixtures("registered")
def test_killed_and_resumed(method: Method, tmp_path: Path) -> None:
    """What a checkpoint holds is all there is: adapters, optimiser, the state of random numbers."""
    whole = train(net(method), 6, rows=rolled)
    begun = net(method)
    optimizer = optimizer_of(begun)
    train(begun, 3, optimizer=optimizer, rows=rolled)
    loradrop.save(begun, tmp_path)
    kept = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    model = net(method, seed=99)
    optimizer = optimizer_of(model)
    fill(model, native.read(tmp_path))
    optimizer.load_state_dict(kept[0])
    torch.set_rng_state(kept[1])
    train(model, 6, done=3, optimizer=optimizer, rows=rolled)
    found, expected = model.state_dict(), whole.state_dict()
    assert list(found) == list(expected)
    differ = [key for key, value in found.items() if not torch.equal(value, expected[key])]
    assert not differ


@each_method
def test_shapes_and_ranks_that_differ(method: Method) -> None:
    """The defaults take any model; a pattern may give one target of a kind another rank."""
    ranks = {"layers.1.query": 2, "down": 4, "classifier": 1}
    method = AdaLoRA() if isinstance(method, AdaLoRA) else method  # no mask in so few steps
    every = [*TARGETS, "down", "classifier"]
    model = net(method, target_modules=every, modules_to_save=[], rank_pattern=ranks)
    plain = Net()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    assert torch.equal(model(X), plain(X))
    adapted = train(model)(X).detach()
    bank = model.lora_bank
    assert len(bank.targets) == 4 * DEPTH + 1
    assert all(bank.delta(i).any() for i in range(len(bank.targets)))
    loradrop.merge(model)
    torch.testing.assert_close(model(X), adapted, rtol=1e-4, atol=1e-5)


@each_method
def test_in_the_dtype_of_the_base(method: Method) -> None:
    torch.manual_seed(0)
    model = Net().bfloat16()
    config = LoRAConfig(
        r=R, lora_alpha=5, target_modules=TARGETS, method=method, adapter_dtype="base"
    )
    bank = loradrop.inject(model, config)
    if not isinstance(method, Core):  # it makes its parameters of one type
        assert {p.dtype for p in bank.parameters()} == {torch.bfloat16}
    first = loss(model)
    assert loss(train(model, 8)) < first
    assert all(p.isfinite().all() for p in bank.parameters())


WITHOUT_S = {"nb_lora", "vera"}  # methods whose deltas lora_alpha does not scale


@pytest.mark.parametrize("name", EVERY)
def test_rank_stabilised_scaling(name: str) -> None:
    """s is α/√r in place of α/r: all deltas are √r times those of the same factors."""
    found = []
    for rslora in (False, True):
        bank = net(EVERY[name], use_rslora=rslora).lora_bank
        generator = torch.Generator().manual_seed(3)
        for p in bank.parameters():  # what is zero at the start; the rest may hold s
            noise = torch.randn(p.shape, generator=generator)
            p.data.copy_(torch.where(p == 0, noise, p))
        found.append([bank.delta(i) for i in range(len(bank.targets))])
    factor = 1.0 if name in WITHOUT_S else R**0.5
    for plain, stabilised in zip(*found, strict=True):
        assert plain.any()
        torch.testing.assert_close(stabilised, factor * plain, rtol=1e-4, atol=1e-5)


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Each rank has half of the rows; all methods in one start of two processes."""
    done = torchrun(Path(__file__).with_name("distributed_methods.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert list(one) == list(two) == list(EVERY)
    for name, method in EVERY.items():
        alone = by_sgd(net(method), X)
        assert same(one[name], two[name]), name
        moved = [a - b for a, b in zip(alone, values(net(method)), strict=True)]
        assert any(m.abs().max() > 1e-3 for m in moved), name
        torch.testing.assert_close(one[name], alone, rtol=1e-4, atol=1e-5, msg=name)


OWN = 3 * 2 * R * WIDTH * 2 + 3 * R * 3 * WIDTH  # query and value, and up
# Ranks 2, 3, 4 for r = 3: query and value, and up.
GROWING = sum(r * (2 * 2 * WIDTH + 3 * WIDTH) for r in (2, 3, 4))


PARAMETERS = {
    **{"lora": OWN, "lora_drop": OWN, "rm_lora": OWN, "spectral": 2 * OWN},
    **{"vera": 3 * (3 * R + 4 * WIDTH), "prilora": GROWING},
    **{"lora_fa": 3 * R * 4 * WIDTH, "share_lora": R * 3 * WIDTH + 3 * R * 4 * WIDTH},
    "tied_lora": R * 7 * WIDTH + 3 * (3 * R + 4 * WIDTH),
    "rasa": OWN + 9 * (R - 1 + 3),
    "adalora": OWN + 9 * R,  # and λ
    "from outside": 9 * R * R + R * (WIDTH + WIDTH + 2 * WIDTH),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_trainable_parameters(name: str) -> None:
    model = net(EVERY[name])
    trainable = [p for n, p in model.named_parameters() if p.requires_grad and "bank" in n]
    assert sum(p.numel() for p in trainable) == plan_of(model).parameters == PARAMETERS[name]


# A method from outside


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if another package had the entry point."""
    entry, real = SimpleNamespace(load=lambda: Core), importlib.metadata.entry_points
    methods.available.cache_clear()
    monkeypatch.setattr(
        *(importlib.metadata, "entry_points"),
        lambda **selection: (
            [entry] if selection == {"group": "loradrop.methods"} else real(**selection)
        ),
    )
    yield
    methods.available.cache_clear()


@pytest.mark.usefixtures("registered")
def test_an_entry_point_is_found() -> None:
    assert methods.get("core") is Core
    assert set(methods.available()) >= {"lora", "lora_drop", "core"}
    with pytest.raises(ValueError, match=r"'strat'.*'start'"):
        LoRAConfig.from_dict({"method": {"name": "core", "strat": 1.0}})


def test_one_that_is_imported_is_found_without_one() -> None:
    """As a file's is, in a process that imported it; it is not among those that are listed."""
    assert methods.get("core") is Core and "core" not in methods.available()
    with pytest.raises(ValueError, match=r"'cores' is unknown.*lora, lora_drop.*is imported"):
        methods.get("cores")


@pytest.mark.parametrize("method", [VeRA(), Core()], ids=["vera", "from outside"])
def test_a_bank_without_pairs_cannot_share_them(method: Method) -> None:
    model = net(method)
    with pytest.raises(ValueError, match=rf"'{method.name}' has no pair.*lora_drop"):
        loradrop.share(model, ["layers.0.query"])


def test_a_plain_method_has_one_stage_and_selects_nothing() -> None:
    model = net(LoRA())
    assert LoRA().warmup(100) is None and LoRA().decide(scores(model)) is None
    loradrop.probe(model, [X], mask=None)
    with pytest.raises(ValueError, match=r"'lora'.*kept"):
        loradrop.share(model)
    with pytest.raises(AttributeError):
        LoRA().name = "other"


# LoRA-drop: its options

NAN = float("nan")
OPTIONS: dict[str, tuple[list[Any], str]] = {
    "threshold": ([1.01, -0.5, 90, NAN], r"\[0, 1\]"),
    "keep_ratio": ([2], r"\[0, 1\]"),
    "budget": ([-1], r"\[0, 1\]"),
    "keep": ([-1, 2.5], "a whole number of at least 0"),
    "scope": (["global"], "per_module, joint"),
    "importance": (["l1"], "sqnorm, root"),
    "share": (["all"], "group, shape, interval, none"),
    "interval": ([0, 1.5], "a whole number of layers from 1 up"),
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


# LoRA-drop: sharing


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


@pytest.mark.parametrize("init", INITS)
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
            assert same(pair, old(name))
        else:
            assert is_fresh(pair)

    shared = bank.factors(bank.index("layers.1.query"))
    members = [old("layers.1.query"), old("layers.2.query")]
    assert shared[0] is bank.factors(bank.index("layers.2.query"))[0]
    if init == "fresh":
        assert is_fresh(shared)
    elif init == "top":
        assert same(shared, members[1])
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
    assert same(values(model), before)


def test_sharing_is_repeated_by_the_seed() -> None:
    models = [net(LoRADrop()), net(LoRADrop())]
    for model in models:
        torch.manual_seed(5)
        loradrop.share(model, ["layers.0.query"])
    assert same(*map(values, models))


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


def test_a_subclass_needs_a_name_of_its_own() -> None:
    """Its files would be read as its parent's."""
    model = Net()
    kind = type("Mine", (VeRA,), {})
    with pytest.raises(ValueError, match=r"Mine\.name is 'vera', which loradrop\.methods\.vera"):
        loradrop.inject(model, LoRAConfig(r=R, target_modules=["query"], method=kind()))
    assert "lora_bank" not in dict(model.named_modules())
