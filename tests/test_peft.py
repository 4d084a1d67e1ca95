"""Exports in PEFT's format: it reads them to the same logits, and the adapted model stays."""

import copy
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
    fill,
    llama,
    outputs,
    share,
    snapshot,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loradrop
from loradrop import export
from loradrop.formats.peft_file import CONFIG, PREFIX, TENSORS, read
from loradrop.methods import Method
from loradrop.pairs import LoRABank

pytestmark = pytest.mark.numbers

RIGHT = {"rtol": 1e-5, "atol": 1e-5}  # of float64 sums over factors that float32 rounded


class Plain(nn.Module):
    """Not a model of transformers: `lin` is also the end of the name `sub.lin`."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.lin, self.sub = nn.Linear(size, size), nn.Sequential()
        self.sub.add_module("lin", nn.Linear(size, size))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = nn.functional.one_hot(input_ids % 16, 16).to(self.lin.weight)
        return {"y": self.sub(torch.tanh(self.lin(x)))}


def reload(model: nn.Module, path: Path, **options: Any) -> nn.Module:
    """Export, and a fresh base model with the file in it: its outputs are those of the model."""
    peft, base = pytest.importorskip("peft"), copy.deepcopy(model)
    export(model, path, **options)
    loradrop.remove(base)
    found = peft.PeftModel.from_pretrained(base, str(path)).eval()
    torch.testing.assert_close(outputs(found), outputs(model), **RIGHT)
    return found


def test_parts_of_a_head_that_peft_saves_whole(tmp_path: Path) -> None:
    """As `loradrop train` names them, where a checkpoint has no head; PEFT would wrap both."""
    parts = ["classifier.dense", "classifier.out_proj"]
    reload(adapt(models.roberta(), modules_to_save=parts), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] is None


def test_a_head_around_one_that_peft_saves_whole(tmp_path: Path) -> None:
    """BigBird's `qa_classifier` has `qa_outputs` in it, which the task would wrap again."""
    sizes = {"intermediate_size": 48, "max_position_embeddings": 32}
    sizes["attention_type"] = "original_full"
    model = adapt(models.build("BigBirdForQuestionAnswering", "BigBirdConfig", **sizes), r=2)
    export(model, tmp_path)
    told = json.loads((tmp_path / CONFIG).read_text())
    assert (told["task_type"], told["modules_to_save"]) == (None, ["qa_classifier"])
    report = loradrop.verify(model, tmp_path, [{"input_ids": IDS}])
    assert report.ok, report.table()


@pytest.mark.parametrize("make", [bert, llama, models.gpt2], ids=["bert", "llama", "gpt2"])
def test_each_target_at_its_own_rank(make: Make, tmp_path: Path) -> None:
    """Of an adapter that was cut: smaller than padded, and just the targets that have any."""
    model = adapt(make(), target_modules="all-linear", r=6, lora_alpha=9)
    names = [target.name for target in model.lora_bank.targets]
    ranks = {name: (1, 0, 6, 3)[i % 4] for i, name in enumerate(names)}
    loradrop.truncate(model, ranks, metric="weight")
    reload(model, tmp_path / "padded")
    reload(model, tmp_path / "own", padded=False)
    verdicts = {v.engine: v for v in export(model, tmp_path / "own", padded=False)}
    assert verdicts["peft"].ok and not verdicts["sglang"].ok
    if make is llama:
        assert verdicts["vllm"].ok and "lora_alpha / 1, its rank" in verdicts["llama.cpp"].reason
    small, large = (read(tmp_path / name) for name in ("own", "padded"))
    assert {name: len(A) for name, (A, _) in small.modules.items()} == {
        name: rank for name, rank in ranks.items() if rank
    }
    assert {len(A) for A, _ in large.modules.values()} == {8}
    again = adapt(make(), target_modules="all-linear")
    loradrop.truncate(again, dict.fromkeys(names, 0), metric="weight")
    with pytest.raises(ValueError, match="no target has an adapter"):
        export(again, tmp_path / "none", padded=False)
    with pytest.raises(ValueError, match="padded are of the PEFT format"):
        export(again, tmp_path / "none", "merged", padded=False)


