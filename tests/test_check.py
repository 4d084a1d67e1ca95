"""The check of an export: equal files pass, every way to differ from the native adapter shows."""

import copy
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig, export, verify
from loradrop.formats.engines import ENGINES, refusal, scale
from loradrop.formats.peft_file import CONFIG, PREFIX, TENSORS, PeftFile
from loradrop.injection import injection_of

pytestmark = pytest.mark.numbers

IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(5))
BATCHES = [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:], "attention_mask": IDS[1:] > 20}]


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = hf.BertConfig(**sizes, intermediate_size=48, initializer_range=0.2)
    return hf.BertForSequenceClassification(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return hf.GPT2LMHeadModel(config).eval()


def adapt(model: nn.Module, **options: Any) -> nn.Module:
    """Inject, and give every trained tensor a value that shows in the logits."""
    bank, state = loradrop.inject(model, LoRAConfig(**options)), model.state_dict()
    torch.manual_seed(1)
    for tensor in (*bank.parameters(), *(state[name] for name in injection_of(model).originals)):
        tensor.data.add_(torch.randn(tensor.shape) * 0.3)
    return model


def exported(make: Callable[[], nn.Module], path: Path, **options: Any) -> nn.Module:
    model = adapt(make(), **options)
    export(model, path)
    return model


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change the configuration and the tensors of a PEFT folder in place."""
    config, tensors = json.loads((path / CONFIG).read_text()), load_file(path / TENSORS)
    change(config, tensors)
    (path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, path / TENSORS)


@pytest.fixture(params=["peft", "replay"])
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With PEFT, and without."""
    if request.param == "replay":
        monkeypatch.setitem(sys.modules, "peft", None)
    else:
        pytest.importorskip("peft")
    return request.param


def test_all_engines_take_a_language_model(tmp_path: Path, loader: str) -> None:
    patterns = {"rank_pattern": {"v_proj": 11}, "alpha_pattern": {"1.*q_proj": 5}}
    model = exported(llama, tmp_path, r=4, lora_alpha=12, use_rslora=True, **patterns)
    report = verify(model, tmp_path, BATCHES, engines=ENGINES)
    assert report.ok and report.loader == loader
    assert [row.engine for row in report.rows] == list(ENGINES) == list(report.required)
    assert all(row.ok and row.error <= 1e-6 for row in report.rows)
    assert report.logits < 1e-4 and report.relative < 1e-4 == report.tolerance
    rewrite(tmp_path, lambda config, _: config.update(lora_alpha=24))  # twice what it was
    changed = verify(model, tmp_path, BATCHES)
    assert not changed.ok and changed.logits > 0.1 and changed.relative > 0.1


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (bert, {}),
        (bert, {"modules_to_save": ["classifier", "bert.pooler"]}),
        (gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    ],
)
def test_refusals_are_told_and_required_where_named(
    make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path, loader: str
) -> None:
    model = exported(make, tmp_path, **options)
    report = verify(model, tmp_path, BATCHES)
    rows = {row.engine: row for row in report.rows}
    assert report.ok and report.loader == loader and rows["peft"].ok
    assert not rows["llama.cpp"].ok and rows["llama.cpp"].error <= 1e-6
    assert not verify(model, tmp_path, BATCHES, engines=["peft", "llama.cpp"]).ok
    with pytest.raises(ValueError, match="engine 'ollama' is unknown"):
        verify(model, tmp_path, BATCHES, engines=["ollama"])


@pytest.mark.parametrize("how", ["group", "none"])
def test_shared_and_dropped_adapters(how: str, tmp_path: Path) -> None:
    model = adapt(llama())
    bank = model.lora_bank
    loradrop.share(model, [bank.targets[0].name], share=how)
    for parameter in bank.parameters():
        parameter.data.normal_(0, 0.3)
    export(model, tmp_path)
    assert verify(model, tmp_path, BATCHES, engines=ENGINES).ok


