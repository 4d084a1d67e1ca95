"""`accelerate_peft`: PEFT's own adapters with our op, in place, and back."""

import copy
import logging
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft_models import BATCH, OPTIONS, logits, peft
from torch import Tensor, nn

import loradrop
from loradrop.integrations.peft_layers import Accelerated


def made(model: Any = None, **options: Any) -> Any:
    """A PeftModel of PEFT's own whose adapters are awake."""
    found = peft.get_peft_model(model or models.llama(), peft.LoraConfig(**(OPTIONS | options)))
    return awake(found)


def awake(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            value = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(value)
    return model


def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradient of every parameter that has one."""
    model.zero_grad()
    out = model(**BATCH)
    out.loss.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), grads


def fused(model: Any) -> int:
    return sum(isinstance(module, Accelerated) for module in model.modules())


CASES: dict[str, Any] = {
    "plain": (models.llama, {}, 4),
    "rslora": (models.llama, {"use_rslora": True, "rank_pattern": {"v_proj": 2}}, 4),
    "all-linear": (models.llama, {"target_modules": "all-linear"}, 14),
    "Conv1D": (models.gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, 2),
    "biases": (models.gpt2, {"target_modules": ["c_attn"], "bias": "all"}, 2),
}


@pytest.mark.numbers
@pytest.mark.parametrize("name", list(CASES))
def test_outputs_and_gradients_stay(name: str) -> None:
    """In float64; keys, Parameters and hooks stay, and undoing leaves what was there."""
    make, options, count = CASES[name]
    model = made(make(), **options).double().eval()
    before, (expected, grads) = models.snapshot(model), run(model)
    assert loradrop.accelerate_peft(model) == count == fused(model)
    assert [*model.state_dict()] == [*before["state"]]
    found, others = run(model)
    assert torch.allclose(found, expected, rtol=0, atol=1e-11) and found.abs().max() > 1
    assert grads.keys() == others.keys() and len(grads) >= 2 * count
    for key, gradient in grads.items():
        assert gradient.abs().max() > 1e-8, key
        assert torch.allclose(others[key], gradient, rtol=0, atol=1e-11), key
    loradrop.restore_peft(model)
    assert fused(model) == 0
    models.assert_same(model, before)
    assert torch.equal(run(model)[0], expected)


def test_the_op_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from loradrop.integrations import peft_layers

    calls, op = [], peft_layers.adapted_output
    monkeypatch.setattr(
        peft_layers, "adapted_output", lambda *a: calls.append(a[1] is not None) or op(*a)
    )
    model = made()
    loradrop.accelerate_peft(model)
    run(model)
    assert calls == [True] * 4  # of the weights themselves
    with model.disable_adapter():
        run_base = model(**BATCH).logits
    model.merge_adapter()
    merged = model(**BATCH).logits
    assert len(calls) == 4 and not torch.allclose(run_base, merged, atol=1e-3)


def test_what_is_loaded_into_it_is_served_too(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path / "one")
    loradrop.accelerate_peft(model)
    model.save_pretrained(tmp_path / "two")
    for name in ("one", "two"):
        again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / name)
        assert fused(again) == 0
        assert torch.allclose(logits(again), logits(model), rtol=0, atol=1e-5)
    model.load_adapter(tmp_path / "one", "again")
    model.set_adapter("again")
    assert torch.allclose(logits(model), logits(again), rtol=0, atol=1e-5)


def test_several_adapters_add_up() -> None:
    model = made()
    model.add_adapter(
        "second", peft.LoraConfig(**(OPTIONS | {"r": 2, "target_modules": ["q_proj"]}))
    )
    awake(model).double()
    for names in (["default"], ["second"], ["default", "second"], []):
        model.base_model.set_adapter(names)
        loradrop.restore_peft(model)
        expected = logits(model)
        loradrop.accelerate_peft(model)
        assert torch.allclose(logits(model), expected, rtol=0, atol=1e-11), names
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), both, rtol=0, atol=1e-11)
    model.unmerge_adapter()
    model.eval()
    names = ["default", "second", "__base__"]
    with torch.no_grad():
        mixed = model(input_ids=models.IDS, adapter_names=names).logits
    model.base_model.set_adapter("second")
    assert torch.allclose(mixed[1], logits(model)[1], rtol=0, atol=1e-11)


def test_half_precision_has_the_error_of_peft() -> None:
    """float32 adapters on a bfloat16 base; against the same numbers in float64."""
    model = made(models.llama().bfloat16())
    exact = logits(copy.deepcopy(model).double())
    theirs = (logits(model).double() - exact).norm()
    loradrop.accelerate_peft(model)
    ours = (logits(model).double() - exact).norm()
    assert 0 < ours < 2 * theirs
    with torch.autocast("cpu", torch.bfloat16):
        full = made()
        loradrop.accelerate_peft(full)
        found, grads = run(full)
    assert found.isfinite().all() and len(grads) == 8


def test_dropout_is_of_the_same_probability() -> None:
    """The mean over many draws is the output without dropout, within five standard errors."""
    torch.manual_seed(0)
    layer = peft.get_peft_model(
        nn.Sequential(nn.Linear(64, 32)),
        peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.25, target_modules=["0"]),
    )
    awake(layer)
    loradrop.accelerate_peft(layer)
    x = torch.randn(1, 64).expand(4000, 64)
    with torch.no_grad():
        expected, drawn = layer.eval()(x[:1]), layer.train()(x)
    error = drawn.std(0) / 4000**0.5
    assert (error > 0).all() and ((drawn.mean(0) - expected[0]).abs() < 5 * error).all()


def test_what_stays_with_peft_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = models.llama()
    targets = ["q_proj", "v_proj", "embed_tokens"]
    model = made(model, target_modules=targets)
    model.add_adapter(
        "dora", peft.LoraConfig(**(OPTIONS | {"use_dora": True, "target_modules": ["v_proj"]}))
    )
    before = logits(model)
    with caplog.at_level(logging.WARNING):
        assert loradrop.accelerate_peft(model) == 2  # both q_proj
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 2
    assert any(
        "embed_tokens (1 layers): a Embedding is not a layer over a linear map" in t for t in told
    )
    assert any("v_proj (2 layers): DoraLinearVariant is not plain LoRA" in t for t in told)
    assert torch.allclose(logits(model), before, rtol=0, atol=1e-5)
    biased = made(models.gpt2(), target_modules=["c_attn"], lora_bias=True)
    assert loradrop.accelerate_peft(biased) == 0
    assert "lora_bias=True" in caplog.text


def test_an_adapter_that_comes_later_may_be_another() -> None:
    """DoRA beside a served adapter is PEFT's, whenever it is active."""
    model = made()
    loradrop.accelerate_peft(model)
    model.add_adapter("dora", peft.LoraConfig(**(OPTIONS | {"use_dora": True})))
    awake(model)
    model.set_adapter("dora")
    found = logits(model)
    loradrop.restore_peft(model)
    assert torch.equal(logits(model), found)


def test_hooks_are_called() -> None:
    model, seen = made(), list[str]()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    expected = logits(model)
    loradrop.accelerate_peft(model)
    layer.base_layer.register_forward_hook(lambda *_: seen.append("base"))
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5) and seen == ["base"]
    layer.lora_A["default"].register_forward_pre_hook(lambda *_: seen.append("A"))
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5)
    assert seen == ["base", "base", "A"]
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5)


def test_checkpointing_and_copies() -> None:
    model = made(lora_dropout=0.25).train()
    loradrop.accelerate_peft(model)
    model.enable_input_require_grads()
    double = copy.deepcopy(model)
    assert fused(double) == 4
    torch.manual_seed(3)
    plain = run(model)[1]
    model.gradient_checkpointing_enable()
    for other in (model, double):
        torch.manual_seed(3)
        for key, gradient in run(other)[1].items():
            assert torch.allclose(gradient, plain[key], rtol=1e-4, atol=1e-7), key


def test_compiled_it_is_one_graph() -> None:
    model = made().double()
    expected = logits(model)
    loradrop.accelerate_peft(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), rtol=0, atol=1e-11)
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-11)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is no PeftModel: call accelerate_peft"):
        loradrop.accelerate_peft(models.llama())
