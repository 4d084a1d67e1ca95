"""What a PeftModel of a `LoraDropConfig` writes and reads: folders, exports, plans, dtypes."""

import json
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft_models import BATCH, LLAMA, Q0, Q1, V0, V1, logits, made, peft, shared, twin
from safetensors.torch import load_file

import loradrop
from loradrop import LoRAConfig
from loradrop.command.adapter_bases import base_named_by
from loradrop.formats.dtypes import dtypes_in
from loradrop.formats.engines import ENGINES, refusal
from loradrop.formats.peft_file import read
from loradrop.injection import plan_of
from loradrop.integrations.peft import LoraDropConfig, from_peft, to_peft
from loradrop.integrations.peft_layers import Banked
from loradrop.methods import LoRADrop, Spectral
from loradrop.native import FOLDER
from loradrop.plan_file import plan_at

RELOAD = """
import sys, torch, models
from peft import PeftConfig, PeftModel
try:
    PeftConfig.from_pretrained(sys.argv[1])
    raise AssertionError("read as something else")
except KeyError as error:
    assert "LORADROP" in str(error)
import loradrop.integrations.peft
model = PeftModel.from_pretrained(models.llama(), sys.argv[1])
with torch.no_grad():
    torch.save((model(input_ids=models.IDS).logits, model.lora_bank.slots), sys.argv[2])
"""


