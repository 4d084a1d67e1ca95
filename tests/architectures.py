"""Tiny models of many families, and what loradrop does with each, as docs/architectures.md has it.

python tests/architectures.py      writes it; tests/test_architectures.py compares it
"""

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import loradrop

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
ATTENTION = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = ATTENTION | {"intermediate_size": 48}
GROUPED = WIDE | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADED = GROUPED | {"head_dim": 8}
SEQ2SEQ = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
WAVES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "mask_time_prob": 0.0,
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "classifier_proj_size": 16,
    "num_conv_pos_embedding_groups": 2, "layerdrop": 0.5,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 16}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
LATENT = GROUPED | ROUTED | {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
IMAGES = {"image_size": 32, "patch_size": 8}
TWO = {
    "text_config": WIDE | {"max_position_embeddings": 16, "eos_token_id": 2},
    "vision_config": {k: v for k, v in WIDE.items() if k != "vocab_size"} | IMAGES,
}

# The model's class, its configuration's class where the name does not say it, and sizes.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", GROUPED | SHARED),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", HEADED),
    "Qwen3-Next": (
        "Qwen3NextForCausalLM", "Qwen3NextConfig",
        HEADED | SHARED | {
            "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "GLM-4-MoE": (
        "Glm4MoeForCausalLM", "Glm4MoeConfig",
        HEADED | ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", HEADED),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", HEADED),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", HEADED),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", ATTENTION | {"n_positions": 32}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", WIDE),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", ATTENTION | {"rotary_dim": 4, "n_positions": 32}),
    "BLOOM": ("BloomForCausalLM", "BloomConfig", ATTENTION),
    "Falcon": ("FalconForCausalLM", "FalconConfig", ATTENTION),
    "OPT": (
        "OPTForCausalLM", "OPTConfig",
        ATTENTION | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    ),
    "Mamba": ("MambaForCausalLM", "MambaConfig", ATTENTION | {"state_size": 4}),
    "Llama, classes": ("LlamaForSequenceClassification", "LlamaConfig", GROUPED),
    "BERT": ("BertForSequenceClassification", "BertConfig", WIDE),
    "BERT, words": ("BertForMaskedLM", "BertConfig", WIDE),
    "BERT, answers": ("BertForQuestionAnswering", "BertConfig", WIDE),
    "BERT, tags": ("BertForTokenClassification", "BertConfig", WIDE),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", WIDE | {"pad_token_id": 0}),
    "ELECTRA": ("ElectraForSequenceClassification", "ElectraConfig", WIDE),
    "ALBERT": ("AlbertForSequenceClassification", "AlbertConfig", WIDE | {"embedding_size": 16}),
    "DistilBERT": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "DeBERTa-v2": (
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        WIDE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "ModernBERT": (
        "ModernBertForSequenceClassification", "ModernBertConfig",
        WIDE | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "T5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
    ),
    "BART": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "Whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        SEQ2SEQ | {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 20},
    ),
    "Wav2Vec2": ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", WAVES),
    "ViT": ("ViTForImageClassification", "ViTConfig", TWO["vision_config"]),
    "CLIP": ("CLIPModel", "CLIPConfig", TWO),
}  # fmt: skip
STEPS = ("train, probe, share", "save and load", "merge", "remove", "PEFT")


def made(family: str) -> Any:
    torch.manual_seed(0)
    cls, config, sizes = FAMILIES[family]
    model = getattr(transformers, cls)(getattr(transformers, config)(**copy.deepcopy(sizes)))
    if hasattr(model.config, "pad_token_id"):
        model.config.pad_token_id = model.config.pad_token_id or 0
    return model.eval()


