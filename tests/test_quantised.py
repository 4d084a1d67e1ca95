"""Quantised bases of bitsandbytes and torchao: trained on, and merged.

The matrix that a quantised layer stands for is found by feeding it the identity, so nothing here
reads a format as `quantised.py` does.
"""

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import IDS, bert, llama, wake
from run_cases import WORDS, write_model
from safetensors.torch import load_file
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig, LoraDropConfig, TrainConfig
from loradrop.command.cli import main
from loradrop.files import read_json
from loradrop.plan_file import REPORT

pytestmark = pytest.mark.quantised

K, N, R = 64, 32, 4
CONFIG = LoRAConfig(r=R, lora_alpha=6, target_modules=["first", "second"])


class Two(nn.Module):
    """Two layers, so that the gradient of the first one's adapter passes through the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(K, N), nn.Linear(N, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def four_bits(kind: str, nested: bool) -> Callable[[nn.Linear], nn.Module]:
    def made(linear: nn.Linear) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")
        bias = linear.bias is not None
        sizes = linear.in_features, linear.out_features, bias
        layer: nn.Module = bnb.nn.Linear4bit(
            *sizes, torch.float32, quant_type=kind, compress_statistics=nested
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu").requires_grad_(False)

    return made


def eight_bits(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer: nn.Module = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").requires_grad_(False)


def of_torchao(name: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def made(linear: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        given = dict(options)
        if "group" in given:
            given["granularity"] = quantization.PerGroup(given.pop("group"))
        if given.pop("asymmetric", False):
            given["mapping_type"] = quantization.MappingType.ASYMMETRIC
        layer = nn.Sequential(linear)
        quantization.quantize_(layer, getattr(quantization, name)(**given))
        return layer[0].requires_grad_(False)

    return made


# name -> (how to make a layer, the largest ‖Q(W) − W‖ / ‖W‖ for a normal W: half the widest step of
# the format over the root mean square, with the largest of a block at 3.5 times that)
FORMATS: dict[str, tuple[Callable[[nn.Linear], nn.Module], float]] = {
    "nf4": (four_bits("nf4", False), 0.25),
    "nf4, nested": (four_bits("nf4", True), 0.25),
    "fp4": (four_bits("fp4", True), 0.4),
    "int8": (eight_bits, 0.015),
    "torchao int8": (of_torchao("Int8WeightOnlyConfig"), 0.015),
    "torchao int8, groups": (of_torchao("Int8WeightOnlyConfig", group=16), 0.015),
    "torchao float8": (of_torchao("Float8WeightOnlyConfig"), 2.0**-4),
    "torchao int4": (of_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, group=32), 0.25),
    "torchao int4, shifted": (
        of_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, asymmetric=True), 0.25,
    ),
}  # fmt: skip
every_format = pytest.mark.parametrize("kind", FORMATS)


def quantised(kind: str) -> Two:
    model, make = Two(), FORMATS[kind][0]
    model.first, model.second = make(model.first), make(model.second)  # type: ignore[assignment]
    return model


@torch.no_grad()
def matrix(layer: Any) -> Tensor:
    """W (N, K) of a layer y = xWᵀ + b, in float64: what it does to the identity."""
    bias = 0 if layer.bias is None else layer.bias
    found: Tensor = layer(torch.eye(layer.in_features)) - bias
    return found.T.double()


def adapted(kind: str) -> Any:
    model = quantised(kind)
    loradrop.inject(model, CONFIG)
    return wake(model, 0.1)


@every_format
def test_it_trains_as_its_matrix_does(kind: str) -> None:
    """Against float64 layers with the same matrices, in and after an evaluation; both adapters."""
    base = quantised(kind)
    twin = Two().double()
    with torch.no_grad():
        for name in ("first", "second"):
            twin.get_submodule(name).weight.copy_(matrix(base.get_submodule(name)))
    loradrop.inject(twin, CONFIG)
    loradrop.inject(base, CONFIG)
    wake(base, 0.1)
    twin.lora_bank.load_state_dict(base.lora_bank.state_dict())
    twin.lora_bank.double()
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(3))
    expected = twin(x.double())
    expected.square().sum().backward()
    # bitsandbytes rounds the input to whole 127ths of a row's largest number, too.
    close = 0.05 if kind == "int8" else 1e-5
    for mode in (True, False, True):
        y = base.train(mode)(x)
        assert float((y - expected).detach().norm() / expected.detach().norm()) < close
    y.square().sum().backward()
    for p, q in zip(base.lora_bank.parameters(), twin.lora_bank.parameters(), strict=True):
        assert q.grad.norm() > 0
        assert float((p.grad - q.grad).norm() / q.grad.norm()) < close


@every_format
def test_a_merge_reports_its_error(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """W + s·B·A from the identity before, the merged matrix from it afterwards."""
    model = adapted(kind)
    bank, layers = model.lora_bank, {n: model.get_submodule(n) for n in ("first", "second")}
    with loradrop.disabled(model):
        before = {name: matrix(layer) for name, layer in layers.items()}
    deltas = {t.name: bank.delta(i).double() for i, t in enumerate(bank.targets)}
    forms = {name: type(layer.weight) for name, layer in layers.items()}
    with caplog.at_level(logging.WARNING, "loradrop"):
        errors = loradrop.merge(model)
    assert set(errors) == {"first", "second"} and "quantised again" in caplog.text
    for name, error in errors.items():
        layer = model.get_submodule(name)
        wanted, delta = before[name] + deltas[name], deltas[name]
        lost = (matrix(layer) - wanted).norm()
        # The identity goes through a layer of int8 in float16.
        rounding = 2.0**-10 if kind == "int8" else 1e-5
        assert math.isclose(error.of_weight, lost / wanted.norm(), abs_tol=rounding)
        assert math.isclose(
            error.of_delta, lost / delta.norm(), abs_tol=rounding * wanted.norm() / delta.norm()
        )
        assert 0 < error.of_weight < FORMATS[kind][1]
        assert type(layer.weight) is forms[name] and not hasattr(layer, "_lora")


SETTINGS = ("blocksize", "compress_statistics", "quant_type", "block_size", "target_dtype")


@every_format
def test_a_merge_that_is_undone(kind: str) -> None:
    """The settings of the merged weight are those of the old one, which comes back bit for bit."""
    plain = quantised(kind)
    x = torch.randn(5, K)
    expected = plain(x).detach()
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    owners = {name: p for name, p in plain.named_parameters()}
    loradrop.inject(plain, CONFIG)
    wake(plain, 0.1)
    loradrop.merge(plain, keep_original=True)
    assert not torch.allclose(plain(x), expected, rtol=0.01)
    for name in ("first.weight", "second.weight"):
        old, new = owners[name], plain.get_parameter(name)
        assert new is not old and new.dtype == old.dtype and new.shape == old.shape
        for setting in SETTINGS:
            assert getattr(new, setting, None) == getattr(old, setting, None), setting
    loradrop.remove(plain)
    assert all(plain.get_parameter(name) is p for name, p in owners.items())
    after = plain.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        assert _same(after[key], value), key
    assert torch.equal(plain(x), expected)


def _same(a: Any, b: Any) -> bool:
    if hasattr(a, "__tensor_flatten__"):
        names = a.__tensor_flatten__()[0]
        return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
    return torch.equal(a, b)


def test_a_base_without_a_gradient_is_refused() -> None:
    """torchao's int8 with rounded activations is for inference: x would get no gradient from it."""
    model = Two()
    make = of_torchao("Int8DynamicActivationInt8WeightConfig")
    model.first, model.second = make(model.first), make(model.second)  # type: ignore[assignment]
    loradrop.inject(model, CONFIG)
    x = torch.randn(5, K)
    with pytest.raises(RuntimeError, match=r"Int8Tensor gives its input no gradient.*weights only"):
        model(x)  # the second layer has an input that the first one's adapter trains on
    with torch.no_grad():
        assert model(x).isfinite().all()
    with pytest.raises(ValueError, match=r"first is a Int8Tensor.*loradrop\.load"):
        loradrop.merge(model)


