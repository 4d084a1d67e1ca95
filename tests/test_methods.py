"""The seam: what every method must do, and a method from outside."""

import copy
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from every_method import (
    DEPTH,
    EVERY,
    OWN,
    TARGETS,
    WIDTH,
    Core,
    Layer,
    Net,
    R,
    X,
    by_sgd,
    loss,
    net,
    optimizer_of,
    rolled,
    scores,
    train,
    values,
)
from method_cases import equal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchrun import script_in_ranks

import loradrop
from loradrop import LoRAConfig, LoRADrop, layers, methods, native
from loradrop.extra_state import STATE
from loradrop.formats.peft_file import read as read_peft
from loradrop.injection import plan_of
from loradrop.loading import fill
from loradrop.methods import LoRA, Method, Spectral
from loradrop.methods.adalora import AdaLoRA
from loradrop.methods.lora_fa import LoRAFA
from loradrop.methods.lorta import LoRTA
from loradrop.methods.mos import MoS
from loradrop.methods.nb_lora import NBLoRA
from loradrop.methods.prilora import PRILoRA
from loradrop.methods.rasa import RaSA
from loradrop.methods.share_lora import ShareLoRA
from loradrop.methods.tied_lora import TiedLoRA
from loradrop.methods.vera import VeRA

pytestmark = pytest.mark.numbers

each_method = pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)


# What every method must do


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
    assert list(found) == list(expected) and equal([*found.values()], [*expected.values()])


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
    assert list(before) == list(after) and equal([*before.values()], [*after.values()])
    assert plan_of(found) == plan_of(model)
    assert not torch.equal(train(found)(X), model(X))  # and it trains on


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (TiedLoRA(trained="uv"), TiedLoRA(trained="ABuv")),
        (PRILoRA(regrow=False), PRILoRA(regrow=True)),
        (AdaLoRA(gamma=0.0), AdaLoRA(gamma=0.5)),
    ],
    ids=lambda method: method.name,
)
def test_loaded_into_other_options_the_plan_says_those_that_act(
    here: Method, there: Method, tmp_path: Path
) -> None:
    loradrop.save(train(net(there)), tmp_path / "there")
    model = net(here)
    loradrop.load(model, tmp_path / "there")
    loradrop.save(model, tmp_path / "here")
    assert native.read(tmp_path / "here").plan.config.method == here


def test_what_was_decided_keeps_the_options_that_decided_it(tmp_path: Path) -> None:
    there, model = net(LoRADrop(budget=0.5)), net(LoRADrop(budget=0.25))
    scores(there)
    loradrop.share(there)
    loradrop.save(there, tmp_path)
    loradrop.load(model, tmp_path)
    assert plan_of(model).kept and plan_of(model).config.method == LoRADrop(budget=0.5)


def test_a_file_of_another_bound_is_refused(tmp_path: Path) -> None:
    loradrop.save(train(net(NBLoRA(s=0.5))), tmp_path)
    model = net(NBLoRA(s=2.0))
    with pytest.raises(ValueError, match=r"another s \(0\.5, not 2\.0\)"):
        loradrop.load(model, tmp_path)
    assert (model.lora_bank.s == 2.0).all()


@each_method
def test_tensors_of_another_bank_change_nothing(method: Method) -> None:
    model, other = net(method), train(net(method, seed=1)).lora_bank
    before, bank = model(X), model.lora_bank
    tensors = {k: v for k, v in other.state_dict().items() if k != STATE}
    with pytest.raises(ValueError, match=r"which is as it was.*\n  more: not in the model"):
        bank.restore(other.assignment, tensors | {"more": X})
    assert torch.equal(model(X), before)
    bank.restore(other.assignment, tensors)
    assert not torch.equal(model(X), before)


def test_a_tensor_of_another_shape_changes_nothing() -> None:
    """Where the bank holds it in a way that it cannot change."""
    model = net(Core())
    bank, before = model.lora_bank, values(model)
    tensors = {k: v for k, v in bank.state_dict().items() if k != STATE}
    key = next(k for k in tensors if k.startswith("left."))
    wrong = {k: v + 1.0 if v.is_floating_point() else v for k, v in tensors.items()}
    with pytest.raises(ValueError, match=rf"{key}: \(1, 1\) in the file, \(\d+, 3\) in the model"):
        bank.restore(bank.assignment, wrong | {key: torch.ones(1, 1)})
    assert equal(values(model), before)


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
def test_a_rank_that_a_target_cannot_have(method: Method) -> None:
    """Also of the methods whose first stage is as wide as a target lets it be."""
    if not method.rank_limited:
        assert net(method, r=WIDTH + 1).lora_bank.targets[0].r == WIDTH + 1
        return
    with pytest.raises(ValueError, match=rf"beyond {WIDTH} (adds|ranks add) nothing"):
        net(method, r=WIDTH + 1)