def batch_of(model: Any) -> dict[str, Tensor]:
    """Two rows of seven tokens, the second one padded, and labels where it learns by them."""
    torch.manual_seed(1)
    name, kind = type(model).__name__, model.main_input_name
    ids = torch.randint(3, 60, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    if kind == "pixel_values":
        batch = {kind: torch.randn(2, 3, 32, 32)}
    elif kind == "input_features":
        batch = {kind: torch.randn(2, 16, 40)}
    elif kind == "input_values":
        batch = {kind: torch.randn(2, 1600)}
    else:
        batch = {"input_ids": ids, "attention_mask": mask}
    if name == "CLIPModel":
        return batch | {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name.endswith("QuestionAnswering"):
        return batch | {
            "start_positions": torch.tensor([1, 2]),
            "end_positions": torch.tensor([3, 4]),
        }
    if name.endswith(("SequenceClassification", "ImageClassification")):
        return batch | {"labels": torch.tensor([0, 1])}
    return batch | {"labels": ids % 2 if name.endswith("TokenClassification") else ids}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model.eval()(**batch)
    names = ("logits", "logits_per_text", "start_logits")
    found: Tensor = next(output[name] for name in names if name in output)
    return found


def close(one: Tensor, other: Tensor, within: float = 1e-5) -> None:
    gap = float((one - other).abs().max()) / (float(one.std()) or 1.0)
    assert gap < within, f"logits differ by {gap:.1e} of their deviation"


def answers(family: str) -> dict[str, str]:
    """Step -> "ok", or the first words of the refusal. Raises AssertionError for a wrong result."""
    model = made(family)
    batch = batch_of(model)
    base, config = logits(model, batch), loradrop.LoRAConfig(r=4, target_modules="all-linear")
    bank = loradrop.inject(model, config)
    close(logits(model, batch), base)

    def train() -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.05)
        for _ in range(3):
            output = model.train()(**batch)
            loss = output.loss if getattr(output, "loss", None) is not None else None
            (output.logits_per_text.square().mean() if loss is None else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        scores = loradrop.probe(model, [batch])
        kept = loradrop.select(scores, keep=1)
        loradrop.share(model, kept, init="mean", after_select="continue")
        assert float((logits(model, batch) - base).abs().max()) > 1e-3 * float(base.std())
        assert bank.assignment.decided

    def save_and_load(folder: Path) -> None:
        fresh = made(family)
        loradrop.save(model, folder)
        loradrop.load(fresh, folder)
        close(logits(fresh, batch), logits(model, batch))

    def merge() -> None:
        twin = copy.deepcopy(model)
        loradrop.merge(twin)
        close(logits(model, batch), logits(twin, batch), 1e-3)

    def remove() -> None:
        twin = copy.deepcopy(model)
        loradrop.remove(twin)
        close(logits(twin, batch), base)

    def peft(folder: Path) -> None:
        loradrop.export(model, folder)
        report = loradrop.verify(model, folder, [batch])
        assert report.loader == "peft" and report.relative <= report.tolerance, report.table()

    with tempfile.TemporaryDirectory() as scratch:
        found = {"": str(len(bank.targets))}
        runs: list[Callable[[], None]] = [
            train, lambda: save_and_load(Path(scratch) / "native"), merge, remove,
            lambda: peft(Path(scratch) / "peft"),
        ]  # fmt: skip
        for step, run in zip(STEPS, runs, strict=True):
            try:
                run()
                found[step] = "ok"
            except ValueError as error:  # a refusal
                found[step] = str(error).partition(":")[0]
    return found


def row(family: str) -> str:
    found = answers(family)
    return f"| {family} | {FAMILIES[family][0]} | " + " | ".join(found.values()) + " |"


HEAD = f"""# Architectures

What loradrop does with tiny random models of many families of transformers: all linear layers
adapted, three steps of training, a probe with the model's own mask, all targets but one sharing.
"ok" is equality within rounding: of the logits after `load`, of the merged model, of the base model
after `remove`, and of what PEFT makes of the export. Anything else is the refusal's own words.

Made by `python tests/architectures.py`; `make test` compares every row.

| family | class | targets | {" | ".join(STEPS)} |
| --- | --- | ---: |{" --- |" * len(STEPS)}
"""

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(HEAD + "\n".join(map(row, FAMILIES)) + "\n", encoding="utf-8")
    sys.stdout.write(PAGE.read_text(encoding="utf-8"))