def test_own_ranks_where_one_name_ends_another(tmp_path: Path) -> None:
    """PEFT would take the rank of `lin` for `sub.lin` too; ours reads the file back, cuts it and
    writes it again.
    """
    ranks = {"rank_pattern": {"sub.lin": 2}, "alpha_pattern": {"sub.lin": 3}}
    model = adapt(Plain(), target_modules=["lin"], r=4, **ranks)
    reload(model, tmp_path / "one", padded=False)
    pattern = json.loads((tmp_path / "one" / CONFIG).read_text())["rank_pattern"]
    assert pattern == {"^lin": 4, "sub.lin": 2}
    again = copy.deepcopy(model)
    loradrop.remove(again)
    loradrop.load(again, tmp_path / "one")
    torch.testing.assert_close(outputs(again), outputs(model), **RIGHT)
    loradrop.truncate(again, {"lin": 1, "sub.lin": 2}, metric="weight")
    reload(again, tmp_path / "two", padded=False)
    assert {n: len(A) for n, (A, _) in read(tmp_path / "two").modules.items()} == {
        "lin": 1, "sub.lin": 2,
    }  # fmt: skip


PATTERNS = {"rank_pattern": {"value": 11}, "alpha_pattern": {"1.*query": 3, "value": 7}}


@pytest.mark.parametrize(
    ("make", "options", "task"),
    [
        (bert, {}, "SEQ_CLS"),
        (bert, {"target_modules": "all-linear", "r": 20, "lora_alpha": 50}, "SEQ_CLS"),
        (bert, {"r": 4, **PATTERNS}, "SEQ_CLS"),
        (bert, {"use_rslora": True, "r": 3, "rank_pattern": {"query": 9}}, "SEQ_CLS"),
        (bert, {"modules_to_save": []}, "SEQ_CLS"),
        (bert, {"modules_to_save": ["bert.pooler", "classifier"]}, "SEQ_CLS"),
        (lambda: bert(cls="ForTokenClassification"), {}, "TOKEN_CLS"),
        (lambda: bert(cls="ForQuestionAnswering"), {}, "QUESTION_ANS"),
        (lambda: bert(cls="Model"), {}, "FEATURE_EXTRACTION"),
        (lambda: bert(cls="ForMaskedLM"), {}, None),
        (models.roberta, {}, "SEQ_CLS"),  # a head of two layers
        (models.distilbert, {}, "SEQ_CLS"),  # PEFT saves pre_classifier as it ends in classifier
        # a task that would save a target whole is left out
        (models.distilbert, {"target_modules": ["pre_classifier"], "modules_to_save": []}, None),
        (llama, {"target_modules": "all-linear"}, "CAUSAL_LM"),
        (lambda: llama("ForSequenceClassification"), {}, "SEQ_CLS"),
        (models.gpt2, {"target_modules": ["c_attn", "c_fc"]}, "CAUSAL_LM"),
        (models.distilbert, {"target_modules": "all-linear"}, "SEQ_CLS"),
    ],
)
def test_stock_peft_reads_it_to_the_same_logits(
    make: Make, options: Options, task: str | None, tmp_path: Path
) -> None:
    model = adapt(make(), **options)
    with loradrop.disabled(model):
        base = outputs(model)
    assert (outputs(model) - base).abs().max() > 1e-2  # the adapters say something
    reload(model, tmp_path)
    assert read(tmp_path).config["task_type"] == task


@pytest.mark.parametrize("how", ["group", "none"])
def test_shared_and_dropped_adapters_are_written_out(how: str, tmp_path: Path) -> None:
    model = share(adapt(bert(), r=4, lora_alpha=12), [1, 4], how)
    reload(model, tmp_path)
    bank, modules = model.lora_bank, read(tmp_path).modules
    assert list(modules) == [target.name for target in bank.targets]
    for i, (A, B) in enumerate(modules.values()):
        delta = bank.delta(i)
        if how == "none" and i not in (1, 4):
            assert delta is None and not A.any() and not B.any()
        else:
            torch.testing.assert_close(B @ A, delta, rtol=1e-5, atol=1e-6)
            assert B.any()


def test_an_adapter_that_the_disk_changed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetting(tensors: dict[str, Tensor], *args: Any) -> None:
        save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, *args)

    monkeypatch.setattr("loradrop.tensor_file.save_file", forgetting)
    with pytest.raises(OSError, match="does not hold what was written into it"):
        export(adapt(bert()), tmp_path)
    with pytest.raises(OSError, match="does not hold what was written into it"):
        loradrop.save(adapt(bert()), tmp_path / "native")
    assert not list((tmp_path / "native").iterdir())


def test_auto_peft_model(tmp_path: Path) -> None:
    peft, model = pytest.importorskip("peft"), bert()
    model.save_pretrained(tmp_path / "base")
    export(adapt(model), tmp_path / "adapter", base_id=str(tmp_path / "base"))
    found = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(found), outputs(model), **RIGHT)