def peft_saves(path: Path, **options: Any) -> nn.Module:
    """A file that PEFT wrote, and a native model with the same factors under the same options."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    model = adapt(llama(), **options)
    saved = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for i, target in enumerate(model.lora_bank.targets):
        layer = saved.base_model.model.get_submodule(target.name)
        for side, factor in zip(
            (layer.lora_A, layer.lora_B), model.lora_bank.factors(i), strict=True
        ):
            side["default"].weight.data.copy_(factor.data)
    saved.save_pretrained(path)
    return model


class TestWhatPeftWrites:
    """Its own files say by patterns and rslora what SGLang and llama.cpp do not read."""

    def verdicts(self, model: nn.Module, path: Path) -> dict[str, bool]:
        report = verify(model, path, BATCHES)
        assert report.relative <= 1e-4  # PEFT itself reads it right
        wrong = [row for row in report.rows if row.error > 0.05]
        assert report.ok == (not wrong) and all(f"{row.engine} " in report.table() for row in wrong)
        assert report.table().count("WRONG") == len(wrong)
        return {row.engine: row.ok for row in report.rows}

    def test_heterogeneous(self, tmp_path: Path) -> None:
        patterns = {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"1.*q_proj": 24}}
        model = peft_saves(tmp_path, r=4, lora_alpha=8, **patterns)
        expected = {"peft": True, "vllm": True, "sglang": False, "llama.cpp": False}
        assert self.verdicts(model, tmp_path) == expected
        assert not verify(model, tmp_path, BATCHES).ok

    def test_rank_pattern_alone(self, tmp_path: Path) -> None:
        model = peft_saves(tmp_path, r=4, lora_alpha=8, rank_pattern={"v_proj": 8})
        expected = {"peft": True, "vllm": True, "sglang": False, "llama.cpp": True}
        assert self.verdicts(model, tmp_path) == expected

    def test_rslora(self, tmp_path: Path) -> None:
        model = peft_saves(tmp_path, r=4, lora_alpha=8, use_rslora=True)
        expected = {"peft": True, "vllm": True, "sglang": False, "llama.cpp": False}
        assert self.verdicts(model, tmp_path) == expected

    def test_plain(self, tmp_path: Path) -> None:
        model = peft_saves(tmp_path, r=4, lora_alpha=8)
        assert set(self.verdicts(model, tmp_path).values()) == {True}

    def test_our_export_of_the_heterogeneous_one_is_right_for_all(self, tmp_path: Path) -> None:
        patterns = {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"1.*q_proj": 24}}
        model = peft_saves(tmp_path / "theirs", r=4, lora_alpha=8, **patterns)
        export(model, tmp_path / "ours")
        assert verify(model, tmp_path / "ours", BATCHES, engines=ENGINES).ok


@pytest.mark.parametrize("value", [0.0, float("nan"), None])
def test_a_changed_file_shows(value: float | None, tmp_path: Path, loader: str) -> None:
    model = exported(llama, tmp_path)

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if "layers.1.self_attn.v_proj.lora_B" in key)
        tensors[key] = (
            tensors[key] * 1.01 if value is None else torch.full_like(tensors[key], value)
        )

    rewrite(tmp_path, change)
    report = verify(model, tmp_path, BATCHES)
    assert not report.ok and not report.relative <= report.tolerance
    assert not any(row.ok for row in report.rows)
    assert all("layers.1.self_attn.v_proj" in row.reason for row in report.rows)
    assert "DIFFER" in report.table() and report.table().count("WRONG") == 4


def test_a_changed_head_shows_in_the_logits(tmp_path: Path, loader: str) -> None:
    model = exported(bert, tmp_path)
    rewrite(tmp_path, lambda _, tensors: tensors[PREFIX + "classifier.weight"].mul_(1.01))
    report = verify(model, tmp_path, BATCHES)
    assert report.rows[0].ok and not report.ok and "DIFFER" in report.table()


def test_a_missing_adapter_shows(tmp_path: Path) -> None:
    model = exported(llama, tmp_path)

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "layers.0.self_attn.q_proj" in key]:
            del tensors[key]

    rewrite(tmp_path, change)
    report = verify(model, tmp_path, BATCHES)
    assert not report.ok and report.rows[0].error == 1.0
    assert "layers.0.self_attn.q_proj" in report.rows[0].reason


def test_an_adapter_too_many_shows(tmp_path: Path) -> None:
    model = exported(llama, tmp_path, target_modules=["q_proj", "v_proj", "k_proj"])
    loradrop.remove(model)
    fewer = adapt(model, target_modules=["q_proj", "v_proj"])
    report = verify(fewer, tmp_path, BATCHES)
    assert not report.ok and report.rows[0].error == math.inf


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_have_their_own_tolerance(dtype: str, tmp_path: Path) -> None:
    model = adapt(llama(), lora_alpha=3)
    export(model, tmp_path, dtype=dtype)
    report = verify(model, tmp_path, BATCHES, engines=ENGINES)
    assert report.ok and report.relative > 1e-5
    assert not verify(model, tmp_path, BATCHES, tolerance=1e-6).ok
    rewrite(tmp_path, lambda config, tensors: config.update(lora_alpha=config["lora_alpha"] * 2))
    assert not verify(model, tmp_path, BATCHES).ok


def test_the_model_stays_as_it_is(tmp_path: Path, loader: str) -> None:
    model = exported(bert, tmp_path).train()
    model.bert.encoder.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    bank = model.lora_bank
    assert verify(model, tmp_path, BATCHES).ok
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [m.training for m in model.modules()] == modes and model.lora_bank is bank
    assert torch.equal(torch.get_rng_state(), random)


def test_a_reversible_merge_is_compared_with_its_base(tmp_path: Path) -> None:
    model = exported(llama, tmp_path)
    loradrop.merge(model, keep_original=True)
    assert verify(model, tmp_path, BATCHES).ok


class Net(nn.Module):
    """A model that is none of transformers: tensors in, a tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_batches_of_any_kind(wrap: Callable[[Tensor], Any], tmp_path: Path, loader: str) -> None:
    model = exported(Net, tmp_path, target_modules=["lin"], r=4)
    assert verify(model, tmp_path, (wrap(torch.randn(3, 16)) for _ in range(2))).ok


