"""Models that changed after injection: nothing is half removed, and nothing is lost."""

from typing import Any

import pytest
import torch
from models import Make, assert_same, bert, llama, snapshot, wake
from surgery_models import IDS, WIDTH, Net, config, injected, output, train
from torch import nn

import loradrop

pytestmark = pytest.mark.numbers


def resized() -> Any:
    model = llama()
    loradrop.inject(model, config("q_proj", "lm_head"))
    model.resize_token_embeddings(64)
    return model


def shorter() -> Any:
    model = injected()
    del model.layers[0]
    return model


def patched() -> Any:
    model = injected("mix")
    layer = model.layers[2].mix
    forward = layer.forward
    layer.forward = lambda x: forward(x)
    return model


CHANGED: dict[str, tuple[Make, str]] = {
    "a target replaced": (resized, r"lm_head \(32 -> 50\) is another Linear \(32 -> 64\)"),
    "layers removed": (shorter, r"layers\.0\.query \(8 -> 8\) is another LoRALinear"),
    "patched": (patched, r"layers\.2\.mix has a forward of its own.*del module\.forward"),
}


@pytest.mark.parametrize("changed", CHANGED)
def test_a_target_that_is_not_there_any_more(changed: str, tmp_path: Any) -> None:
    """Nothing is half removed, and no dead adapter is saved or merged."""
    make, message = CHANGED[changed]
    model = make()
    before = snapshot(model)
    calls = [loradrop.remove, loradrop.merge]
    if changed != "patched":
        calls.append(lambda m: loradrop.save(m, tmp_path))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(model)
    assert_same(model, before)


def test_what_trains_since_injection(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is saved and loaded with the adapters, and stays where they are removed."""
    model = injected()
    model.layers[1].norm.requires_grad_(True)
    model.value_head = nn.Linear(WIDTH, 1)
    wake(model).layers[1].norm.weight.data.fill_(2.0)
    for _ in range(2):
        loradrop.save(model, tmp_path)
    assert caplog.text.count("layers.1.norm.weight, layers.1.norm.bias, value_head") == 1
    other = Net()
    with pytest.raises(ValueError, match=r"value_head\.weight: \(1, 8\) in the file, not there"):
        loradrop.load(other, tmp_path)
    other.value_head = nn.Linear(WIDTH, 1)
    loradrop.load(other, tmp_path)
    assert torch.equal(output(other), output(model)) and other.value_head.weight.requires_grad
    assert torch.equal(other.value_head.weight, model.value_head.weight)
    loradrop.remove(other)
    assert torch.equal(output(other), output(Net()))
    caplog.clear()
    loradrop.remove(model)
    assert "layers.1.norm.weight" in caplog.text and model.value_head.weight.requires_grad
    assert torch.equal(model.layers[1].norm.weight, torch.full((WIDTH,), 2.0))
    assert all(p.requires_grad for p in model.parameters())


def test_an_export_has_what_trains_since_injection(tmp_path: Any) -> None:
    model = bert()
    loradrop.inject(model, config())
    norm = wake(model).bert.encoder.layer[1].output.LayerNorm.requires_grad_(True)
    norm.weight.data.fill_(2.0)
    loradrop.export(model, tmp_path)
    report = loradrop.verify(model, tmp_path, [{"input_ids": IDS}])
    assert report.relative <= report.tolerance


def test_modules_to_save_that_were_resized(tmp_path: Any) -> None:
    model = llama()
    saved = ["embed_tokens", "lm_head"]
    loradrop.inject(model, config("q_proj", modules_to_save=saved))
    model.resize_token_embeddings(64)
    loradrop.save(model, tmp_path)
    other = llama()
    other.resize_token_embeddings(64)
    loradrop.load(other, tmp_path)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    loradrop.remove(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert model.lm_head.weight.shape[0] == 64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_disabled_sets_trained_modules_back(mode: Any) -> None:
    """And after them, bit for bit, what they had learnt; a graph made before stays usable."""
    model = injected()
    train(model)
    trained, loss = snapshot(model), model.eval()(IDS).square().sum()
    with pytest.raises(KeyError), mode(), loradrop.disabled(model), loradrop.disabled(model):
        assert torch.equal(model(IDS), Net().eval()(IDS))
        model.train()(IDS)  # moves the statistics of the normalisation
        raise KeyError
    assert_same(model, trained)
    loss.backward()
    loradrop.remove(model)
    assert torch.equal(output(model), output(Net()))


def test_disabled_with_tied_modules() -> None:
    model = llama(tie_word_embeddings=True)
    expected = model(IDS).logits
    loradrop.inject(model, config("q_proj", modules_to_save=["embed_tokens", "lm_head"]))
    model.lm_head.weight.data.mul_(2.0)
    trained = model(IDS).logits
    with loradrop.disabled(model):
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, trained)
