"""What injection refuses, leaves out or warns of, with the words that it says."""

import logging
import re
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from models import LM, Make, Options, assert_same, bert, build, gpt2, snapshot, wake
from surgery_models import IDS, WIDTH, Net, R, Tied, config, injected, names, output
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import loradrop
import loradrop.integrations.peft as integrations
from loradrop import LoRAConfig

pytestmark = pytest.mark.numbers


def refused(message: str, model: nn.Module, *targets: str, **options: Any) -> None:
    """By a ValueError with the words of `message` in this order; the model is as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError) as raised:
        loradrop.inject(model, config(*targets, **options))
    assert re.search(message, str(raised.value), re.DOTALL)
    assert_same(model, before)


def part() -> nn.Module:
    """Its second layer has no query."""
    model = Net()
    model.layers[1].other = model.layers[1].query
    del model.layers[1].query
    return model


class Outer(nn.Module):
    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.a, self.b = model, nn.Linear(4, 4), nn.Linear(4, 4)


def already_patched() -> Any:
    model = Net()
    model.layers[1].mix.forward = torch.tanh
    return model


LOOSE = {"strict": False}
REFUSED: list[tuple[Make, list[str], Options, str]] = [
    (Net, ["query", "no_such"], {}, r"'no_such'.*query: 3.*no_such: 0.*value \(3\).*mix \(3\)"),
    (lambda: nn.Sequential(nn.Linear(8, 8)), ["0", "4"], {}, "'4'.*matches nothing"),
    (Net, ["mix"], {"rank_pattern": {"mix": 9}}, r"r=9.*layers\.0\.mix.*r <= 8"),
    (Net, ["norm"], LOOSE, "norm.*LayerNorm.*linear"),
    (Net, ["embed"], LOOSE, "embed.*Embedding.*linear"),
    (gpt2, ["lm_head"], {}, r"lm_head.*tied.*transformer\.wte"),
    (Outer, [], {"target_modules": None}, r"target_modules.*a \(1\), b \(1\)"),
    (Net, ["mix"], {"exclude_modules": ["mix2"]}, "exclude_modules has 'mix2'.*no module"),
    (Net, ["mix"], {"exclude_modules": ".*mix2"}, "exclude_modules has '.*mix2'.*no module"),
    (Net, ["mix"], {"rank_pattern": {"value": 2}}, r"rank_pattern has 'value'.*mix \(3\).*strict"),
    (Net, ["mix"], {"alpha_pattern": {"layers.7.mix": 2}}, "alpha_pattern has 'layers.7.mix'"),
    (already_patched, ["mix"], {}, r"layers\.1\.mix.*forward of its own"),
    (injected, ["mix"], {}, "remove"),
    (lambda: Outer(injected()), ["a"], {}, "remove"),
    (Net, [], {"modules_to_save": ["no_head"]}, "'no_head'.*classifier"),
]


@pytest.mark.parametrize(("make", "targets", "options", "words"), REFUSED)
def test_refusals(make: Make, targets: list[str], options: Options, words: str) -> None:
    refused(words, make(), *targets, **options)


def test_a_string_is_a_pattern_for_whole_names() -> None:
    for text, given in (("query", r'\["query"\]'), ("query, value", r'\["query", "value"\]')):
        refused(rf'"{text}" is a string.*give a list, {given}', Net(), target_modules=text)
    refused(r"'quern' matches nothing", Net(), target_modules="quern")
    assert len(loradrop.inject(Net(), config(target_modules=r".*\.query")).targets) == 3


def test_one_batch_in_the_place_of_several(tmp_path: Path) -> None:
    model = injected()
    loradrop.export(model, tmp_path)
    for use in (
        lambda: loradrop.probe(model, {"ids": IDS}),
        lambda: loradrop.verify(model, tmp_path, {"ids": IDS}),
    ):
        with pytest.raises(ValueError, match=r"batches is a dict, which is one batch.*\[batch\]"):
            use()


def test_a_head_that_is_offloaded_cannot_train() -> None:
    model = accelerate.cpu_offload(Net(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"classifier\.0\.weight is offloaded.*without an offload"):
        loradrop.inject(model, config())
    loradrop.inject(model, config(modules_to_save=[]))


class InBuffers(nn.Module):
    """As GPTQ's and AWQ's layers hold their weights."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = WIDTH, 2, nn.Parameter(torch.zeros(2))
        self.register_buffer("qweight", tensor)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("in_buffers", [False, True])
