"""Exports: PEFT reads them to the same logits, a merged model is plain, the adapted model stays."""

import copy
import importlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig, export
from loradrop.bank import AdapterBank
from loradrop.formats.peft_file import CONFIG, PREFIX, TENSORS, read
from loradrop.injection import injection_of
from loradrop.methods import Method
from loradrop.pairs import LoRABank

pytestmark = pytest.mark.numbers

IDS = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(5))
QV = ["query", "value"]


def bert(cls: type = hf.BertForSequenceClassification, **options: Any) -> nn.Module:
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    config = hf.BertConfig(**sizes, intermediate_size=48, max_position_embeddings=32, **options)
    return build(cls, config)


def roberta() -> nn.Module:
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = hf.RobertaConfig(**sizes, intermediate_size=48, max_position_embeddings=40)
    return build(hf.RobertaForSequenceClassification, config)


def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    return build(hf.DistilBertForSequenceClassification, config)


def llama(cls: type = hf.LlamaForCausalLM, **options: Any) -> nn.Module:
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    return build(cls, hf.LlamaConfig(**sizes, **heads, pad_token_id=0, **options))


def gpt2() -> nn.Module:
    config = hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return build(hf.GPT2LMHeadModel, config)


class Plain(nn.Module):
    """No model of transformers: `lin` is also the end of the name `sub.lin`."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.lin = nn.Linear(size, size)
        self.sub = nn.Sequential()
        self.sub.add_module("lin", nn.Linear(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return self.sub(torch.tanh(self.lin(x)))


def build(cls: type, config: Any) -> nn.Module:
    torch.manual_seed(0)
    config.initializer_range = 0.2  # for logits that an adapter moves
    return cls(config).eval()


def adapt(model: nn.Module, **options: Any) -> AdapterBank:
    """Inject, and give every trained tensor a value that shows in the logits."""
    bank = loradrop.inject(model, LoRAConfig(**options))
    fill(model)
    return bank


def fill(model: nn.Module) -> None:
    bank, generator = model.lora_bank, torch.Generator().manual_seed(1)
    state = model.state_dict()
    for tensor in (*bank.parameters(), *(state[name] for name in injection_of(model).originals)):
        noise = torch.empty(tensor.shape).normal_(0, 0.3, generator=generator)
        tensor.data.add_(noise.to(tensor.dtype))


def share(model: nn.Module, kept: list[str], how: str = "group") -> None:
    loradrop.share(model, kept, share=how)
    fill(model)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """In float64: two models then differ by the rounding of a file, not by a machine's sums."""
    named = copy.deepcopy(model).double()(input_ids=IDS)
    return torch.cat([v.flatten() for v in named.values() if isinstance(v, Tensor)])


def reload(base: nn.Module, path: Path) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(base, str(path)).eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in before)


@pytest.mark.parametrize(
    ("make", "options", "task"),
    [
        (bert, {}, "SEQ_CLS"),
        (bert, {"target_modules": "all-linear", "r": 20, "lora_alpha": 50}, "SEQ_CLS"),
        (
            bert,
            {"r": 4, "rank_pattern": {"value": 11}, "alpha_pattern": {"1.*query": 3, "value": 7}},
            "SEQ_CLS",
        ),
        (bert, {"use_rslora": True, "r": 3, "rank_pattern": {"query": 9}}, "SEQ_CLS"),
        (bert, {"modules_to_save": []}, "SEQ_CLS"),
        (bert, {"modules_to_save": ["bert.pooler", "classifier"]}, "SEQ_CLS"),
        (lambda: bert(hf.BertForTokenClassification), {}, "TOKEN_CLS"),
        (lambda: bert(hf.BertForQuestionAnswering), {}, "QUESTION_ANS"),
        (lambda: bert(hf.BertModel), {}, "FEATURE_EXTRACTION"),
        (lambda: bert(hf.BertForMaskedLM), {}, None),
        (roberta, {}, "SEQ_CLS"),  # a head of two layers
        (distilbert, {}, "SEQ_CLS"),  # PEFT saves pre_classifier as it ends in classifier
        (llama, {"target_modules": "all-linear"}, "CAUSAL_LM"),
        (lambda: llama(hf.LlamaForSequenceClassification), {}, "SEQ_CLS"),
        (gpt2, {"target_modules": ["c_attn", "c_fc"]}, "CAUSAL_LM"),
    ],
)
def test_stock_peft_reads_it_to_the_same_logits(
    make: Callable[[], nn.Module], options: dict[str, Any], task: str | None, tmp_path: Path
) -> None:
    model = make()
    base = copy.deepcopy(model)
    adapt(model, **options)
    export(model, tmp_path)
    native = outputs(model)
    assert (native - outputs(base)).abs().max() > 1e-2  # the adapters say something
    torch.testing.assert_close(outputs(reload(base, tmp_path)), native, rtol=1e-5, atol=1e-5)
    assert read(tmp_path).config["task_type"] == task


