"""What PEFT, vLLM, SGLang and llama.cpp make of a PEFT adapter: what they refuse, how they scale.

Every engine scales B·A by a rule of its own, and some read only part of `adapter_config.json`:

    PEFT 0.21, vLLM 0.33.0 alpha / r, or alpha / sqrt(r) with use_rslora; per module by the patterns
    SGLang 0.5.23          lora_alpha / r for all modules
    llama.cpp              lora_alpha / (rank of B) for all modules

The rules are those of the engines' sources at these versions; llama.cpp's are those of the sources
in llama-cpp-python 0.3.36, and tests/test_llama_cpp.py runs its converter. Whether an engine serves
the base model at all is not looked at.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loradrop.config import first_match
from loradrop.formats.peft_conversion import why_lost
from loradrop.formats.peft_file import PeftFile

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes; 16 by default
_VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_VLLM_LACKS = (
    *("use_dora", "lora_bias", "layer_replication"),
    *("alora_invocation_tokens", "use_bdlora", "use_qalora"),
)
_VLLM_HEADS = ("classifier", "score")  # all of modules_to_save that it takes
_VLLM_EMBEDDINGS = (
    *(".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"),
    *(".lora_embedding_A", ".lora_embedding_B"),
)
_SGLANG_PARTNERS = {"q_proj": ("v_proj",), "k_proj": ("q_proj", "v_proj"), "v_proj": ("q_proj",)}

# What llama.cpp does to some weights: (base models, or all; names; what it does).
_LEFT_OUT, _FAILS = "its converter silently leaves out {}", "its converter fails on {}"
_IGNORED = "it computes {} without adapters"
_LLAMA_CPP: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((), r"((bert|distilbert|roberta)\.)?(cls\.|pooler\.dense\.|vocab_)", _LEFT_OUT),
    (  # what reads pictures and sound, beside a language model
        (),
        r".*(visual\.|(vision|audio)[._]|talker\.|(token|code)2wav\.|projector\.|model\.connector\.)"
        r"|.*patch_(embed|merger\.|merge_mlp\.)|sound_(encoder|projection)\."
        r"|mlp|(vit|vpm|siglip2|conformer|merger|resampler|speech_embeddings)\.",
        _LEFT_OUT,
    ),
    # Heads that it knows only as tied to the embedding.
    (("gemma", "gemma2"), r"lm_head\.", _LEFT_OUT),
    (("cohere", "cohere2"), r"lm_head\.", _FAILS),
    (("modernbert",), r"decoder\.", _FAILS),
    # Its converter computes with these, as it can with a weight and not with two factors.
    (("bitnet",), r".*_proj\.", _FAILS),
    (("falcon_h1",), r".*\.in_proj\.", _FAILS),
    (("qwen3_next",), r".*\.in_proj_qkvz\.", _FAILS),
    ((), r".*altup_(unembed_)?projections\.", _FAILS),
    # Its graphs multiply by these themselves, without looking for an adapter.
    ((), r".*\.((q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa|indexer)\.", _IGNORED),
    ((), r".*\.(modality_router|fc[12]_latent_proj)\.", _IGNORED),
    (("latent attention",), r"(.*\.)?(q_proj|lm_head)\.", _IGNORED),
    (("modernbert",), r"head\.dense\.", _IGNORED),
    ((), r"(.*\.)?(classifier|score)\.", _IGNORED),
)


@dataclass(frozen=True)
class EngineVerdict:
    """What `engine` makes of a file.

    ok      it loads the file and, where compared, computes the native adapter's deltas
    reason  why not; or what it needs
    error   largest max|Δ_file − Δ| / max|Δ| over the targets; None where not compared
    """

    engine: str
    ok: bool
    reason: str = ""
    error: float | None = None


def scale(engine: str, config: Mapping[str, Any], name: str, rank: int) -> float:
    """The factor s that `engine` gives B·A of the module `name`, whose B has that rank."""
    alpha, r = float(config["lora_alpha"]), int(config["r"])
    if engine == "sglang":
        return alpha / r
    if engine == "llama.cpp":
        return alpha / rank if alpha else 1.0  # it takes 0 for an alpha that is not said
    alpha, r = _matching(config.get("alpha_pattern"), name, alpha), _peft_rank(config, name)
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def refusal(engine: str, file: PeftFile) -> EngineVerdict:
    """What `engine` makes of a file when it loads it. Raises ValueError for an unknown engine."""
    if engine not in _REFUSALS:
        raise ValueError(f"engine {engine!r} is unknown: choose among {', '.join(ENGINES)}")
    reason = _REFUSALS[engine](file)
    return EngineVerdict(engine, reason is None, reason or _needs(engine, file))


def required(file: PeftFile, engines: str | Sequence[str] | None) -> tuple[str, ...]:
    """The engines that have to take a file: those named, or PEFT. Raises ValueError for an unknown
    one.
    """
    named = [engines] if isinstance(engines, str) else engines
    return tuple(refusal(engine, file).engine for engine in named or ENGINES[:1])


def _matching(pattern: Mapping[str, Any] | None, name: str, default: float) -> float:
    return float(first_match(pattern or {}, name, default))


def _peft_rank(config: Mapping[str, Any], name: str) -> int:
    return int(_matching(config.get("rank_pattern"), name, config["r"]))


def _peft_refuses(file: PeftFile) -> str | None:
    if str(file.config.get("peft_type")).upper() != "LORA":
        return f"peft_type is {file.config.get('peft_type')!r}, not LORA"
    if file.config.get("use_dora"):
        return "use_dora: DoRA's scale depends on the weights and is not replayed"
    for name, (a, _) in file.modules.items():
        rank = _peft_rank(file.config, name)
        if a.shape[0] != rank:
            return f"{name} has rank {a.shape[0]}, by its configuration it should have {rank}"
    return why_lost(file)


def _vllm_refuses(file: PeftFile) -> str | None:
    saved = file.config.get("modules_to_save") or ()
    for name in file.others:
        if name.endswith(_VLLM_EMBEDDINGS):
            continue
        module, _, part = name.rpartition(".")
        head = module.rpartition(".")[2]
        if head not in _VLLM_HEADS or part not in ("weight", "bias"):
            return f"{name} is not a lora_A or lora_B tensor, nor a classifier's or score's"
        if head not in saved:
            return f"modules_to_save does not name {head}, but {name} is saved"
    for module in saved:
        if module not in _VLLM_HEADS:
            return f"modules_to_save has {module}: only classifier and score are taken"
    lacks = [option for option in _VLLM_LACKS if file.config.get(option)]
    init = file.config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _VLLM_INITS:
        lacks.append(f"init_lora_weights={init!r}")
    if file.config.get("bias", "none") != "none":
        lacks.append(f"bias={file.config['bias']!r}")
    if lacks:
        return f"{', '.join(lacks)} is not supported"
    if file.largest_rank > _VLLM_RANKS[-1]:
        return f"rank {file.largest_rank} is beyond its cap of {_VLLM_RANKS[-1]}"
    return None


def _sglang_refuses(file: PeftFile) -> str | None:
    targets, r = file.config.get("target_modules"), file.config["r"]
    if file.config.get("use_dora"):
        return "use_dora is not supported"
    if isinstance(targets, str) and targets not in ("all-linear", "all"):
        return "target_modules is a regex: it takes a list of module names"
    for name in file.others:
        return f"it silently ignores {name}, and would run the base model's"
    ranks = {name: a.shape[0] for name, (a, _) in file.modules.items()}
    for name, rank in ranks.items():
        if not re.search(r"layers\.\d+\.|embed_tokens|lm_head", name):
            return f"it silently ignores {name}: it reads only names with 'layers.<number>.'"
        if rank != r:
            return f"{name} has rank {rank}, not r={r}: its buffers hold one rank"
        parent, _, kind = name.rpartition(".")
        for partner in _SGLANG_PARTNERS.get(kind, ()):
            if f"{parent}.{partner}" not in ranks:
                return f"{name} lacks its partner {partner}: adapt q_proj and v_proj together"
    return None


def _llama_cpp_refuses(file: PeftFile) -> str | None:
    base = _language_model(file)
    for name in file.others:
        if name.endswith(".base_layer.weight"):
            continue
        if re.search(r"(embed_tokens|wte|word_embeddings|embed_in)\.lora_embedding_[AB]$", name):
            if base.get("tie_word_embeddings") is False:
                continue
            return f"{name} would also go into the head that is tied to the embedding"
        if "_layernorm" in name or ".norm" in name:
            return f"its converter writes {name}, and it reads past it"
        return f"{name} is not a lora_A or lora_B tensor"
    kinds = {base.get("model_type")}
    if base.get("kv_lora_rank") and kinds != {"minicpm3"}:
        kinds.add("latent attention")
    for name in file.modules:
        for models, pattern, reason in _LLAMA_CPP:
            if (not models or kinds & set(models)) and re.match(pattern, f"{name}.weight"):
                return reason.format(name)
    for name, (a, _) in file.modules.items():
        if not math.isclose(*(scale(e, file.config, name, len(a)) for e in ("llama.cpp", "peft"))):
            return f"it scales {name} by lora_alpha / {len(a)}, its rank, and reads no patterns"
    if file.config.get("fan_in_fan_out"):
        return "fan_in_fan_out: its converter transposes Conv1D weights, and the adapter with them"
    return None


def _language_model(file: PeftFile) -> Mapping[str, Any]:
    """The base model's configuration, that of its language model where it has one beside others."""
    return {**file.base, **(file.base.get("text_config") or {})}


