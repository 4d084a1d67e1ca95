"""llama.cpp's own converter on our exports: what our verdict says of it is what happens.

Needs a checkout of llama.cpp, which the environment variable LLAMA_CPP names. Nothing is built.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import LM, Make, Options, adapt, bert, build, gpt2, llama
from torch import nn

import loradrop
from loradrop import export
from loradrop.formats.engines import EngineVerdict, refusal, scale
from loradrop.formats.peft_file import configuration_of, read

CHECKOUT = Path(os.environ.get("LLAMA_CPP", ""))
CONVERTER = CHECKOUT / "convert_lora_to_gguf.py"
if not os.environ.get("LLAMA_CPP") or not CONVERTER.exists():
    why = "the environment variable LLAMA_CPP does not name a checkout of llama.cpp"
    pytest.skip(why, allow_module_level=True)
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(CHECKOUT / "gguf-py")  # the one that fits the converter
    gguf = pytest.importorskip("gguf", reason="gguf, or what it needs, is not installed")

Weights = dict[str, np.ndarray]

SIZES = dict(intermediate_size=48, num_key_value_heads=2, max_position_embeddings=32)
HEADED = SIZES | {"head_dim": 8}
MAMBA = dict(num_hidden_layers=2, state_size=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT = SIZES | dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4,
    v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1,
)  # fmt: skip
LINEAR_ATTENTION = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8, shared_expert_intermediate_size=16, mtp_num_hidden_layers=1,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
HYBRID = dict(
    mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8
)  # fmt: skip
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
GEMMA3N = HEADED | dict(
    intermediate_size=[48, 48], hidden_size_per_layer_input=8, vocab_size_per_layer_input=50,
    laurel_rank=4, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
    layer_types=["full_attention", "sliding_attention"],
)  # fmt: skip


def lm(family: str, config: str = "", **sizes: Any) -> Make:
    """A tiny causal language model of a family: `lm("Qwen2", **SIZES)`."""
    name = config or f"{family}Config"
    sizes = LM | {"tie_word_embeddings": False} | sizes
    return lambda: build(f"{family}ForCausalLM", name, **sizes)


def llava() -> Any:
    import transformers as t

    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48)
    sight = t.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    language = t.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50)
    config = t.LlavaConfig(vision_config=sight, text_config=language, image_token_index=49)
    return t.LlavaForConditionalGeneration(config).eval()


def save(model: nn.Module, folder: Path) -> Path:
    """The base model as the converter reads it, with the class that it goes by."""
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    return folder


def convert(base: Path, adapter: Path, out: Path) -> str:
    """Runs the converter as its command does. Returns what it died of, empty for nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CHECKOUT)
        arguments = ["--base", str(base), "--outfile", str(out), str(adapter)]
        patch.setattr(sys, "argv", [str(CONVERTER), *arguments])
        try:
            runpy.run_path(str(CONVERTER), run_name="__main__")
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def tensors(path: Path) -> Weights:
    return {t.name: np.array(t.data, dtype=np.float64) for t in gguf.GGUFReader(path).tensors}


def alpha(path: Path) -> float:
    return gguf.GGUFReader(path).fields["adapter.lora.alpha"].contents()