@pytest.mark.parametrize("how", ["group", "none"])
def test_shared_and_dropped_adapters_are_written_out(how: str, tmp_path: Path) -> None:
    model = bert()
    base = copy.deepcopy(model)
    bank = adapt(model, r=4, lora_alpha=12, target_modules=QV)
    kept = [bank.targets[1].name, bank.targets[4].name]
    share(model, kept, how)
    export(model, tmp_path)
    torch.testing.assert_close(
        outputs(reload(base, tmp_path)), outputs(model), rtol=1e-5, atol=1e-5
    )
    modules = read(tmp_path).modules
    assert list(modules) == [target.name for target in bank.targets]
    for i, target in enumerate(bank.targets):
        A, B = modules[target.name]
        delta = bank.delta(i)
        if how == "none" and target.name not in kept:
            assert delta is None and not A.any() and not B.any()
        else:
            torch.testing.assert_close(B @ A, delta, rtol=1e-5, atol=1e-6)
            assert B.any()


def test_auto_peft_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = bert()
    model.save_pretrained(tmp_path / "base")
    adapt(model)
    export(model, tmp_path / "adapter", base_id=str(tmp_path / "base"))
    found = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(found), outputs(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("r", "uniform"), [(1, 8), (8, 8), (9, 16), (32, 32)])
def test_the_file_is_uniform_and_minimal(r: int, uniform: int, tmp_path: Path) -> None:
    model = llama()
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    bank = adapt(model, r=r, lora_alpha=5, target_modules=["q_proj", "v_proj"], **patterns)
    export(model, tmp_path, base_id="someone/a-llama")
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/a-llama",
        "inference_mode": True,
        "r": uniform,
        "lora_alpha": uniform,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    tensors = load_file(tmp_path / TENSORS)
    assert len(tensors) == 2 * len(bank.targets)
    for i, target in enumerate(bank.targets):
        A = tensors[f"{PREFIX}{target.name}.lora_A.weight"]
        B = tensors[f"{PREFIX}{target.name}.lora_B.weight"]
        assert A.shape == (uniform, target.in_features)
        assert B.shape == (target.out_features, uniform)
        assert not A[target.r :].any() and not B[:, target.r :].any()
        assert torch.equal(A[: target.r], bank.factors(i)[0])
        torch.testing.assert_close(B[:, : target.r], bank.scaling[i] * bank.factors(i)[1])


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 3e-2), ("float16", 4e-3)])
def test_narrow_dtype_rounds_the_folded_factors_once(
    dtype: str, bound: float, tmp_path: Path
) -> None:
    model = llama()
    bank = adapt(model, lora_alpha=3)
    export(model, tmp_path, dtype=dtype)
    for i, (A, B) in enumerate(read(tmp_path).modules.values()):
        a, b = bank.factors(i)
        assert torch.equal(A, a.to(getattr(torch, dtype)))
        assert torch.equal(B, (bank.scaling[i] * b).to(getattr(torch, dtype)))
        delta = bank.delta(i)
        assert (B.float() @ A.float() - delta).abs().max() <= bound * delta.abs().max()


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_values_that_the_file_cannot_hold_are_refused(value: float, tmp_path: Path) -> None:
    model = llama()
    bank = adapt(model)
    bank.B[1].data[0, 0] = value
    with pytest.raises(ValueError, match=f"B of {bank.targets[1].name}.*not finite.*float16"):
        export(model, tmp_path, dtype="float16")
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True, kw_only=True)
class Composed(Method):
    """A method whose factors are not Parameters, and of another rank than its targets say."""

    name: ClassVar[str] = ""

    def bank(self, *given: Any) -> LoRABank:
        return ComposedBank(*given)


class ComposedBank(LoRABank):
    def factors(self, i: int) -> tuple[Tensor, Tensor]:
        A, B = super().factors(i)
        return torch.cat([A, 2 * A, A.sin()]), torch.cat([B, B.cos(), 3 * B], 1)


def test_a_method_that_composes_its_factors(tmp_path: Path) -> None:
    model = bert()
    base = copy.deepcopy(model)
    adapt(model, r=4, lora_alpha=2, method=Composed())
    export(model, tmp_path)
    assert read(tmp_path).config["r"] == 16
    torch.testing.assert_close(
        outputs(reload(base, tmp_path)), outputs(model), rtol=1e-5, atol=1e-5
    )