def test_a_quantised_head_cannot_train(dtype: torch.dtype, in_buffers: bool) -> None:
    model, weight = Net(), torch.zeros(2, WIDTH).to(dtype)
    if in_buffers:
        model.classifier[1] = InBuffers(weight)
    else:
        model.classifier[1].weight = nn.Parameter(weight, requires_grad=False)
    name = r"classifier\.1\.q?weight is quantised"
    refused(rf"{name} .*{dtype}.*without \['classifier'\].*modules_to_save=\[\]", model)
    loradrop.inject(model, config(modules_to_save=[]))


def stack(*kinds: str) -> nn.Module:
    """Layers of different kinds, as hybrid models have them."""
    model = nn.Module()
    made = (nn.ModuleDict({kind: nn.Linear(WIDTH, WIDTH)}) for kind in kinds)
    model.layers = nn.ModuleList(made)
    return model


COVERED: list[tuple[Any, bool, list[str]]] = [
    (["q_proj"], True, ["layers.0.q_proj"]),
    (r".*q_proj", True, ["layers.0.q_proj"]),
    (["layers.0.q_proj"], False, ["layers.0.q_proj"]),
    (["0.q_proj", "layers.1.in_proj"], False, ["layers.0.q_proj", "layers.1.in_proj"]),
    (r"layers\.0\..*_proj", False, ["layers.0.q_proj"]),
    ("all-linear", False, ["layers.0.q_proj", "layers.1.in_proj", "layers.2.in_proj"]),
    (None, False, ["layers.0.q_proj"]),
]
DEFAULTS = [("query_proj", "value_proj"), ("Wqkv",), ("to_q", "to_v"), ("q_b_proj",), ("in_proj",)]


@pytest.mark.parametrize(("targets", "told", "expected"), COVERED)
def test_an_entry_that_some_layers_lack(
    targets: Any, told: bool, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A warning with the table, unless it names its layers or is no choice of the user."""
    model = stack("q_proj", "in_proj", "in_proj")
    assert names(loradrop.inject(model, LoRAConfig(r=R, target_modules=targets))) == expected
    assert ("1 of 3 layers" in caplog.text and "none in layers.1, layers.2" in caplog.text) == told


def test_a_number_above_the_layers_is_not_theirs(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Identity(), stack("q_proj", "in_proj", "in_proj"))
    loradrop.inject(model, LoRAConfig(r=R, target_modules=["q_proj"]))
    assert "1 of 3 layers of 1.layers.*" in caplog.text


@pytest.mark.parametrize("kinds", DEFAULTS)
def test_names_of_query_and_value(kinds: tuple[str, ...]) -> None:
    bank = loradrop.inject(stack(*kinds, "out_proj"), LoRAConfig(r=R))
    assert {target.kind for target in bank.targets} == set(kinds)


class Mixer(nn.Module):
    """As Mamba's, whose kernels read the weights of some of its linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.dt_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv1d, self.D = nn.Conv1d(WIDTH, WIDTH, 3), nn.Parameter(torch.ones(WIDTH))


def unadaptable() -> nn.Module:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9, bias=False)
    model.head.weight = model.embed.weight
    model.gate, model.up, model.mixer = nn.Linear(WIDTH, R - 1), nn.Linear(WIDTH, WIDTH), Mixer()
    model.tied, model.attention = Tied(), nn.MultiheadAttention(WIDTH, 2)
    return model


def test_all_linear_leaves_out_what_it_cannot_adapt(caplog: pytest.LogCaptureFixture) -> None:
    bank = loradrop.inject(unadaptable(), config(target_modules="all-linear"))
    assert names(bank) == ["up", "mixer.in_proj"] and caplog.text.count("leaves out") == 1
    for name in ("head", "gate", "tied.first", "tied.second", "attention.out_proj", "dt_proj"):
        assert f"{name} (each" in caplog.text
    for name in ("head", "gate", "attention.out_proj"):
        with pytest.raises(ValueError, match=name):
            loradrop.inject(unadaptable(), config(name))
    with pytest.raises(ValueError, match=r"all-linear.*matches no"):
        loradrop.inject(Net(), LoRAConfig(target_modules="all-linear", r=WIDTH + 1))


def test_all_linear_names_the_experts_that_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 4}
    mixtral = build("MixtralForCausalLM", "MixtralConfig", **sizes, **LM)
    bank = loradrop.inject(mixtral, LoRAConfig(r=2, target_modules="all-linear"))
    assert {target.kind for target in bank.targets} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "layers.0.mlp.experts.gate_up_proj" in caplog.text
    assert "layers.1.mlp.experts.down_proj (each is one parameter of all experts" in caplog.text