@pytest.mark.parametrize(("r", "uniform"), [(1, 8), (8, 8), (9, 16), (32, 32)])
def test_the_file_is_uniform_and_minimal(r: int, uniform: int, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "v_proj"], "r": r, "lora_alpha": 5}
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    model = adapt(llama(), **options, **patterns)
    export(model, tmp_path, base_id="someone/a-llama")
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True},
        "base_model_name_or_path": "someone/a-llama",
        **{"r": uniform, "lora_alpha": uniform, "lora_dropout": 0.0, "init_lora_weights": True},
        **{"target_modules": ["q_proj", "v_proj"], "modules_to_save": None},
        **{"bias": "none", "fan_in_fan_out": False},
    }
    tensors, bank = load_file(tmp_path / TENSORS), model.lora_bank
    assert len(tensors) == 2 * len(bank.targets)
    for i, target in enumerate(bank.targets):
        A, B = (tensors[f"{PREFIX}{target.name}.lora_{side}.weight"] for side in "AB")
        assert A.shape == (uniform, target.in_features)
        assert B.shape == (target.out_features, uniform)
        assert not A[target.r :].any() and not B[:, target.r :].any()
        assert torch.equal(A[: target.r], bank.factors(i)[0])
        torch.testing.assert_close(B[:, : target.r], bank.scaling[i] * bank.factors(i)[1])


@pytest.mark.parametrize(("name", "bound"), [("bfloat16", 3e-2), ("float16", 4e-3)])
def test_narrow_dtype_rounds_the_folded_factors_once(
    name: str, bound: float, tmp_path: Path
) -> None:
    model, dtype = adapt(llama(), lora_alpha=3), getattr(torch, name)
    export(model, tmp_path, dtype=name)
    bank = model.lora_bank
    for i, (A, B) in enumerate(read(tmp_path).modules.values()):
        a, b = bank.factors(i)
        assert torch.equal(A, a.to(dtype)) and torch.equal(B, (bank.scaling[i] * b).to(dtype))
        delta = bank.delta(i)
        assert (B.float() @ A.float() - delta).abs().max() <= bound * delta.abs().max()


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_values_that_the_file_cannot_hold_are_refused(value: float, tmp_path: Path) -> None:
    model = adapt(llama())
    model.lora_bank.B[1].data[0, 0] = value
    name = model.lora_bank.targets[1].name
    refused(f"B of {name}.*not finite.*float16", model, tmp_path, dtype="float16")


@dataclass(frozen=True, kw_only=True)
class Composed(Method):
    """A method whose factors are not Parameters, and of another rank than its targets say."""

    name: ClassVar[str] = "composed"

    def bank(self, *given: Any) -> LoRABank:
        return ComposedBank(*given)


class ComposedBank(LoRABank):
    def factors(self, i: int) -> tuple[Tensor, Tensor]:
        A, B = super().factors(i)
        return torch.cat([A, 2 * A, A.sin()]), torch.cat([B, B.cos(), 3 * B], 1)


def test_a_method_that_composes_its_factors(tmp_path: Path) -> None:
    reload(adapt(bert(), r=4, lora_alpha=2, method=Composed()), tmp_path)
    assert read(tmp_path).config["r"] == 16


def test_a_part_of_the_layers_is_named_in_full(tmp_path: Path) -> None:
    targets = ["0.attention.self.query", "1.output.dense"]
    model = adapt(bert(), target_modules=targets, strict=False)
    found = reload(model, tmp_path)
    names = [target.name for target in model.lora_bank.targets]
    assert read(tmp_path).config["target_modules"] == names
    assert found.base_model.targeted_module_names == names


def test_names_that_end_another_name_become_a_regex(tmp_path: Path) -> None:
    model = adapt(Plain(), target_modules="lin", r=4)
    verdicts = {verdict.engine: verdict for verdict in export(model, tmp_path)}
    config = read(tmp_path).config
    assert config["target_modules"] == "(lin)" and config["task_type"] is None
    assert "regex" in verdicts["sglang"].reason
    assert reload(model, tmp_path).base_model.targeted_module_names == ["lin"]


def refused(message: str, model: nn.Module, path: Path, *args: Any, **options: Any) -> None:
    """By a ValueError, and nothing is written."""
    with pytest.raises(ValueError, match=message):
        export(model, path, *args, **options)
    assert not list(path.iterdir())


def twice() -> nn.Module:
    model = Plain()
    model.twin = model.lin
    return adapt(model, target_modules="lin", r=4)


def two_of_one_weight() -> nn.Module:
    model = adapt(llama())
    one, two = model.model.layers
    two.self_attn.q_proj.weight = one.self_attn.q_proj.weight
    return model


def saved_whole() -> nn.Module:
    options = {"target_modules": ["pre_classifier"], "modules_to_save": ["classifier"]}
    return adapt(models.distilbert(), **options)


def tied() -> nn.Module:
    return adapt(llama(tie_word_embeddings=True), modules_to_save=["lm_head"])