def deltas(path: Path) -> Weights:
    """What llama.cpp adds to its weights: alpha / (rank of B) · B·A."""
    found, a = tensors(path), alpha(path)
    names = [name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")]
    pairs = {name: (found[f"{name}.lora_a"], found[f"{name}.lora_b"]) for name in names}
    return {name: a / B.shape[-1] * (B @ A) for name, (A, B) in pairs.items()}


def weights(folder: Path) -> Weights:
    """The weights of a base model as llama.cpp orders them, by its own converter, in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CHECKOUT)
        from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

        config = ModelBase.load_hparams(folder, False)
        base = get_model_class(get_model_architecture(config, ModelType.TEXT))
        nothing = dict.fromkeys(("set_vocab", "set_gguf_parameters"), lambda self: None)
        cls = type("Weights", (base,), {"model_arch": base.model_arch, **nothing})
        with torch.inference_mode():
            file = folder / "model.gguf"
            cls(folder, gguf.LlamaFileType.ALL_F32, file, hparams=config).write()
    return tensors(folder / "model.gguf")


def exported(model: nn.Module, path: Path) -> EngineVerdict:
    return next(v for v in export(model, path) if v.engine == "llama.cpp")


LINEAR: Options = {"target_modules": "all-linear"}
PATTERNS = {"rank_pattern": {"v_proj": 6, "0.*q_proj": 2}, "alpha_pattern": {"k_proj": 3}}
TAKEN: dict[str, tuple[Make, Options]] = {
    "llama": (llama, LINEAR),
    "llama, tied": (lambda: llama(tie_word_embeddings=True), LINEAR),
    "llama, without a head": (lambda: llama("Model"), LINEAR),
    "llama, patterns": (llama, LINEAR | PATTERNS | {"use_rslora": True}),
    "llama, head": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "mistral": (lm("Mistral", **HEADED), LINEAR),
    "mixtral": (lm("Mixtral", **SIZES, num_local_experts=4), LINEAR),
    "qwen2": (lm("Qwen2", **SIZES), LINEAR),
    "qwen2-moe": (lm("Qwen2Moe", **SIZES, **EXPERTS, shared_expert_intermediate_size=16), LINEAR),
    "qwen3": (lm("Qwen3", **HEADED), LINEAR),
    "qwen3-next": (
        lm("Qwen3Next", **HEADED, **EXPERTS, **LINEAR_ATTENTION),
        {"target_modules": ["in_proj_ba", "out_proj", "q_proj", "o_proj", "up_proj"]},
    ),
    "gemma2": (lm("Gemma2", **HEADED, tie_word_embeddings=True), LINEAR),
    "phi3": (lm("Phi3", **SIZES, original_max_position_embeddings=32), LINEAR),
    "falcon": (lm("Falcon", multi_query=False), LINEAR),
    "falcon, one key": (lm("Falcon", multi_query=True, num_kv_heads=1), LINEAR),
    "falcon, grouped": (lm("Falcon", new_decoder_architecture=True, num_kv_heads=2), LINEAR),
    "falcon-h1": (lm("FalconH1", **HEADED, **HYBRID), {"target_modules": ["k_proj", "down_proj"]}),
    "gpt-neox": (lm("GPTNeoX", intermediate_size=48), LINEAR),
    "bloom": (lm("Bloom"), LINEAR),
    "mamba": (lm("Mamba", **MAMBA), LINEAR),
    "deepseek": (lm("DeepseekV2", **LATENT), {"target_modules": ["o_proj", "up_proj"]}),
    "cohere": (lm("Cohere", **SIZES, tie_word_embeddings=True), LINEAR),
    "t5": (lambda: build("T5ForConditionalGeneration", "T5Config", **T5), LINEAR),
    "bert": (lambda: bert(cls="Model"), {}),
    "llava, its language": (llava, {"target_modules": r".*language_model.*(q|down)_proj"}),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_it_takes_adds_what_merge_adds(name: str, tmp_path: Path) -> None:
    make, options = TAKEN[name]
    base = save(make(), tmp_path / "base")
    model = adapt(make(), r=4, lora_alpha=12, **options)
    verdict = exported(model, tmp_path / "adapter")
    assert verdict.ok and not verdict.reason, verdict
    assert not convert(base, tmp_path / "adapter", tmp_path / "adapter.gguf")
    loradrop.merge(model)
    before, after = weights(base), weights(save(model, tmp_path / "merged"))
    moved = {key: after[key] - before[key] for key in before if np.any(after[key] != before[key])}
    found = deltas(tmp_path / "adapter.gguf")
    assert moved and set(found) == set(moved)
    for key, delta in moved.items():
        assert found[key].shape == delta.shape
        assert np.abs(found[key] - delta).max() <= 1e-5 * np.abs(after[key]).max(), key


# What it does with what we say it does not take.
FAILS, LEAVES_OUT, IGNORES, WRITES_OTHER = "fails", "leaves out", "ignores", "writes other weights"
REFUSED: dict[str, tuple[Make, Options, str, str]] = {
    "bert, classes": (bert, {}, "classifier.* is not a lora_A", FAILS),
    "bert, words": (lambda: bert(cls="ForMaskedLM"), LINEAR, "leaves out cls", LEAVES_OUT),
    "bert, pooler": (lambda: bert(cls="Model"), LINEAR, "leaves out pooler", LEAVES_OUT),
    "llama, classes": (lambda: llama("ForSequenceClassification"), {}, "score", FAILS),
    "llama, saved head": (llama, {"modules_to_save": ["lm_head"]}, "lm_head.weight is not", FAILS),
    "llama, saved norm": (llama, {"modules_to_save": ["norm"]}, "it reads past it", IGNORES),
    "llava": (llava, LINEAR, "leaves out model.(vision_tower|multi_modal_pro)", LEAVES_OUT),
    "gemma2, head": (
        lm("Gemma2", **HEADED), {"target_modules": ["q_proj", "lm_head"]},
        "leaves out lm_head", LEAVES_OUT,
    ),
    "cohere, head": (
        lm("Cohere", **SIZES), {"target_modules": ["lm_head"]}, "fails on lm_head", FAILS
    ),
    "bitnet": (lm("BitNet", **SIZES), LINEAR, "fails on .*_proj", FAILS),
    "falcon-h1": (lm("FalconH1", **HEADED, **HYBRID), LINEAR, "fails on .*in_proj", FAILS),
    "qwen3-next": (
        lm("Qwen3Next", **HEADED, **EXPERTS, **LINEAR_ATTENTION), LINEAR,
        "fails on .*in_proj_qkvz", FAILS,
    ),
    "deepseek, keys": (
        lm("DeepseekV2", **LATENT), {"target_modules": ["kv_b_proj"]}, "without adapters", FAILS
    ),
    "deepseek, queries": (
        lm("DeepseekV2", **LATENT | {"q_lora_rank": None}), {"target_modules": ["q_proj"]},
        "computes .*q_proj without adapters", IGNORES,
    ),
    "gemma3n": (
        lm("Gemma3n", "Gemma3nTextConfig", **GEMMA3N),
        {"target_modules": ["altup_unembed_projections.0", "q_proj"]},
        "fails on .*projections", FAILS,
    ),
    "gpt2": (gpt2, LINEAR, "transposes Conv1D", WRITES_OTHER),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take(name: str, tmp_path: Path) -> None:
    make, options, reason, happens = REFUSED[name]
    base = save(make(), tmp_path / "base")
    model = adapt(make(), r=4, lora_alpha=12, **options)
    verdict = exported(model, tmp_path / "adapter")
    assert not verdict.ok
    with pytest.raises(ValueError, match=reason):
        export(model, tmp_path / "b", engines=["llama.cpp"])
    out = tmp_path / "adapter.gguf"
    assert bool(convert(base, tmp_path / "adapter", out)) == (happens == FAILS)
    if happens == FAILS:
        return
    targets = {target.name for target in model.lora_bank.targets}
    assert (len(deltas(out)) < len(targets)) == (happens == LEAVES_OUT)
    if happens == WRITES_OTHER:
        shapes = {key: weight.shape for key, weight in weights(base).items()}
        assert any(delta.shape != shapes[key] for key, delta in deltas(out).items())


def test_falcon_with_one_key_needs_a_configuration_that_says_so(tmp_path: Path) -> None:
    make = lm("Falcon", multi_query=True)  # transformers then says num_kv_heads=4, for nothing
    base, model = save(make(), tmp_path / "base"), adapt(make(), **LINEAR)
    verdict = exported(model, tmp_path / "adapter")
    assert verdict.ok and "num_kv_heads=1" in verdict.reason
    out = tmp_path / "adapter.gguf"
    assert "invalid for input of size" in convert(base, tmp_path / "adapter", out)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_kv_heads": 1}))
    assert not convert(base, tmp_path / "adapter", out)
    assert len(deltas(out)) == len(model.lora_bank.targets)


@pytest.mark.parametrize("options", [{}, PATTERNS, {"use_rslora": True}])
def test_its_scale_is_alpha_over_the_rank_of_b(options: Options, tmp_path: Path) -> None:
    """Also in PEFT's own files, whose patterns and rslora it does not read."""
    peft = pytest.importorskip("peft")
    base, targets = save(llama(), tmp_path / "base"), ["q_proj", "k_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, **options)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
    assert not convert(base, tmp_path / "adapter", tmp_path / "adapter.gguf")
    file, found = read(tmp_path / "adapter"), tensors(tmp_path / "adapter.gguf")
    assert len(file.modules) == 6
    for name, (_, B) in file.modules.items():
        layer, kind = name.split(".")[2], name.split(".")[-1][0]
        rank = found[f"blk.{layer}.attn_{kind}.weight.lora_b"].shape[-1]
        theirs = alpha(tmp_path / "adapter.gguf") / rank
        assert scale("llama.cpp", file.config, name, B.shape[1]) == theirs


def test_an_embedding_of_its_own_is_taken(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    base = save(model, tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    file = read(tmp_path / "adapter")._replace(base=configuration_of(model))
    assert refusal("llama.cpp", file).ok
    tied = dict(file.base, tie_word_embeddings=True)
    assert "tied" in refusal("llama.cpp", file._replace(base=tied)).reason
    assert not convert(base, tmp_path / "adapter", tmp_path / "adapter.gguf")
    found = tensors(tmp_path / "adapter.gguf")
    assert found["token_embd.weight.lora_a"].shape == (50, 4)
    assert found["token_embd.weight.lora_b"].shape == (32, 4)