@pytest.mark.parametrize("target", ["first", "second"])
def test_a_layer_without_a_gradient_beside_the_adapted_ones_is_told(
    target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would swallow the gradient of what comes before it; weights alone let it through."""
    rows = [{"x": torch.randn(K), "labels": 0}]
    for name, stops in (
        ("Int8DynamicActivationInt8WeightConfig", True), ("Int8WeightOnlyConfig", False),
    ):  # fmt: skip
        model, make = Two(), of_torchao(name)
        other = {"first": "second", "second": "first"}[target]
        setattr(model, other, make(getattr(model, other)))
        caplog.clear()
        loradrop.inject(model, LoRAConfig(r=R, target_modules=[target]))
        told = f"{other}, a Linear on a Int8Tensor, gives its input no gradient" in caplog.text
        assert told == stops
        if stops:
            with pytest.raises(ValueError, match=r"gives its input no gradient.*weights only"):
                loradrop.fit(model, rows, None, None, args=TrainConfig(steps=1, batch_size=1))


def test_a_delta_that_is_not_finite_changes_nothing() -> None:
    model = adapted("nf4")
    model.lora_bank.B[1].data[0, 0] = math.inf
    before = [model.first.weight, model.second.weight]
    with pytest.raises(ValueError, match=r"second is not finite"):
        loradrop.merge(model)
    assert [model.first.weight, model.second.weight] == before


def test_a_weight_that_was_repacked_is_unpacked() -> None:
    """Some CPUs repack 4-bit weights for evaluation, in a form that training cannot read."""
    functional = pytest.importorskip("bitsandbytes.functional")
    model, x = quantised("nf4"), torch.randn(5, K)
    expected, layer = model(x).detach(), model.first
    layer.weight.data, _ = functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    layer.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    loradrop.inject(model, CONFIG)
    assert layer.support_avx512bf16_for_cpu is False
    y = model(x)
    y.sum().backward()
    # The repacked form has bfloat16 scales, and each output passes through two layers.
    assert float((y - expected).detach().norm() / expected.norm()) < 2 * 2.0**-8
    loradrop.remove(model)
    assert layer.support_avx512bf16_for_cpu is True


def _bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def _torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


# On a CPU with bfloat16 instructions bitsandbytes packs four-bit weights by 32 rows.
WHOLE = {"hidden_size": 64, "intermediate_size": 64}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
LOADED: dict[str, Callable[[], Any]] = {
    "nf4": lambda: _bitsandbytes(**NF4),
    "nf4 in bfloat16": lambda: _bitsandbytes(**NF4, bnb_4bit_quant_storage=torch.bfloat16),
    "int8": lambda: _bitsandbytes(load_in_8bit=True),
    "torchao": _torchao,
}


def answer(model: Any) -> Tensor:
    """The logits as they are served: a CPU may read four-bit weights otherwise with gradients."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", LOADED)
