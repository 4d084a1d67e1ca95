"""A Trainer without our callback: checkpoints bring adapters back, and what it lacks is said."""

import logging
from pathlib import Path

import pytest
import training_runs as tiny
from trainer_cases import injected, tensors, trainer
from training_runs import At, StopError, equal, stop

import loradrop
from loradrop import LoRAConfig


@pytest.mark.parametrize("config", [tiny.PLAIN, tiny.CONFIGS["prilora"], tiny.CONFIGS["vera"]])
def test_a_plain_trainer_resumes_the_adapters(
    config: LoRAConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callbacks = [loradrop.LoraDropCallback()] if config.method.name == "prilora" else []
    model = injected(config)
    trainer(tmp_path, model, callbacks).train()
    with pytest.raises(StopError):
        stopping = At("stopped", 6, stop)
        trainer(tmp_path / "stopped", injected(config), [*callbacks, stopping]).train()
    resumed = injected(config)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path / "stopped", resumed, callbacks).train(resume_from_checkpoint=True)
    assert equal(tensors(resumed), tensors(model))
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text


def test_after_sharing_by_hand_a_plain_trainer_says_what_to_load(tmp_path: Path) -> None:
    model = injected(tiny.PLAIN)
    loradrop.share(model, [])
    trainer(tmp_path, model, max_steps=4).train()
    fresh = injected(tiny.PLAIN)
    with pytest.raises(RuntimeError, match=r"other layers share.*loradrop\.load"):
        trainer(tmp_path, fresh).train(resume_from_checkpoint=True)
    loradrop.load(fresh, tmp_path / "checkpoint-4")
    trainer(tmp_path, fresh, max_steps=6).train(resume_from_checkpoint=True)
    assert fresh.lora_bank.slots == model.lora_bank.slots


def test_a_warmup_that_nobody_makes_is_an_error(tmp_path: Path) -> None:
    model = injected()
    with pytest.raises(ValueError, match=r"decides after a warm-up.*LoraDropCallback"):
        trainer(tmp_path, model).train()
    assert (tmp_path / "checkpoint-2" / "loradrop_adapter" / "adapter.safetensors").exists()


@pytest.mark.parametrize("name", ["prilora", "adalora", "rm_lora", "lora"])
@pytest.mark.parametrize("called", [False, True])
def test_a_method_that_nobody_calls_is_named(
    name: str, called: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = injected(LoRAConfig(**tiny.LORA, method=loradrop.methods.get(name)()))
    loradrop.save(model, tmp_path / "start")
    trainer(tmp_path, model, [loradrop.LoraDropCallback()] * called).train()
    loradrop.save(model, tmp_path / "end")
    said = f"the method {name!r} acts at every step of training, and nothing called it"
    assert caplog.text.count(said) == (name != "lora" and not called)
    again = tiny.make_model()
    loradrop.load(again, tmp_path / "end")
    loradrop.save(again, tmp_path / "again")
    assert caplog.text.count(said) == (name != "lora" and not called)