@pytest.mark.parametrize("method", [VeRA(), LoRTA()])
def test_a_rank_beyond_both_sides(method: Method, tmp_path: Path) -> None:
    """Trained, saved, exported to PEFT and loaded from both, and merged: always the same model.

    It is beyond the 256 that the fused kernels hold, too.
    """
    r = 300
    model = train(net(method, r=r))
    adapted, bank = model(X).detach(), model.lora_bank
    assert {len(bank.factors(i)[0]) for i in range(9)} == {r}
    assert all(bank.delta(i).any() for i in range(9))
    loradrop.save(model, tmp_path / "own")
    loradrop.export(model, tmp_path / "peft")
    for folder in ("own", "peft"):
        torch.manual_seed(0)
        again = Net()
        loradrop.load(again, tmp_path / folder)
        torch.testing.assert_close(again(X), adapted, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    wrapped = pytest.importorskip("peft").PeftModel.from_pretrained(Net(), tmp_path / "peft")
    torch.testing.assert_close(wrapped(X), adapted, rtol=1e-4, atol=1e-5)
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


@pytest.mark.parametrize("name", methods.available())
def test_the_default_dtype_of_torch_is_not_that_of_a_bank(name: str) -> None:
    found, method = [], EVERY[name]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        model = Net()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            config = LoRAConfig(r=R, lora_alpha=5, target_modules=TARGETS, method=method)
            found.append(loradrop.inject(model, config).state_dict())
        finally:
            torch.set_default_dtype(before)
    for other in found[1:]:
        for key, tensor in other.items():
            assert tensor.dtype == found[0][key].dtype and tensor.equal(found[0][key]), key


COMMON = [VeRA(), TiedLoRA(), RaSA(), MoS(), LoRTA(), ShareLoRA(), ShareLoRA(share="B")]


@pytest.mark.parametrize("method", COMMON, ids=lambda method: method.name)
def test_a_model_on_two_devices(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer has both of its factors on the device of its input; what is common to layers on
    several devices lies on one of them.
    """
    for name in ("uniform_", "normal_"):  # fake tensors draw nothing on a GPU that is not there
        monkeypatch.setattr(Tensor, name, lambda tensor, *args, **options: tensor)
    devices, found = ["cpu", "cuda:0", "cpu"], []
    monkeypatch.setattr(layers, "adapted_output", lambda x, *args: found.append((x, *args[3:5])))
    with FakeTensorMode(), torch.no_grad():
        model = Net()
        for i, device in enumerate(devices):
            with torch.device(device):
                model.layers[i] = Layer()
        config = LoRAConfig(r=R, lora_alpha=5, target_modules=TARGETS, method=method)
        named = [(n, m) for n, m in model.named_modules() if n.endswith(TARGETS)]
        bank = layers.build_bank(config, named, model)
        for i, (_, module) in enumerate(named):
            layers.adapt(module, bank, i)
            module._adapted(torch.empty(2, WIDTH, device=module.weight.device), None, None)
    assert [str(x.device) for x, _, _ in found] == [d for d in devices for _ in TARGETS]
    for x, A, B in found:
        assert x.device == A.device == B.device


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
    done = script_in_ranks("distributed_methods.py", tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert list(one) == list(two) == list(EVERY)
    for name, method in EVERY.items():
        model = net(method)
        alone = by_sgd(model, X)
        if isinstance(method, AdaLoRA):
            assert sum(model.lora_bank.ranks) < model.lora_bank.full
        assert equal(one[name], two[name]), name
        moved = [a - b for a, b in zip(alone, values(net(method)), strict=True)]
        assert any(m.abs().max() > 1e-3 for m in moved), name
        torch.testing.assert_close(one[name], alone, rtol=1e-4, atol=1e-5, msg=name)


# Ranks 2, 3, 4 for r = 3: query and value, and up.
GROWING = sum(r * (2 * 2 * WIDTH + 3 * WIDTH) for r in (2, 3, 4))
PARAMETERS = {
    **{"lora": OWN, "lora_drop": OWN, "rm_lora": OWN, "spectral": 2 * OWN},
    **{"vera": 3 * (3 * R + 4 * WIDTH), "prilora": GROWING},
    **{"lora_fa": 3 * R * 4 * WIDTH, "share_lora": R * 3 * WIDTH + 3 * R * 4 * WIDTH},
    "tied_lora": R * 7 * WIDTH + 3 * (3 * R + 4 * WIDTH),
    "rasa": OWN + 9 * (R - 1 + 3),
    "adalora": (OWN // R + 9) * 5,  # one and a half of r = 3, and λ
    "from outside": 9 * R * R + R * (WIDTH + WIDTH + 2 * WIDTH),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_trainable_parameters(name: str) -> None:
    model = net(EVERY[name])
    trainable = [p for n, p in model.named_parameters() if p.requires_grad and "bank" in n]
    assert sum(p.numel() for p in trainable) == plan_of(model).parameters == PARAMETERS[name]


DEFAULTS = {
    # Of the papers, or of their authors' code.
    "adalora": {"beta1": 0.85, "beta2": 0.85, "gamma": 0.1},
    "vera": {"d_initial": 0.1, "seed": 0},
    "tied_lora": {"trained": "ABuv", "u_initial": 1.0},
    "share_lora": {"share": "A"},
    # Ours, or what we read of a paper: a change of one is a change of results.
    "prilora": {"prune_every": 40, "prune_ratio": 0.5, "beta": 0.9, "regrow": True},
    "rm_lora": {"penalty": 1e-3, "rise": 0.1, "mask_ratio": 0.5},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_constants_of_a_method(name: str) -> None:
    method = methods.get(name)()
    assert {option: getattr(method, option) for option in DEFAULTS[name]} == DEFAULTS[name]


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


def test_a_subclass_needs_a_name_of_its_own() -> None:
    """Its files would be read as its parent's."""
    model = Net()
    kind = type("Mine", (VeRA,), {})
    with pytest.raises(ValueError, match=r"Mine\.name is 'vera', which loradrop\.methods\.vera"):
        loradrop.inject(model, LoRAConfig(r=R, target_modules=["query"], method=kind()))
    assert "lora_bank" not in dict(model.named_modules())
