"""The check of an export: equal files pass, every way to differ from the native adapter shows."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import (
    IDS,
    Make,
    Options,
    adapt,
    assert_same,
    bert,
    gpt2,
    llama,
    share,
    snapshot,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loradrop
from loradrop import export, verify
from loradrop.formats.engines import ENGINES, refusal, scale
from loradrop.formats.peft import require_exportable
from loradrop.formats.peft_file import CONFIG, PREFIX, TENSORS, PeftFile

pytestmark = pytest.mark.numbers

BATCHES = [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:], "attention_mask": IDS[1:] > 20}]


def exported(make: Make, path: Path, **options: Any) -> Any:
    model = adapt(make(), **options)
    export(model, path)
    return model


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
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
def test_refusals_are_reported_and_count_where_named(
    make: Make, options: Options, tmp_path: Path, loader: str
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
    model = share(adapt(llama()), [0], how)
    export(model, tmp_path)
    assert verify(model, tmp_path, BATCHES, engines=ENGINES).ok


def peft_saves(path: Path, **options: Any) -> nn.Module:
    """A file that PEFT wrote, and a native model with the same factors under the same options."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, **options}
    model = adapt(llama(), **options)
    saved = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for i, target in enumerate(model.lora_bank.targets):
        layer = saved.base_model.model.get_submodule(target.name)
        A, B = model.lora_bank.factors(i)
        layer.lora_A["default"].weight.data.copy_(A.data)
        layer.lora_B["default"].weight.data.copy_(B.data)
    saved.save_pretrained(path)
    return model


# PEFT's own files say by patterns and rslora what SGLang and llama.cpp do not read.
RANKS, ALPHAS = {"rank_pattern": {"v_proj": 8}}, {"alpha_pattern": {"1.*q_proj": 24}}
THEIRS: list[tuple[Options, list[str]]] = [
    (RANKS | ALPHAS, ["sglang", "llama.cpp"]),
    (RANKS, ["sglang"]),
    ({"use_rslora": True}, ["sglang", "llama.cpp"]),
    ({}, []),
]


@pytest.mark.parametrize(("options", "failing"), THEIRS)
def test_what_peft_writes(options: Options, failing: list[str], tmp_path: Path) -> None:
    model = peft_saves(tmp_path / "theirs", **options)
    report = verify(model, tmp_path / "theirs", BATCHES)
    assert report.relative <= 1e-4  # PEFT itself reads it right
    assert [row.engine for row in report.rows if not row.ok] == failing
    wrong = [row for row in report.rows if row.error > 0.05]
    assert report.ok == (not wrong) and (wrong or "alpha_pattern" not in options)
    assert all(f"{row.engine} " in report.table() for row in wrong)
    assert report.table().count("WRONG") == len(wrong)
    export(model, tmp_path / "ours")  # is right for all
    assert verify(model, tmp_path / "ours", BATCHES, engines=ENGINES).ok


@pytest.mark.parametrize("value", [0.0, float("nan"), None])
def test_a_changed_file_shows(value: float | None, tmp_path: Path, loader: str) -> None:
    model = exported(llama, tmp_path)

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        B = next(t for key, t in tensors.items() if "layers.1.self_attn.v_proj.lora_B" in key)
        B.mul_(1.01) if value is None else B.fill_(value)

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
    exported(llama, tmp_path, target_modules=["q_proj", "v_proj", "k_proj"])
    fewer = adapt(llama(), target_modules=["q_proj", "v_proj"])
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
    before, bank = snapshot(model), model.lora_bank
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    assert verify(model, tmp_path, BATCHES).ok
    assert_same(model, before)
    assert [m.training for m in model.modules()] == modes and model.lora_bank is bank
    assert torch.equal(torch.get_rng_state(), random)


def test_a_reversible_merge_is_compared_with_its_base(tmp_path: Path) -> None:
    model = exported(llama, tmp_path)
    loradrop.merge(model, keep_original=True)
    assert verify(model, tmp_path, BATCHES).ok


