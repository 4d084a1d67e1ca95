"""What files hold of a model that is not as training left it, and what is said of that."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, adapt, llama, wake
from safetensors.torch import load_file
from training_runs import make_model, make_rows
from transformers import Trainer, TrainingArguments

import loradrop
from loradrop import LoRAConfig, methods

TARGETS = {"target_modules": ["q_proj", "v_proj"]}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def adapted(seed: int = 0, **options: Any) -> Any:
    """A model with adapters, and what is trained whole, at random."""
    model = llama()
    loradrop.inject(model, LoRAConfig(**{"r": 4} | TARGETS | options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


OPTIONS = {
    "prolora": [{"m": 2, "n": 2}, {"u": 2}],
    "spectral": [{"budget": 0.5}, {"scale": "fixed"}],
    "share_lora": [{"share": "B"}, {"share": "AB"}],
}
EDITED = [(name, options) for name, every in OPTIONS.items() for options in every]


@pytest.mark.parametrize(("name", "options"), EDITED)
def test_options_by_which_tensors_become_factors(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """An adapter, or a state dict, of other ones is refused with their name."""
    method = methods.get(name)
    model, other = adapted(method=method(**options)), adapted(method=method())
    loradrop.save(model, tmp_path)
    [option] = [key for key in options if key != "n"]
    with pytest.raises(ValueError, match=rf"another {option} \("):
        loradrop.load(other, tmp_path)
    other.lora_bank.adopts = True  # as where a Trainer resumes
    with pytest.raises(RuntimeError, match=rf"with other options than .*'{option}'"):
        other.load_state_dict(model.state_dict())
    again = adapted(1, method=method(**options))
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_options_that_change_nothing_do_not_matter(tmp_path: Path) -> None:
    model = adapted(method=methods.get("lora_drop")(budget=0.25))
    loradrop.share(model, [])
    loradrop.save(model, tmp_path)
    other = adapted(1, method=methods.get("lora_drop")(budget=0.75))
    loradrop.load(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_one_adapter_after_another(tmp_path: Path) -> None:
    """Of the first nothing is left, also where it alone trained a module whole."""
    first, second = adapted(1, modules_to_save=["norm"]), adapted(2)
    loradrop.save(first, tmp_path / "first")
    loradrop.save(second, tmp_path / "second")
    model = llama()
    for name, expected in (("first", first), ("second", second), ("first", first)):
        loradrop.load(model, tmp_path / name)
        assert torch.equal(logits(model), logits(expected)), name
    loradrop.remove(model)
    assert torch.equal(logits(model), logits(llama()))


def test_nothing_is_written_where_the_adapters_are_disabled(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["norm"])
    verbs: list[Callable[[], Any]] = [
        lambda: loradrop.save(model, tmp_path / "a"),
        lambda: loradrop.export(model, tmp_path / "b"),
        lambda: loradrop.export(model, tmp_path / "c", "merged"),
        lambda: loradrop.adapter_tensors(model),
        lambda: loradrop.merge(model),
    ]
    for verb in verbs:
        with loradrop.disabled(model), pytest.raises(ValueError, match="outside of it"):
            verb()
    assert list(tmp_path.iterdir()) == []
    loradrop.save(model, tmp_path / "a")
    plain = adapted()
    with loradrop.disabled(plain):  # there is nothing to mistake
        loradrop.save(plain, tmp_path / "d")
    saved = load_file(tmp_path / "d" / "adapter.safetensors")
    assert torch.equal(saved["bank.B.0"], plain.lora_bank.B[0])


def test_the_state_dict_of_a_merged_model() -> None:
    """Its weights hold the adapters, so that a model with adapters would have them twice."""
    model = adapted()
    expected, before = logits(model), model.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    loradrop.merge(model, keep_original=True)
    state, other = model.state_dict(), adapted(1)
    with pytest.raises(RuntimeError, match="taken while the adapters were merged"):
        other.load_state_dict(state)
    model.load_state_dict(state)  # it is merged itself
    torch.testing.assert_close(logits(model), expected)
    other.load_state_dict(before)
    assert torch.equal(logits(other), expected)


def test_a_part_that_saves_itself_says_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted()
    model.model.save_pretrained(tmp_path)
    assert "holds the base weights of model alone" in caplog.text
    own = type(model.model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(own(IDS)[0], llama().model(IDS)[0])
    loradrop.remove(model)
    assert "save_pretrained" not in model.model.__dict__


ACTING = {"prilora": {"prune_every": 2, "regrow": False}, "adalora": {}, "rm_lora": {}}
WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "save": loradrop.save,
    "export": loradrop.export,
    "merged": lambda model, path: loradrop.export(model, path, "merged"),
    "merge": lambda model, _: loradrop.merge(model),
    "in memory": lambda model, _: loradrop.adapter_tensors(model),
}


def train_alone(model: Any, folder: Path) -> None:
    """A stock Trainer without the callback."""
    args = TrainingArguments(
        str(folder), max_steps=3, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=make_rows()).train()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_method_that_nobody_called_is_named_by_all_that_write(
    writer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    loradrop.inject(model, loradrop.LoraDropConfig(r=4, target_modules=["query", "value"]))
    train_alone(model, tmp_path / "run")
    WRITERS[writer](model, tmp_path / "out")
    assert "decides after a warm-up, and none was made" in caplog.text


@pytest.mark.parametrize("name", ACTING)
def test_a_loaded_adapter_that_trains_on_without_its_method(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = methods.get(name)(**ACTING[name])
    config = LoRAConfig(r=4, target_modules=["query", "value"], method=method)
    first = make_model()
    loradrop.inject(first, config)
    loradrop.save(first, tmp_path / "first")
    model = make_model()
    loradrop.load(model, tmp_path / "first")
    loradrop.save(model, tmp_path / "as it was")
    assert "nothing called it" not in caplog.text
    train_alone(model, tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        loradrop.save(model, tmp_path / "second")
    assert (
        f"the method '{name}' acts at every step of training, and nothing called it" in caplog.text
    )


def test_an_adapter_that_was_never_trained_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As that of a layer whose weight the loss reads itself."""
    model = wake(adapt(llama()))
    first = model.lora_bank.targets[0].name
    with caplog.at_level(logging.WARNING):
        loradrop.export(model, tmp_path / "one")
        assert "never trained" not in caplog.text
        with torch.no_grad():
            model.lora_bank.B[0].zero_()
        loradrop.export(model, tmp_path / "two")
    assert f"the adapters of {first} are zero, as if they were never trained" in caplog.text