class Router(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x).softmax(-1).topk(1)


class Scaled(nn.Linear):
    """A linear map, which counts its calls."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 2 * super().forward(x)


class Picky(nn.Linear):
    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * super().forward(x)


def test_all_linear_leaves_out_what_makes_no_rows(caplog: pytest.LogCaptureFixture) -> None:
    """By trying it without values: what cannot be tried stays."""
    model = nn.Module()
    model.router, model.scaled = Router(WIDTH, WIDTH), Scaled(WIDTH, WIDTH)
    model.picky = Picky(WIDTH, WIDTH)
    bank = loradrop.inject(model, config(target_modules="all-linear"))
    assert names(bank) == ["scaled", "picky"] and float(model.scaled.calls) == 0
    assert "router (each does not return (..., N), as a router)" in caplog.text
    model = nn.Sequential(Router(WIDTH, WIDTH))
    loradrop.inject(model, config(target_modules=["0"]))
    with pytest.raises(
        TypeError, match=r"^0, a Router, made a topk of .*exclude_modules=\['0'\]"
    ):
        model(torch.randn(2, WIDTH))


def test_a_sharded_model(tmp_path: Path) -> None:
    """Its adapters would not be sharded, nor their gradients summed."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), Net()
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=r"Net is sharded.*inject first"):
            loradrop.inject(model, config())
        sharded, expected = injected(modules_to_save=[]), output(injected())
        fully_shard(sharded, mesh=mesh)
        torch.testing.assert_close(output(sharded), expected)
        sharded(IDS).sum().backward()
        assert all(p.grad is not None for p in sharded.lora_bank.parameters())
        sharded.reshard()
        with pytest.raises(ValueError, match=r"is a DTensor.*before it is sharded"):
            loradrop.merge(sharded)
        loradrop.save(injected(modules_to_save=[]), tmp_path / "same")
        loradrop.load(sharded, tmp_path / "same")
        other = injected(modules_to_save=[])
        loradrop.share(other, [])
        loradrop.save(other, tmp_path / "other")
        for call in (loradrop.share, lambda m, _: loradrop.load(m, tmp_path / "other")):
            with pytest.raises(ValueError, match=r"adapters are sharded.*before fully_shard"):
                call(sharded, [])
        parallel = injected(modules_to_save=[])
        parallelize_module(parallel, mesh, {"layers.0.query": ColwiseParallel()})
        with pytest.raises(RuntimeError, match=r"DTensor.*tensor parallelism.*not served.*FSDP2"):
            parallel(IDS)
    finally:
        distributed.destroy_process_group()


def test_what_zero_3_takes_apart() -> None:
    """DeepSpeed marks a parameter by ds_id, and leaves its shape at (0,) between uses."""
    model = Net()
    model.embed.weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"ZeRO-3 takes parameters apart.*ZeRO-1 or 2.*FSDP2"):
        loradrop.inject(model, config())
    model = injected(modules_to_save=[])
    for parameter in model.lora_bank.parameters():
        parameter.ds_id, parameter.data = 1, parameter.data.new_empty(0)
    for call in (loradrop.share, loradrop.merge, loradrop.remove):
        with pytest.raises(ValueError, match="ZeRO-3"):
            call(model)
    with pytest.raises(ValueError, match="ZeRO-3"):
        model(IDS)


def test_what_is_not_refused() -> None:
    assert len(loradrop.inject(part(), config(strict=False)).targets) == 5
    head = LoRAConfig(target_modules="all-linear", exclude_modules=["classifier", "dense"])
    kinds = {target.kind for target in loradrop.inject(bert(), head).targets}
    assert kinds == {"query", "key", "value"}
    assert loradrop.inject(Net(), config(rank_pattern={"query": WIDTH})).targets[0].r == WIDTH
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert names(loradrop.inject(model, config("0", "2"))) == ["0", "2"]


@pytest.mark.parametrize("make", [nn.Sequential, nn.ModuleList, nn.ModuleDict])
def test_a_bare_container(make: Make) -> None:
    """A Sequential runs its bank as one more link, which passes its input on."""
    x, linear, model = torch.randn(3, WIDTH), nn.Linear(WIDTH, WIDTH), make()
    model.add_module("0", linear)
    expected = linear(x)
    bank = loradrop.inject(model, config("0", strict=False))
    nn.init.normal_(bank.B[0])
    y = model(x) if isinstance(model, nn.Sequential) else linear(x)
    torch.testing.assert_close(y, expected + x @ bank.delta(0).T)
    loradrop.remove(model)
    assert torch.equal(linear(x), expected) and len(model) == 1