class Net(nn.Module):
    """Not a model of transformers: tensors in, a tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


SMALL = {"target_modules": ["lin"], "r": 4}


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_batches_of_any_kind(wrap: Callable[[Tensor], Any], tmp_path: Path, loader: str) -> None:
    model = exported(Net, tmp_path, **SMALL)
    assert verify(model, tmp_path, (wrap(torch.randn(3, 16)) for _ in range(2))).ok


def only_a_pickle(path: Path) -> None:
    (path / TENSORS).unlink()
    torch.save({"x": torch.ones(1)}, path / "adapter_model.bin")


def truncate(path: Path) -> None:
    whole = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(whole[: len(whole) // 2])


def narrow(path: Path) -> None:
    sliced = {k: v[:, :5].contiguous() for k, v in load_file(path / TENSORS).items() if "_A" in k}
    rewrite(path, lambda _, tensors: tensors.update(sliced))


def rank_4(path: Path) -> None:
    rewrite(path, lambda config, _: config.update(r=4))


def of_another(path: Path) -> None:
    exported(Net, path, **SMALL)


GONE, DAMAGED = FileNotFoundError, r"adapter_config\.json is damaged"
DAMAGE: list[tuple[Callable[[Path], Any], type[Exception], str]] = [
    (lambda path: (path / TENSORS).unlink(), GONE, r"adapter_model\.safetensors is not there: "),
    (lambda path: (path / CONFIG).unlink(), GONE, r"adapter_config\.json is not there: PEFT's"),
    (only_a_pickle, ValueError, "is a pickle, which can run any code.*Load it with PEFT"),
    (truncate, ValueError, r"adapter_model\.safetensors is damaged"),
    (lambda path: (path / CONFIG).write_text('{"r": '), ValueError, DAMAGED),
    (narrow, ValueError, r"q_proj is \(32, 5\) .* export of another model"),
    (of_another, ValueError, "adapts lin, which LlamaForCausalLM does not have"),
    (rank_4, ValueError, r"PEFT cannot load .* into LlamaForCausalLM"),
]


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE)
def test_damage_has_a_name(
    damage: Callable[[Path], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    if "PEFT" in message:
        pytest.importorskip("peft")
    model = exported(llama, tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        verify(model, tmp_path, BATCHES)


def test_without_batches_or_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        verify(exported(llama, tmp_path), tmp_path, [])
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


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def laguna() -> Any:
    sizes = {"head_dim": 8, "num_key_value_heads": 2, "shared_expert_intermediate_size": 16}
    return models.build("LagunaForCausalLM", "LagunaConfig", **sizes, **EXPERTS, **models.LM)


@pytest.mark.parametrize(
    ("make", "targets", "reason"),
    [
        (models.deepseek, "all-linear", "takes model.layers.0.mlp.gate_proj for a parameter of"),
        (models.deepseek, ["shared_experts.down_proj"], "takes .*shared_experts.down_proj for a"),
        (models.deepseek, ["q_b_proj", "up_proj"], "without also targeting gate_proj"),
        (laguna, ["shared_experts.down_proj"], "for model.layers.1.mlp.shared.*under another name"),
    ],
)
def test_what_peft_would_leave_out_is_refused(
    make: Make, targets: Any, reason: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    model = adapt(make(), r=2, target_modules=targets)
    with pytest.raises(ValueError, match=rf"peft cannot take .*{reason}.*format='merged'"):
        export(model, tmp_path)
    with pytest.raises(ValueError, match=rf"{reason}.*, or merge it$"):
        require_exportable(model, "merge it")
    assert not list(tmp_path.iterdir())
    verdicts = export(model, tmp_path, engines=["vllm"])  # which reads it without PEFT
    assert re.search(reason, verdicts[0].reason) and not verdicts[0].ok and verdicts[1].ok
    report = verify(model, tmp_path, BATCHES, engines=["vllm"])
    assert report.ok and report.loader == "replay" and not report.rows[0].ok


def test_peft_takes_the_attention_beside_experts(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = adapt(models.deepseek(), r=2, target_modules=["q_b_proj", "o_proj"])
    assert export(model, tmp_path)[0].ok
    report = verify(model, tmp_path, BATCHES)
    assert report.ok and report.loader == "peft"


def rename(*kinds: str) -> tuple[str, ...]:
    return tuple(f"model.layers.0.self_attn.{kind}" for kind in kinds)


@pytest.mark.parametrize(
    ("engine", "file", "reason"),
    [
        ("peft", lora_file(peft_type="IA3"), "peft_type is 'IA3'"),
        ("peft", lora_file(use_dora=True), "use_dora"),
        ("peft", lora_file(rank_pattern={"q_proj": 4}), "q_proj has rank 8.*should have 4"),
        ("vllm", lora_file(extra="score.weight"), "modules_to_save does not name score"),
        ("vllm", lora_file(extra="classifier.dense.bias", modules_to_save=["classifier"]), "dense"),
        ("vllm", lora_file(extra="qa_outputs.weight"), "qa_outputs.weight is not a lora_A"),
        ("vllm", lora_file(extra="x.base_layer.weight"), "x.base_layer.weight is not a lora_A"),
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
        ("sglang", lora_file(("transformer.h.0.attn.c_attn",)), "silently ignores transformer.h"),
        ("sglang", lora_file(rank=4), "q_proj has rank 4, not r=8"),
        ("sglang", lora_file(rename("q_proj")), "q_proj lacks its partner v_proj"),
        ("sglang", lora_file(rename("v_proj")), "v_proj lacks its partner q_proj"),
        ("sglang", lora_file(rename("k_proj", "v_proj")), "k_proj lacks its partner q_proj"),
        ("llama.cpp", lora_file(extra="classifier.weight"), "classifier.weight is not a lora_A"),
        ("llama.cpp", lora_file(extra="model.norm.weight"), "norm.weight, and it reads past it"),
        ("llama.cpp", lora_file(extra="wpe.lora_embedding_A"), "wpe.lora_embedding_A is not"),
        ("llama.cpp", lora_file(fan_in_fan_out=True), "Conv1D"),
        ("llama.cpp", lora_file(("cls.predictions.transform.dense",)), "leaves out cls.pred"),
        ("llama.cpp", lora_file(("bert.pooler.dense",)), "leaves out bert.pooler.dense"),
        ("llama.cpp", lora_file(("vocab_transform",)), "leaves out vocab_transform"),
    ],
)
def test_refusals(engine: str, file: PeftFile, reason: str) -> None:
    verdict = refusal(engine, file)
    assert not verdict.ok
    assert re.search(reason, verdict.reason), verdict.reason


@pytest.mark.parametrize("name", ["classifier.weight", "classifier.bias", "model.score.weight"])
def test_vllm_takes_a_plain_head(name: str) -> None:
    head = name.split(".")[-2]
    assert refusal("vllm", lora_file(extra=name, modules_to_save=[head])).ok


@pytest.mark.parametrize(
    ("name", "base", "reason"),
    [
        ("model.vision_tower.encoder.layers.0.fc1", {}, "leaves out model.vision_tower"),
        ("model.visual.blocks.0.attn.qkv", {}, "leaves out model.visual"),
        ("audio_tower.layers.0.fc1", {}, "leaves out audio_tower"),
        ("model.multi_modal_projector", {}, "leaves out model.multi_modal_projector"),
        ("model.language_model.layers.0.mlp.up_proj", {}, None),
        ("lm_head", {"model_type": "gemma2"}, "leaves out lm_head"),
        ("lm_head", {"model_type": "cohere"}, "fails on lm_head"),
        ("lm_head", {"model_type": "llama"}, None),
        ("decoder", {"model_type": "modernbert"}, "fails on decoder"),
        ("head.dense", {"model_type": "modernbert"}, "computes head.dense without adapters"),
        ("classifier.dense", {"model_type": "roberta"}, "computes classifier.dense without"),
        ("model.layers.0.mlp.up_proj", {"model_type": "bitnet"}, "fails on model.layers.0.mlp"),
        ("model.layers.0.mamba.in_proj", {"model_type": "falcon_h1"}, "fails on .*in_proj"),
        ("model.layers.0.mamba.in_proj", {"model_type": "jamba"}, None),
        ("model.layers.0.linear_attn.in_proj_qkvz", {"model_type": "qwen3_next"}, "fails on"),
        ("model.layers.0.linear_attn.in_proj_ba", {"model_type": "qwen3_next"}, None),
        ("model.layers.0.self_attn.kv_b_proj", {}, "kv_b_proj without adapters"),
        ("model.altup_projections.0", {}, "fails on model.altup_projections.0"),
        ("model.layers.0.altup.modality_router", {}, "modality_router without adapters"),
        ("model.layers.0.self_attn.indexer.wk", {}, "indexer.wk without adapters"),
        ("model.layers.0.mixer.fc1_latent_proj", {}, "fc1_latent_proj without adapters"),
        ("model.layers.0.self_attn.q_proj", {"kv_lora_rank": 8}, "q_proj without adapters"),
        ("model.layers.0.self_attn.q_proj", {"text_config": {"kv_lora_rank": 8}}, "without"),
        ("model.layers.0.self_attn.o_proj", {"kv_lora_rank": 8}, None),
        ("lm_head", {"kv_lora_rank": 8, "model_type": "deepseek_v3"}, "lm_head without adapters"),
        ("lm_head", {"kv_lora_rank": 8, "model_type": "minicpm3"}, None),
    ],
)
def test_what_llama_cpp_does_to_a_weight(
    name: str, base: dict[str, Any], reason: str | None
) -> None:
    verdict = refusal("llama.cpp", lora_file((name,))._replace(base=base))
    assert verdict.ok == (reason is None)
    assert re.search(reason or "^$", verdict.reason), verdict.reason


@pytest.mark.parametrize(
    ("keys", "says", "needs"),
    [
        (1, 4, "num_kv_heads=1"),  # multi_query: transformers says the default, and reads it not
        (1, None, ""),
        (1, 1, ""),
        (4, 4, ""),
        (4, None, "num_kv_heads=4"),  # what falcon-rw's own configuration is silent about
        (2, 2, ""),
    ],
)
def test_falcon_has_to_tell_llama_cpp_its_key_heads(
    keys: int, says: int | None, needs: str
) -> None:
    fused = f"{PREFIX}transformer.h.0.self_attention.query_key_value"
    tensors = {f"{fused}.lora_A.weight": torch.ones(8, 32)}
    tensors[f"{fused}.lora_B.weight"] = torch.ones((4 + 2 * keys) * 8, 8)
    base = {"model_type": "falcon", "num_attention_heads": 4, "hidden_size": 32}
    file = lora_file()._replace(tensors=tensors, base=base | {"num_kv_heads": says})
    verdict = refusal("llama.cpp", file)
    assert verdict.ok and verdict.reason.endswith(needs) and bool(verdict.reason) == bool(needs)
    assert refusal("llama.cpp", file._replace(base={"model_type": "bloom"})).reason == ""


@pytest.mark.parametrize("tied", [False, True, None])
def test_llama_cpp_takes_the_adapter_of_an_untied_embedding(tied: bool | None) -> None:
    file = lora_file(extra="model.embed_tokens.lora_embedding_A")
    verdict = refusal("llama.cpp", file._replace(base={"tie_word_embeddings": tied}))
    assert verdict.ok == (tied is False) and ("tied" in verdict.reason) == (tied is not False)


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
    assert scale("llama.cpp", {"r": 16, "lora_alpha": 0}, v, 4) == 1


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_an_adapter_that_changes_nothing_is_told(
    scale: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapt(llama(), r=2, target_modules=["q_proj"])
    with torch.no_grad():
        for B in model.lora_bank.B:
            B.mul_(scale)
    export(model, tmp_path)
    assert verify(model, tmp_path, [{"input_ids": IDS}]).ok
    assert ("changes no logit of the first batch" in caplog.text) == (scale == 0.0)


def test_where_engines_are_named_only_they_count(tmp_path: Path) -> None:
    """A file with several ranks: llama.cpp, which nobody asked, computes something else from it."""
    ranks = {"r": 8, "rank_pattern": {"v_proj": 4}, "target_modules": ["q_proj", "v_proj"]}
    model = adapt(llama(), **ranks)
    export(model, tmp_path, padded=False, engines=["vllm"])
    taken = {
        named: verify(model, tmp_path, BATCHES, engines=named and named.split()).ok
        for named in (None, "vllm", "peft vllm", "llama.cpp", "vllm llama.cpp", "sglang")
    }
    assert taken == dict.fromkeys(taken, False) | {"vllm": True, "peft vllm": True}
    assert "WRONG" in verify(model, tmp_path, BATCHES, engines="vllm").table()
    rewrite(tmp_path, lambda config, _: config.update(lora_alpha=3, alpha_pattern={}))
    assert not verify(model, tmp_path, BATCHES, engines=["vllm"]).ok


@pytest.mark.parametrize("head", [False, True])
def test_a_base_that_is_offloaded(head: bool, tmp_path: Path) -> None:
    """PEFT makes adapters on the meta device there, and its logits would be the base's."""
    accelerate = pytest.importorskip("accelerate")
    whole = {"modules_to_save": ["lm_head"]} if head else {}
    exported(llama, tmp_path, target_modules=["q_proj"], **whole)
    model = llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    adapt(model, target_modules=["q_proj"])
    if head:
        with pytest.raises(ValueError, match=r"lm_head\.weight is offloaded.*remove_hook"):
            verify(model, tmp_path, BATCHES)
        return
    report = verify(model, tmp_path, BATCHES)
    assert report.ok and report.loader == "replay"
    rewrite(tmp_path, lambda _, tensors: [t.mul_(1.1) for t in tensors.values()])
    assert verify(model, tmp_path, BATCHES).relative > 0.01


def test_one_engine_as_a_string_and_one_name_for_a_reason(tmp_path: Path) -> None:
    """What stands in the way is named alike before the file is written and after."""
    model = adapt(bert())
    verdicts = export(model, tmp_path, engines="vllm")
    report = verify(model, tmp_path, BATCHES, engines="vllm")
    assert report.required == ("vllm",) and report.ok
    assert [v.reason for v in verdicts] == [row.reason for row in report.rows]
    assert any("classifier" in v.reason for v in verdicts if not v.ok)
    with pytest.raises(ValueError, match="engine 'vlm' is unknown"):
        export(model, tmp_path, engines="vlm")