def test_a_model_of_transformers(kind: str, tmp_path: Path) -> None:
    """from_pretrained, fit with probe and share, save, load, export to PEFT, export merged."""
    from transformers import AutoModelForCausalLM

    llama(**WHOLE).save_pretrained(tmp_path / "base")
    options = {"quantization_config": LOADED[kind](), "device_map": "cpu"}

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)

    model = load()
    config = LoraDropConfig(r=R, lora_alpha=64, target_modules=["q_proj", "v_proj"], probe_steps=3)
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(3, 1)]
    batches = torch.utils.data.DataLoader(rows, batch_size=3)  # type: ignore[arg-type]
    args = loradrop.TrainConfig(epochs=3, learning_rate=0.02)
    result = loradrop.fit(model, batches, None, config, args=args, output_dir=tmp_path / "run")
    assert result.plan.assignment.decided and len(set(model.lora_bank.slots)) < 4
    logits = answer(model)
    loradrop.save(model, tmp_path / "native")
    again = load()
    loradrop.load(again, tmp_path / "native")
    assert torch.equal(answer(again), logits)
    loradrop.export(model, tmp_path / "peft")
    report = loradrop.verify(model, tmp_path / "peft", [{"input_ids": IDS}])
    assert report.ok, report.table()
    loradrop.export(model, tmp_path / "merged", format="merged")
    assert torch.equal(answer(model), logits)
    merged = copy.deepcopy(model)
    errors = loradrop.merge(merged)
    assert len(errors) == 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu").eval()
    expected = answer(merged)
    assert torch.equal(answer(loaded), expected)
    assert not torch.equal(expected, logits)