def test_a_part_of_the_layers_is_named_in_full(tmp_path: Path) -> None:
    model = bert()
    base = copy.deepcopy(model)
    bank = adapt(model, target_modules=["0.attention.self.query", "1.output.dense"], strict=False)
    export(model, tmp_path)
    names = [target.name for target in bank.targets]
    assert read(tmp_path).config["target_modules"] == names
    assert reload(base, tmp_path).base_model.targeted_module_names == names


def test_names_that_end_another_name_become_a_regex(tmp_path: Path) -> None:
    model, x = Plain(), torch.randn(5, 16)
    base = copy.deepcopy(model)
    adapt(model, target_modules="lin", r=4)
    verdicts = {verdict.engine: verdict for verdict in export(model, tmp_path)}
    config = read(tmp_path).config
    assert config["target_modules"] == "(lin)" and config["task_type"] is None
    assert "regex" in verdicts["sglang"].reason
    found = reload(base, tmp_path)
    assert found.base_model.targeted_module_names == ["lin"]
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_task_that_would_save_a_target_whole_is_left_out(tmp_path: Path) -> None:
    model = distilbert()
    base = copy.deepcopy(model)
    adapt(model, target_modules=["pre_classifier"], modules_to_save=[])
    export(model, tmp_path)
    assert read(tmp_path).config["task_type"] is None
    torch.testing.assert_close(
        outputs(reload(base, tmp_path)), outputs(model), rtol=1e-5, atol=1e-5
    )


class TestWhatPeftCannotHold:
    def test_a_target_in_what_it_saves_whole(self, tmp_path: Path) -> None:
        model = distilbert()
        adapt(model, target_modules=["pre_classifier"], modules_to_save=["classifier"])
        with pytest.raises(ValueError, match=r"peft.*saves whole.*classifier.*pre_classifier"):
            export(model, tmp_path)

    def test_the_model_itself(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="LoRALinear: it is the model itself"):
            export(loradrop.LoRALinear(16, 16), tmp_path)

    def test_a_module_of_several_names(self, tmp_path: Path) -> None:
        model = Plain()
        model.twin = model.lin
        adapt(model, target_modules="lin", r=4)
        with pytest.raises(ValueError, match="lin: it has several names"):
            export(model, tmp_path)

    def test_a_trained_tensor_tied_to_another(self, tmp_path: Path) -> None:
        model = llama(tie_word_embeddings=True)
        adapt(model, modules_to_save=["lm_head"])
        with pytest.raises(ValueError, match=r"lm_head.weight apart from model.embed_tokens"):
            export(model, tmp_path)
        assert not list(tmp_path.iterdir())


class TestEngines:
    def test_a_language_model_suits_all(self, tmp_path: Path) -> None:
        model = llama()
        adapt(model)
        verdicts = export(model, tmp_path, engines=["peft", "vllm", "sglang", "llama.cpp"])
        assert [verdict.engine for verdict in verdicts] == ["peft", "vllm", "sglang", "llama.cpp"]
        assert all(verdict.ok and not verdict.reason for verdict in verdicts)

    @pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp"])
    def test_a_named_engine_that_refuses_raises_and_nothing_is_written(
        self, engine: str, tmp_path: Path
    ) -> None:
        model = bert()
        adapt(model)
        with pytest.raises(ValueError, match=rf"{engine} cannot take.*classifier\.weight"):
            export(model, tmp_path, engines=[engine])
        assert not list(tmp_path.iterdir())

    def test_one_that_was_not_named_is_reported(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = bert()
        adapt(model)
        with caplog.at_level(logging.WARNING, "loradrop"):
            verdicts = export(model, tmp_path)
        assert [verdict.ok for verdict in verdicts] == [True, False, False, False]
        assert [v.engine in caplog.text for v in verdicts[1:]] == [True] * 3
        assert "refuses it: classifier" in (tmp_path / "README.md").read_text()

    @pytest.mark.parametrize(
        ("r", "ok", "reason"),
        [
            (20, True, "needs --max-lora-rank 32"),
            (513, False, "rank 1024 is beyond its cap of 512"),
        ],
    )
    def test_ranks_of_vllm(self, r: int, ok: bool, reason: str, tmp_path: Path) -> None:
        model = Plain(520)
        adapt(model, target_modules=["lin"], r=r)
        verdict = export(model, tmp_path)[1]
        assert (verdict.engine, verdict.ok, verdict.reason) == ("vllm", ok, reason)

    def test_conv1d_is_not_for_llama_cpp(self, tmp_path: Path) -> None:
        model = gpt2()
        adapt(model)
        assert "Conv1D" in export(model, tmp_path)[3].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gguf"}, "format='gguf': choose one of peft, merged"),
        ({"dtype": "int8"}, "dtype='int8': choose one of float32, bfloat16, float16"),
        ({"engines": ["ollama"]}, "engine 'ollama' is unknown: choose among peft, vllm"),
        ({"format": "merged", "dtype": "float16"}, "of the PEFT format"),
    ],
)
def test_unknown_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = llama()
    adapt(model)
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no loradrop adapters: call loradrop\.inject"):
        export(llama(), tmp_path)