def test_a_folder_brings_the_sharing_back_in_a_fresh_process(tmp_path: Path) -> None:
    model = shared()
    model.save_pretrained(tmp_path)
    verdicts = [refusal(engine, read(tmp_path)) for engine in ENGINES]
    assert not any(verdict.ok for verdict in verdicts)  # none reads it as something else
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values() if t.is_floating_point()) == 704  # each once
    found = tmp_path / "found.pt"
    paths = [str(Path(__file__).parent), str(Path(loradrop.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n" + RELOAD, tmp_path, found],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again, slots = torch.load(found)
    assert slots == model.lora_bank.slots == (0, 1, 2, 1)
    assert torch.allclose(again, logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trains", [True, False])
def test_loading_one_more_leaves_the_others_as_they_are(trains: bool, tmp_path: Path) -> None:
    shared(plan=[Q0]).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(models.llama(), tmp_path, is_trainable=trains)
    model.load_adapter(tmp_path, "other", is_trainable=not trains)
    banks = model.base_model.lora_banks
    found = {name: {p.requires_grad for p in banks[name].parameters()} for name in banks}
    assert found == {"default": {trains}, "other": {not trains}}


@pytest.mark.parametrize("options", [{}, {"is_trainable": True}, {"low_cpu_mem_usage": True}])
def test_from_pretrained_takes_peft_s_options(options: dict[str, Any], tmp_path: Path) -> None:
    model = shared()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path, **options)
    assert torch.equal(logits(again), logits(model))
    trains = {p.requires_grad for p in again.lora_bank.parameters()}
    assert trains == {options.get("is_trainable", False)}
    config = again.peft_config["default"]
    assert config.budget is None and from_peft(config).method == LoRADrop()
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(logits(again), logits(model)) and again.lora_bank.slots == (0, 1, 2, 1)
    assert not {id(p) for p in again.base_model.lora_banks["default"].parameters()} & {
        id(p) for p in again.lora_bank.parameters()
    }


def test_a_folder_that_shares_otherwise_is_taken_over(tmp_path: Path) -> None:
    model, other = shared(), made()
    model.save_pretrained(tmp_path)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert other.lora_bank.slots == (0, 1, 2, 1) and torch.equal(logits(other), logits(model))
    assert all(p.requires_grad for p in other.lora_bank.parameters())
    frozen = made()
    frozen.lora_bank.requires_grad_(False)
    frozen.load_adapter(tmp_path, "default")
    assert frozen.lora_bank.slots == (0, 1, 2, 1) and torch.equal(logits(frozen), logits(model))
    assert not any(p.requires_grad for p in frozen.lora_bank.parameters())


def test_exports_and_native_files_are_those_of_an_injected_model(tmp_path: Path) -> None:
    model = shared()
    before = models.snapshot(model)
    verdicts = loradrop.export(model, tmp_path / "peft")
    assert all(verdict.ok for verdict in verdicts)
    stock = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not any(isinstance(m, Banked) for m in stock.modules())
    assert torch.allclose(logits(stock), logits(model), rtol=0, atol=1e-4)
    assert loradrop.verify(model, tmp_path / "peft", [{"input_ids": models.IDS}]).ok
    loradrop.save(model, tmp_path / "native")
    own = models.llama()
    loradrop.load(own, tmp_path / "native")
    assert own.lora_bank.slots == (0, 1, 2, 1)
    assert torch.allclose(logits(own), logits(model), rtol=0, atol=1e-5)
    loradrop.export(model, tmp_path / "merged", format="merged")
    whole = type(models.llama()).from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(whole), logits(model), rtol=0, atol=1e-4)
    models.assert_same(model, before)


def test_what_is_trained_whole_goes_along(tmp_path: Path) -> None:
    options = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    model = made(models.bert(2), **options)
    loradrop.share(model, [model.lora_bank.targets[0].name])
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    base = logits(models.bert(2))
    model.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(models.bert(2), tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    own = models.bert(2)
    loradrop.load(own, tmp_path / "ours")
    assert own.lora_bank.slots == model.lora_bank.slots
    assert torch.allclose(logits(own), logits(model), rtol=0, atol=1e-4)
    loradrop.export(model, tmp_path / "peft")
    stock = peft.PeftModel.from_pretrained(models.bert(2), tmp_path / "peft")
    assert torch.allclose(logits(stock), logits(model), rtol=0, atol=1e-3)
    with model.disable_adapter():
        assert torch.allclose(logits(model), base, rtol=0, atol=1e-5)
    loradrop.save(model, tmp_path / "native")
    own = models.bert(2)
    loradrop.load(own, tmp_path / "native")
    assert torch.allclose(logits(own), logits(model), rtol=0, atol=1e-4)


def test_the_card_says_how_to_open_it(tmp_path: Path) -> None:
    """Once, however often it is saved, and what else is there stays."""
    model = shared()
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    text = card.read_text(encoding="utf-8")
    assert text.count("import loradrop.integrations.peft") == 1
    card.write_text(f"{text}\nOur evaluation.\n", encoding="utf-8")
    for save in (model.peft_config["default"].save_pretrained, model.save_pretrained):
        save(str(tmp_path))
        text = card.read_text(encoding="utf-8")
        assert text.count("import loradrop.integrations.peft") == 1 and "Our evaluation." in text


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_base_are_trained_and_saved(bias: str, tmp_path: Path) -> None:
    options = {"target_modules": ["query", "value"], "task_type": None, "bias": bias}
    model = made(models.bert(2), **options)
    loradrop.share(model, [model.lora_bank.targets[0].name])
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    trained = [p for p in biases if p.requires_grad]
    assert len(trained) == (4 if bias == "lora_only" else len(biases)) and len(biases) > 4
    for p in trained:
        p.data.add_(0.5)
    model(input_ids=models.IDS).logits.sum().backward()
    assert all(p.grad is not None for p in trained)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(models.bert(2), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_a_plan_decides_before_any_training(tmp_path: Path) -> None:
    model = shared()
    loradrop.save(model, tmp_path)
    for plan in (str(tmp_path / "plan.json"), tmp_path / "plan.json", [Q0]):
        again = peft.get_peft_model(models.llama(), LoraDropConfig(**LLAMA, plan=plan))
        assert again.lora_bank.slots == (0, 1, 2, 1)
        assert again.lora_bank.assignment.kept == (Q0,)
        assert torch.allclose(logits(again), logits(models.llama()), rtol=0, atol=1e-5)
    again.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["plan"]
    assert saved["kept"] == [Q0] and saved["slots"] == [0, 1, 2, 1]
    plan_file = str(tmp_path / "plan.json")
    other = LLAMA | {"target_modules": ["q_proj", "k_proj"], "plan": plan_file}
    with pytest.raises(ValueError, match=r"plan is of other targets.*k_proj"):
        peft.get_peft_model(models.llama(), LoraDropConfig(**other))
    with pytest.raises(ValueError, match=r"or of other ranks.*q_proj"):
        peft.get_peft_model(models.llama(), LoraDropConfig(**LLAMA | {"r": 2, "plan": plan_file}))
    with pytest.raises(ValueError, match=r"kept has 'nowhere', which is not a target"):
        peft.get_peft_model(models.llama(), LoraDropConfig(**LLAMA, plan=["nowhere"]))


def test_dtypes(tmp_path: Path) -> None:
    """float32 adapters on a half-precision base, whatever the base is cast to; or the base's."""
    model = made(models.llama().bfloat16())
    assert {p.dtype for p in model.lora_bank.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    stock = twin(model, models.llama().bfloat16())
    exact = logits(twin(model.float(), models.llama().bfloat16().double()).double())
    error, bound = (
        (logits(m).double() - exact).norm() for m in (made(models.llama().bfloat16()), stock)
    )
    assert 0 < error < 2 * bound  # of PEFT's, which computes the delta in float32
    narrow = peft.get_peft_model(
        models.llama().bfloat16(), LoraDropConfig(**LLAMA), autocast_adapter_dtype=False
    )
    loradrop.share(models.wake(narrow, 0.1), [Q0])
    models.wake(narrow, 0.1).save_pretrained(tmp_path)
    assert {p.dtype for p in narrow.lora_bank.parameters()} == {torch.bfloat16}
    for wide, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        again = peft.PeftModel.from_pretrained(
            models.llama().bfloat16(), tmp_path, autocast_adapter_dtype=wide
        )
        parameters = {(p.dtype, p.requires_grad) for p in again.lora_bank.parameters()}
        assert parameters == {(dtype, False)} and torch.equal(logits(again), logits(narrow))


def test_stored_untied_and_offloaded() -> None:
    """It pickles; accelerate sees no tensor twice, and brings back what it has sent away."""
    accelerate = pytest.importorskip("accelerate")
    model = shared()
    expected, scores = logits(model), loradrop.probe(model, [BATCH])
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    assert accelerate.utils.find_tied_parameters(model) == []
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {p.is_meta for p in model.lora_bank.links[0].bank.parameters()} == {True}
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5)
    assert dict(loradrop.probe(model, [BATCH])) == pytest.approx(dict(scores), rel=1e-5)


def test_configurations_convert() -> None:
    ours = loradrop.LoraDropConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj"], use_rslora=True,
        rank_pattern={"q_proj": 2}, modules_to_save=["lm_head"], threshold=0.8, share="shape",
    )  # fmt: skip
    theirs = to_peft(ours, task_type="CAUSAL_LM")
    assert isinstance(theirs, LoraDropConfig) and isinstance(theirs, peft.PeftConfig)
    assert (theirs.threshold, theirs.share, theirs.task_type) == (0.8, "shape", "CAUSAL_LM")
    assert from_peft(theirs) == ours
    plain = LoRAConfig(r=2, target_modules="all-linear", modules_to_save=[])
    assert type(to_peft(plain)) is peft.LoraConfig and from_peft(to_peft(plain)) == plain
    options = {f.name: f.default for f in fields(LoRADrop)}
    here = {f.name: f.default for f in fields(LoraDropConfig) if f.name in options}
    assert here == options
    with pytest.raises(ValueError, match=r"'spectral' has no counterpart in PEFT"):
        to_peft(LoRAConfig(method=Spectral()))
    with pytest.raises(ValueError, match=r"pass autocast_adapter_dtype=False"):
        to_peft(LoRAConfig(adapter_dtype="base"))
    with pytest.raises(ValueError, match=r"use_dora=True is not plain LoRA"):
        from_peft(peft.LoraConfig(use_dora=True))
    with pytest.raises(ValueError, match=r"layers_to_transform=\[1\] is not an option"):
        from_peft(LoraDropConfig(target_modules=["q_proj"], layers_to_transform=[1]))
    for option in ({"bias": "all"}, {"init_lora_weights": False}, {"plan": ["a"]}):
        with pytest.raises(ValueError, match=rf"{next(iter(option))}=.* is not an option of"):
            from_peft(LoraDropConfig(target_modules=["q_proj"], **option))


@pytest.mark.parametrize("kind", [peft.LoraConfig, LoraDropConfig])
def test_a_head_that_peft_trains_is_trained(kind: Any) -> None:
    """By `inject`, too; also of a configuration in which PEFT has named heads of every spelling."""
    theirs = kind(r=2, target_modules=["query"], task_type=peft.TaskType.SEQ_CLS)
    for _ in range(2):
        model = models.bert()
        loradrop.inject(model, from_peft(theirs))
        assert model.classifier.weight.requires_grad
        peft.get_peft_model(models.bert(), theirs)
    assert set(theirs.modules_to_save) == {"classifier", "score"}
    assert from_peft(kind(r=2, target_modules=["query"])).modules_to_save == ()
    named = kind(r=2, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["pooler"])
    assert from_peft(named).modules_to_save == ("pooler",)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_trained_come_into_a_plain_model(bias: str, tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS", "bias": bias}
    model = peft.get_peft_model(models.bert(), LoraDropConfig(**options))
    loradrop.share(model, [])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    model.save_pretrained(tmp_path)
    found = models.bert()
    loradrop.load(found, tmp_path)
    assert torch.equal(models.outputs(found), models.outputs(model))


def test_a_plan_of_a_folder(tmp_path: Path) -> None:
    """The path of what holds one does, and a name where a list belongs is told."""
    model = made()
    loradrop.share(model, [model.lora_bank.targets[0].name])
    model.save_pretrained(tmp_path)
    again = peft.get_peft_model(models.llama(), LoraDropConfig(**LLAMA, plan=str(tmp_path)))
    assert again.lora_bank.slots == model.lora_bank.slots
    with pytest.raises(FileNotFoundError, match=r"q_proj is not there: give a plan\.json"):
        peft.get_peft_model(models.llama(), LoraDropConfig(**LLAMA, plan="q_proj"))


def test_a_configuration_that_was_saved_decides_nothing_elsewhere(tmp_path: Path) -> None:
    config = LoraDropConfig(**LLAMA)
    model = models.wake(peft.get_peft_model(models.llama(), config), 0.1)
    loradrop.share(model, [Q0])
    model.save_pretrained(tmp_path)
    assert config.plan is None
    other = peft.get_peft_model(models.llama(), config)
    assert other.lora_bank.slots == (0, 1, 2, 3) and not other.lora_bank.assignment.decided


def test_training_without_a_warmup_is_an_error_once_it_is_saved(tmp_path: Path) -> None:
    model = made()
    with pytest.raises(ValueError, match=r"decides after a warm-up.*LoraDropCallback"):
        model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))


def named(identity: str, layers: int = 2) -> Any:
    sizes = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32}
    sizes |= models.LM | {"num_hidden_layers": layers}
    model = models.build("LlamaForCausalLM", "LlamaConfig", **sizes)
    model.config._name_or_path = identity
    return model


@pytest.mark.parametrize("way", ["PeftModel", "load"])
def test_a_folder_of_another_base_says_so(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, whether its shapes are the same or the model is deeper than its targets."""
    model = made(named("one"), target_modules=[Q0, V0, Q1, V1])
    loradrop.share(model, [Q0])
    model.save_pretrained(tmp_path)
    for base, said in (
        (named("one"), []),
        (named("two"), ["was trained on one, and this model is two"]),
        (named("two", 3), ["was trained on one, whose tensors are not all those of this model"]),
    ):
        caplog.clear()
        if way == "load":
            loradrop.load(base, tmp_path)
        else:
            peft.PeftModel.from_pretrained(base, str(tmp_path))
        found = [r.getMessage() for r in caplog.records if "trained on" in r.getMessage()]
        assert len(found) == len(said)
        assert all(part in line for part, line in zip(said, found, strict=True))


@pytest.mark.parametrize("inside", ["", FOLDER], ids=["beside", "in a checkpoint"])
def test_everything_reads_the_native_one_of_two_adapters(inside: str, tmp_path: Path) -> None:
    face, native = made(named("face")), named("native").bfloat16()
    loradrop.share(face, [])
    loradrop.inject(native, LoRAConfig(r=4, target_modules=[Q0, V0], adapter_dtype="base"))
    face.save_pretrained(tmp_path)
    assert plan_at(tmp_path).slots == face.lora_bank.slots != (0, 1)
    loradrop.save(native, tmp_path / inside)
    found = named("native")
    loradrop.load(found, tmp_path)
    assert plan_at(tmp_path) == plan_of(found) and found.lora_bank.slots == (0, 1)
    assert base_named_by(tmp_path)[0]["id"] == "native"
    assert dtypes_in(tmp_path, found).adapters == "bfloat16"