@pytest.mark.parametrize("kind", LOADED)
def test_a_base_that_is_quantised_on_disk(kind: str, tmp_path: Path) -> None:
    """Its merged model is one, too, and loads to the same logits."""
    from transformers import AutoModelForCausalLM

    llama(**WHOLE).save_pretrained(tmp_path / "plain")
    options = {"quantization_config": LOADED[kind](), "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
    base = answer(model)
    loradrop.inject(model, LoRAConfig(r=R, lora_alpha=64, target_modules=["q_proj", "v_proj"]))
    wake(model, 0.1)
    loradrop.export(model, tmp_path / "merged", format="merged")
    loradrop.merge(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu")
    assert torch.equal(answer(loaded), answer(model))
    assert not torch.equal(answer(model), base)


@pytest.mark.parametrize("kind", LOADED)
def test_a_head_that_is_quantised(kind: str, tmp_path: Path) -> None:
    """Refused before anything changes, as is an adapter with a trained head. Both remedies work: a
    head left out of the quantisation trains, and one left as it is is in no file.
    """
    from transformers import AutoModelForSequenceClassification

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert(2, hidden=64, intermediate_size=64, **no_dropout).save_pretrained(tmp_path / "base")

    def load(*plain: str) -> Any:
        how = LOADED[kind]()
        for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
            if plain and hasattr(how, name):
                setattr(how, name, list(plain))
        return AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", quantization_config=how, device_map="cpu"
        )

    refusal = r"classifier\.weight is quantised.*without \['classifier'\].*modules_to_save=\[\]"
    config = LoRAConfig(r=R, target_modules=["query", "value"])
    model = load()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=refusal):
        loradrop.inject(model, config)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before

    trained = load("classifier")
    head = trained.classifier.weight.detach().clone()
    rows = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(IDS)]
    loradrop.fit(trained, rows, None, config, args=loradrop.TrainConfig(steps=2))
    assert not torch.equal(trained.classifier.weight, head)
    loradrop.save(trained, tmp_path / "with a head")

    loradrop.inject(model, replace(config, modules_to_save=[]))
    wake(model, 0.1)
    for other in (model, load()):
        with pytest.raises(ValueError, match=refusal):
            loradrop.load(other, tmp_path / "with a head")
    loradrop.export(model, tmp_path / "peft")
    keys = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(keys) == 8 and all(".lora_" in key for key in keys)
    ours, theirs = load(), peft.PeftModel.from_pretrained(load(), tmp_path / "peft")
    loradrop.load(ours, tmp_path / "peft")
    # As in training: an evaluation may repack four bits, which fails for a head of two rows.
    expected = model.train()(input_ids=IDS).logits
    for again in (ours, theirs):
        torch.testing.assert_close(again.train()(input_ids=IDS).logits, expected)


def test_compressed_with_data(tmp_path: Path) -> None:
    """`loradrop compress ... data=` measures on dev before and after the cut."""
    from transformers import AutoModelForCausalLM

    base, rows = tmp_path / "base", tmp_path / "rows.csv"
    write_model(base, "llama")
    how = {"quantization_config": LOADED["int8"](), "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(base, **how)
    model.save_pretrained(base)
    loradrop.inject(model, LoRAConfig(r=R, target_modules=["q_proj", "v_proj"]))
    wake(model, 0.1)
    loradrop.save(model, tmp_path / "adapter")
    rows.write_text("text\n" + "".join(f"{a} {b}\n" for a in WORDS[:6] for b in WORDS[6:12]))
    data = [f"model={base}", f"data={rows}"]
    out = tmp_path / "small"
    assert main(["compress", str(tmp_path / "adapter"), *data, "--out", str(out)]) == 0
    metrics = read_json(out / REPORT)["metrics"]
    before, after = metrics["before"]["loss"], metrics["after"]["loss"]
    assert 0 < before < math.inf and 0 < after < math.inf and before != after


def test_a_trainer_of_ones_own(tmp_path: Path) -> None:
    """It takes the model once it is told of adapters, and its checkpoints hold them."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from loradrop.training.trainer import taken_as_adapted

    llama(**WHOLE).save_pretrained(tmp_path / "base")
    options = {"quantization_config": LOADED["nf4"](), "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    loradrop.inject(model, LoraDropConfig(r=R, target_modules=["q_proj", "v_proj"], probe_steps=2))
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=4, save_steps=4, learning_rate=0.02, use_cpu=True,
        per_device_train_batch_size=3, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    given: dict[str, Any] = {
        "train_dataset": [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)],
        "callbacks": [loradrop.LoraDropCallback()],
    }
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, args, **given)
    with taken_as_adapted(model):
        trainer = Trainer(model, args, **given)
    trainer.train()
    assert model.lora_bank.assignment.decided and not model._hf_peft_config_loaded
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    loradrop.load(again, tmp_path / "run" / "checkpoint-4")
    assert torch.equal(answer(again), answer(model))