class TestBadInput:
    def test_no_batches(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="batches is empty"):
            verify(exported(llama, tmp_path), tmp_path, [])

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is not there$"):
            verify(adapt(llama()), tmp_path, BATCHES)

    def test_a_pickle_is_not_read(self, tmp_path: Path) -> None:
        torch.save({"x": torch.ones(1)}, tmp_path / "adapter_model.bin")
        with pytest.raises(FileNotFoundError, match="a pickle that can run any code"):
            verify(adapt(llama()), tmp_path, BATCHES)

    def test_truncated(self, tmp_path: Path) -> None:
        model = exported(llama, tmp_path)
        whole = (tmp_path / TENSORS).read_bytes()
        (tmp_path / TENSORS).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
            verify(model, tmp_path, BATCHES)

    def test_a_half_written_configuration(self, tmp_path: Path) -> None:
        model = exported(llama, tmp_path)
        (tmp_path / CONFIG).write_text('{"r": ')
        with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
            verify(model, tmp_path, BATCHES)

    def test_of_another_size(self, tmp_path: Path) -> None:
        exported(llama, tmp_path)

        def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
            tensors |= {k: v[:, :5].contiguous() for k, v in tensors.items() if "lora_A" in k}

        rewrite(tmp_path, change)
        with pytest.raises(ValueError, match=r"q_proj is \(32, 5\) .* export of another model"):
            verify(adapt(llama()), tmp_path, BATCHES)

    def test_of_another_architecture(self, tmp_path: Path) -> None:
        exported(Net, tmp_path, target_modules=["lin"], r=4)
        with pytest.raises(ValueError, match="adapts lin, which LlamaForCausalLM does not have"):
            verify(adapt(llama()), tmp_path, BATCHES)

    def test_a_file_that_peft_cannot_load(self, tmp_path: Path) -> None:
        pytest.importorskip("peft")
        model = exported(llama, tmp_path)
        rewrite(tmp_path, lambda config, _: config.update(r=4))
        with pytest.raises(ValueError, match=r"PEFT cannot load .* into LlamaForCausalLM"):
            verify(model, tmp_path, BATCHES)

    def test_without_adapters(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"call loradrop\.inject"):
            verify(llama(), tmp_path, BATCHES)


NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")


def lora_file(
    names: tuple[str, ...] = NAMES, rank: int = 8, extra: str | None = None, **config: Any
) -> PeftFile:
    tensors = {f"{PREFIX}{name}.lora_A.weight": torch.ones(rank, 4) for name in names}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": torch.ones(4, rank) for name in names}
    if extra is not None:
        tensors[PREFIX + extra] = torch.ones(1)
    return PeftFile({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **config}, tensors)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plain_file_is_taken(engine: str) -> None:
    assert refusal(engine, lora_file()).ok


def rename(*kinds: str) -> tuple[str, ...]:
    return tuple(f"model.layers.0.self_attn.{kind}" for kind in kinds)


@pytest.mark.parametrize(
    ("engine", "file", "reason"),
    [
        ("peft", lora_file(peft_type="IA3"), "peft_type is 'IA3'"),
        ("peft", lora_file(use_dora=True), "use_dora"),
        ("peft", lora_file(rank_pattern={"q_proj": 4}), "q_proj has rank 8.*should have 4"),
        ("vllm", lora_file(extra="score.weight"), "score.weight is not a lora_A or lora_B"),
        ("vllm", lora_file(modules_to_save=["lm_head"]), "modules_to_save has lm_head"),
        ("vllm", lora_file(use_dora=True), "use_dora is not supported"),
        ("vllm", lora_file(lora_bias=True), "lora_bias is not supported"),
        ("vllm", lora_file(layer_replication=[[0, 1]]), "layer_replication"),
        ("vllm", lora_file(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        ("vllm", lora_file(bias="all"), "bias='all'"),
        ("vllm", lora_file(rank=1024), "rank 1024 is beyond its cap of 512"),
        ("sglang", lora_file(use_dora=True), "use_dora"),
        ("sglang", lora_file(target_modules=".*proj"), "regex"),
        ("sglang", lora_file(extra="score.weight"), "silently ignores score.weight"),
        ("sglang", lora_file(("transformer.h.0.attn.c_attn",)), "drops transformer.h.0.attn"),
        ("sglang", lora_file(rank=4), "q_proj has rank 4, not r=8"),
        ("sglang", lora_file(rename("q_proj")), "q_proj lacks its partner v_proj"),
        ("sglang", lora_file(rename("v_proj")), "v_proj lacks its partner q_proj"),
        ("sglang", lora_file(rename("k_proj", "v_proj")), "k_proj lacks its partner q_proj"),
        ("llama.cpp", lora_file(extra="classifier.weight"), "classifier.weight is not a lora_A"),
        ("llama.cpp", lora_file(fan_in_fan_out=True), "Conv1D"),
    ],
)
def test_refusals(engine: str, file: PeftFile, reason: str) -> None:
    verdict = refusal(engine, file)
    assert not verdict.ok
    assert re.search(reason, verdict.reason), verdict.reason


def test_ranks_of_vllm() -> None:
    assert refusal("vllm", lora_file(rank=16)).reason == ""
    assert refusal("vllm", lora_file(rank=17)).reason == "needs --max-lora-rank 32"
    assert refusal("vllm", lora_file(rank=300)).reason == "needs --max-lora-rank 320"


def test_scale_rules() -> None:
    patterns = {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"self_attn.v_proj": 6}}
    config = {"r": 16, "lora_alpha": 32, "use_rslora": True, **patterns}
    q, v = NAMES
    assert [scale(engine, config, q, 16) for engine in ENGINES] == [8, 8, 2, 2]
    assert [scale(engine, config, v, 4) for engine in ENGINES] == [3, 3, 2, 8]
    config["use_rslora"] = False
    assert [scale(engine, config, v, 4) for engine in ENGINES] == [1.5, 1.5, 2, 8]


def test_a_copy_is_loaded_not_the_model(tmp_path: Path, loader: str) -> None:
    model = exported(llama, tmp_path)
    twin = copy.deepcopy(model)
    verify(model, tmp_path, BATCHES)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in twin.named_modules()]
    assert not any(module._forward_hooks for module in model.modules())