class Chain(nn.Sequential):
    """As SentenceTransformer is: it saves itself link by link."""

    def save(self, path: str) -> None:
        for link in self:
            link.save(path)


def test_a_chain_that_saves_itself() -> None:
    link = nn.Module()
    link.auto_model = bert()
    refused(r"Chain.*inject its inner model, model\[0\]\.auto_model", Chain(link), "query")
    refused(r"model\[0\]", Chain(nn.Linear(WIDTH, WIDTH)), "0")


def test_a_bank_passes_on_what_it_gets() -> None:
    """As a link of any chain, also of one whose links take several values."""
    bank = injected().lora_bank
    assert bank(1) == 1 and bank(1, 2) == (1, 2)


def test_configurations_that_are_mixed_up() -> None:
    """Each side names the other's."""
    for theirs in (peft.LoraConfig(r=R), integrations.LoraDropConfig(r=R)):
        for use in (
            lambda c=theirs: loradrop.inject(Net(), c),
            lambda c=theirs: loradrop.fit(Net(), [{"x": 1}], None, c),
        ):
            with pytest.raises(TypeError, match=r"get_peft_model.*from_peft\(config\)"):
                use()
    with pytest.raises(TypeError, match=r"builtins\.dict: give loradrop\.LoRAConfig"):
        loradrop.inject(Net(), {"r": 8})  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match=r"loradrop\.integrations\.peft.*to_peft"):
        peft.get_peft_model(bert(), loradrop.LoraDropConfig())
    for key, words in (
        ("use_dora", "not be s·B·A over the base: DoRA also scales"),
        ("task_type", "it is PEFT's, and has no counterpart here"),
        ("lora_alpa", "did you mean 'lora_alpha'"),
    ):
        with pytest.raises(ValueError, match=words):
            loradrop.LoraDropConfig(**{key: True})
    with pytest.raises(AttributeError, match="no attribute 'rnak'"):
        _ = config().rnak  # type: ignore[attr-defined]
    assert not hasattr(config(), "peft_type")


def test_adapters_of_peft() -> None:
    """Neither goes on the other: the two could not be merged or saved rightly."""
    theirs = peft.LoraConfig(r=R, target_modules=["query"])
    model = peft.get_peft_model(Net(), theirs)
    for part in (model, model.base_model.model):
        refused("PEFT", part, "mix")
    with pytest.raises(ValueError, match="loradrop"):
        peft.get_peft_model(injected(), theirs)


def test_a_model_without_adapters() -> None:
    def disable(model: nn.Module) -> None:
        with loradrop.disabled(model):
            pass

    calls = loradrop.merge, loradrop.remove, loradrop.share, disable
    for call in (*calls, lambda model: loradrop.probe(model, [IDS])):
        with pytest.raises(ValueError, match=r"Net.*inject"):
            call(Net())
        with pytest.raises(ValueError, match=r"Sequential has no .*: its part '1' has them: give"):
            call(nn.Sequential(Net(), injected()))
    with pytest.raises(ValueError, match=r"part '1' is injected already.*remove\(model\.1\)"):
        loradrop.inject(nn.Sequential(Net(), injected()), config())


def test_injection_says_what_it_adapted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="loradrop"):
        loradrop.inject(Net(), config())
    assert "query (3)" in caplog.text and "value (3)" in caplog.text
    assert "classifier" in caplog.text


def test_an_exclusion_that_would_match_in_a_list() -> None:
    words = r'exclude_modules="query, mix" is a string.* give a list, \["query", "mix"\]'
    refused(words, Net(), exclude_modules="query, mix")


@pytest.mark.parametrize("option", [{"budget": 0.5}, {"keep_ratio": 0.1}, {"keep": 0}])
def test_a_decision_that_keeps_none_says_so(
    option: Options, caplog: pytest.LogCaptureFixture
) -> None:
    model = bert(2)
    loradrop.inject(model, loradrop.LoraDropConfig(r=4, **option))
    loradrop.probe(wake(model), [{"input_ids": IDS}])
    loradrop.share(model)
    assert model.lora_bank.assignment.kept == ()
    said = [r.getMessage() for r in caplog.records if "no target keeps its own" in r.getMessage()]
    assert len(said) == ("keep" not in option)  # keep=0 is what was asked for
    assert all(line.startswith(next(iter(option))) for line in said)