def test_model_card(tmp_path: Path) -> None:
    model = bert()
    bank = adapt(model, target_modules=QV)
    share(model, [bank.targets[0].name])
    export(model, tmp_path, base_id="someone/a-bert")
    card = (tmp_path / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert front.splitlines() == [
        'base_model: "someone/a-bert"',
        *("library_name: peft", "tags:", "- lora", "- loradrop"),
        '- "base_model:adapter:someone/a-bert"',
    ]
    assert "of 6 adapted layers 1 keep an adapter of their own, 5 share 2, and 0 have none" in text
    assert "| query | 1 | 2 | 0 |\n| value | 0 | 3 | 0 |" in text
    assert f"Own: {bank.targets[0].name}." in text
    assert "SequenceClassification.from_pretrained('someone/a-bert', num_labels=2)" in text
    export(model, tmp_path, base_id=str(tmp_path))
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()  # a folder of this machine


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_the_model_stays_as_it_is(format: str, tmp_path: Path) -> None:
    model = bert().train()
    bank = adapt(model)
    before, slots = snapshot(model), bank.slots
    trained = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    export(model, tmp_path, format)
    assert same(model, before) and torch.equal(torch.get_rng_state(), random)
    assert model.lora_bank is bank and bank.slots == slots and model.training
    assert [p.requires_grad for p in model.parameters()] == trained


def test_an_interrupted_export_is_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    adapt(model)
    export(model, tmp_path)
    before = (tmp_path / TENSORS).read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(importlib.import_module("loradrop.formats.peft"), "save_file", full)
    fill(model)
    with pytest.raises(OSError, match="no space left"):
        export(model, tmp_path)
    assert (tmp_path / TENSORS).read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", TENSORS]


class TestMerged:
    @pytest.mark.parametrize("make", [bert, roberta, llama, gpt2])
    def test_loads_to_the_same_logits(self, make: Callable[[], nn.Module], tmp_path: Path) -> None:
        model = make()
        base = outputs(model)
        adapt(model, lora_alpha=3)
        native = outputs(model)
        assert (native - base).abs().max() > 1e-2
        assert export(model, tmp_path, "merged") == []
        assert not [key for key in load_file(tmp_path / "model.safetensors") if "lora" in key]
        found, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        torch.testing.assert_close(outputs(found.eval()), native, rtol=1e-4, atol=1e-5)
        assert torch.equal(outputs(model), native)

    def test_rounds_once(self, tmp_path: Path) -> None:
        model = llama().to(torch.bfloat16)
        bank = adapt(model)
        export(model, tmp_path, "merged")
        found = load_file(tmp_path / "model.safetensors")
        for i, target in enumerate(bank.targets):
            weight = model.get_submodule(target.name).weight
            exact = weight.double() + bank.delta(i).double()
            assert torch.equal(found[f"{target.name}.weight"], exact.float().bfloat16())
            assert not torch.equal(found[f"{target.name}.weight"], weight)

    def test_of_a_reversible_merge_adds_nothing(self, tmp_path: Path) -> None:
        model = llama()
        adapt(model)
        native = outputs(model)
        loradrop.merge(model, keep_original=True)
        export(model, tmp_path, "merged")
        found = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(outputs(found), native, rtol=1e-4, atol=1e-5)

    def test_replaces_a_save_in_parts(self, tmp_path: Path) -> None:
        model = llama()
        type(model).save_pretrained(model, tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        adapt(model)
        export(model, tmp_path, "merged")
        assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
        assert not list(tmp_path.glob(".*"))
        found = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(outputs(found), outputs(model), rtol=1e-4, atol=1e-5)

    def test_needs_save_pretrained(self, tmp_path: Path) -> None:
        model = Plain()
        adapt(model, target_modules=["lin"])
        with pytest.raises(ValueError, match="Plain has no save_pretrained"):
            export(model, tmp_path, "merged")

    def test_not_beside_an_adapter(self, tmp_path: Path) -> None:
        model = llama()
        adapt(model)
        export(model, tmp_path)
        with pytest.raises(ValueError, match="holds an adapter"):
            export(model, tmp_path, "merged")

    def test_a_weight_of_two_targets(self, tmp_path: Path) -> None:
        model = llama()
        layers = model.model.layers
        adapt(model)
        layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
        with pytest.raises(ValueError, match=r"q_proj is tied .*layers\.1\.self_attn\.q_proj"):
            export(model, tmp_path, "merged")
