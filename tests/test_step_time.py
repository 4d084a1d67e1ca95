"""A part of a step's time: the backward pass ends above the layers that lose their adapters."""

import logging
from typing import Any

import models
import pytest
import training_runs as tiny
from transformers import OPTConfig, OPTForCausalLM

import loradrop
from loradrop import LoRAConfig, Spectral
from loradrop.remarks import tell_time_in_vain

MESSAGE = "budget_time=0.75 saves little or nothing"


def projected() -> Any:
    """With a projection of the embeddings, which is no layer's."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 32, "vocab_size": 50}
    return OPTForCausalLM(OPTConfig(**sizes))


def cut(model: Any, **options: Any) -> Any:
    """Without adapters in its lowest half."""
    models.adapt(model, r=2, target_modules="all-linear", **options)
    batches = [{"input_ids": ids} for ids in models.IDS[:, None]]
    found = loradrop.spectrum(loradrop.probe(model, batches, gram=True))
    ranks = loradrop.allocate(found, budget=0.5, budget_time=0.75)
    assert any(ranks.values())
    loradrop.truncate(model, ranks)
    return model


def reached(model: Any, name: str) -> bool:
    """Whether the gradient comes to the output of this module."""
    seen = []

    def watch(module: Any, given: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(seen.append)

    handle = model.get_submodule(name).register_forward_hook(watch)
    model.train()(input_ids=models.IDS, labels=models.IDS).loss.backward()
    handle.remove()
    return bool(seen)


@pytest.mark.parametrize(
    ("make", "layers"),
    [(models.llama, "model.layers"), (projected, "model.decoder.layers")],
    ids=["layers alone", "a projection below them"],
)
def test_the_backward_pass_ends_above_the_lowest_layers(
    make: Any, layers: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = cut(make())
    count = len(model.get_submodule(layers))
    assert not reached(model, f"{layers}.0") and reached(model, f"{layers}.{count - 1}")
    tell_time_in_vain(model, 0.75)
    assert MESSAGE not in caplog.text


def test_what_is_trained_whole_below_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = cut(models.llama(), modules_to_save=["embed_tokens"])
    assert reached(model, "model.layers.0")
    for _ in range(2):
        tell_time_in_vain(model, 0.75)
    assert caplog.text.count(MESSAGE) == 1 and "model.embed_tokens.weight" in caplog.text
    tell_time_in_vain(model, None)
    tell_time_in_vain(model, 1.0)
    assert len(caplog.records) == caplog.text.count("\n")


@pytest.mark.parametrize("whole", ["embeddings", "classifier"])
def test_the_method_says_it_before_it_trains(
    whole: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    method = Spectral(budget_time=0.75, cut_at=tiny.WARMUP)
    lora = LoRAConfig(r=4, target_modules="all-linear", method=method, modules_to_save=(whole,))
    caplog.set_level(logging.INFO, "loradrop")
    tiny.run(tmp_path, lora)
    said = [record.getMessage() for record in caplog.records]
    assert sum(MESSAGE in message for message in said) == (whole == "embeddings")
    if whole == "embeddings":
        told = next(i for i, message in enumerate(said) if MESSAGE in message)
        assert told < next(i for i, message in enumerate(said) if "parameters" in message)