def _needs(engine: str, file: PeftFile) -> str:
    """What an engine that takes the file has to be told, empty for nothing."""
    if engine == "vllm" and file.largest_rank > 16:
        return f"needs --max-lora-rank {vllm_rank(file)}"
    base = _language_model(file)
    if engine == "llama.cpp" and base.get("model_type") == "falcon":
        # Its converter splits q, k and v by num_kv_heads, which says nothing with multi_query.
        heads = base["num_attention_heads"]
        width = base["hidden_size"] // heads
        for name, (_, b) in file.modules.items():
            keys = (b.shape[0] // width - heads) // 2
            if name.endswith("query_key_value") and keys != (base.get("num_kv_heads") or 1):
                return f"needs --base, a folder with a config.json that says num_kv_heads={keys}"
    return ""


def vllm_rank(file: PeftFile) -> int:
    """The --max-lora-rank for a file; its last where the file has more, which vLLM refuses."""
    ranks = (rank for rank in _VLLM_RANKS if rank >= file.largest_rank)
    return next(ranks, _VLLM_RANKS[-1])


_REFUSALS: dict[str, Callable[[PeftFile], str | None]] = {
    "peft": _peft_refuses,
    "vllm": _vllm_refuses,
    "sglang": _sglang_refuses,
    "llama.cpp": _llama_cpp_refuses,
}
ENGINES = tuple(_REFUSALS)