def with_biases() -> nn.Module:
    model = adapt(bert())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("bias"))
    return model


def lm() -> nn.Module:
    return adapt(llama())


MERGED = {"format": "merged"}
REFUSED: list[tuple[Make, Options, str]] = [
    (saved_whole, {}, r"peft.*saves whole.*classifier.*pre_classifier"),
    (with_biases, {}, r"query\.bias is trained too.* all of .*query alone.*format='merged'"),
    (lambda: loradrop.LoRALinear(16, 16), {}, "LoRALinear: it is the model itself"),
    (twice, {}, "lin: it has several names"),
    (tied, {}, r"lm_head.weight apart from model.embed_tokens"),
    (llama, {}, r"no loradrop adapters: call loradrop\.inject"),
    (lambda: adapt(Plain(), target_modules=["lin"]), MERGED, "Plain has no save_pretrained"),
    (two_of_one_weight, MERGED, r"q_proj is tied .*layers\.1\.self_attn\.q_proj"),
    (lm, {"format": "gguf"}, "format='gguf': choose one of peft, merged"),
    (lm, {"dtype": "int8"}, "dtype='int8': choose one of float32, bfloat16, float16"),
    (lm, {"engines": ["ollama"]}, "engine 'ollama' is unknown: choose among peft, vllm"),
    (lm, {**MERGED, "dtype": "float16"}, "of the PEFT format"),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_what_is_refused(make: Make, options: Options, message: str, tmp_path: Path) -> None:
    refused(message, make(), tmp_path, **options)


class TestEngines:
    def test_a_language_model_suits_all(self, tmp_path: Path) -> None:
        engines = ["peft", "vllm", "sglang", "llama.cpp"]
        verdicts = export(adapt(llama()), tmp_path, engines=engines)
        assert [verdict.engine for verdict in verdicts] == engines
        assert all(verdict.ok and not verdict.reason for verdict in verdicts)

    @pytest.mark.parametrize("engine", ["sglang", "llama.cpp"])
    def test_a_named_engine_that_refuses(self, engine: str, tmp_path: Path) -> None:
        message = rf"{engine} cannot take.*classifier\.weight"
        refused(message, adapt(bert()), tmp_path, engines=[engine])

    def test_one_that_was_not_named_is_reported(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "loradrop"):
            verdicts = export(adapt(bert()), tmp_path)
        assert [verdict.ok for verdict in verdicts] == [True, True, False, False]
        assert [v.engine in caplog.text for v in verdicts[2:]] == [True] * 2
        assert "refuses it: classifier" in (tmp_path / "README.md").read_text()


def test_model_card(tmp_path: Path) -> None:
    model = share(adapt(bert()), [0])
    export(model, tmp_path, base_id="someone/a-bert")
    card = (tmp_path / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert front.splitlines() == [
        'base_model: "someone/a-bert"',
        *("library_name: peft", "tags:", "- lora", "- loradrop"),
        '- "base_model:adapter:someone/a-bert"',
    ]
    for part in (
        "of 6 adapted layers 1 keep an adapter of their own, 5 share 2, and 0 have none",
        "| query | 1 | 2 | 0 |\n| value | 0 | 3 | 0 |",
        f"Own: {model.lora_bank.targets[0].name}.",
        "SequenceClassification.from_pretrained('someone/a-bert', num_labels=2)",
    ):
        assert part in text
    export(model, tmp_path, base_id=str(tmp_path))
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()  # a folder of this machine


def test_the_card_names_classes(tmp_path: Path) -> None:
    model = share(adapt(bert()), [])
    model.config.id2label = {0: "calm", 1: "angry"}
    export(model, tmp_path, engines="peft")
    card = (tmp_path / "README.md").read_text()
    assert "id2label={0: 'calm', 1: 'angry'}" in card and "Own: none." in card
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}  # transformers' own, which say nothing
    export(model, tmp_path / "unnamed")
    assert "id2label" not in (tmp_path / "unnamed" / "README.md").read_text()


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_the_model_stays_as_it_is(format: str, tmp_path: Path) -> None:
    model = adapt(bert().train())
    before, bank, slots = snapshot(model), model.lora_bank, model.lora_bank.slots
    random = torch.get_rng_state()
    export(model, tmp_path, format)
    assert_same(model, before)
    assert model.lora_bank is bank and bank.slots == slots and model.training
    assert torch.equal(torch.get_rng_state(), random)


def test_an_interrupted_export_is_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapt(llama())
    export(model, tmp_path)
    before = (tmp_path / TENSORS).read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("loradrop.tensor_file.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        export(fill(model), tmp_path)
    assert (tmp_path / TENSORS).read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", TENSORS]
