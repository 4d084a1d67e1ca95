"""What each method would train on a model: the numbers of `inject`, without weights or training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import Capsys, command, fails, works
from torch import nn
from transformers import AutoConfig

import loradrop
from loradrop import LoRAConfig
from loradrop.command.base_models import without_weights
from loradrop.command.counting import count, parameters
from loradrop.methods import available
from loradrop.methods.rasa import RaSA

TARGETS = ["query", "key", "value", "dense"]


def numbers(out: str) -> dict[str, int]:
    """method -> parameters, as the command prints them."""
    lines = [line.split() for line in out.splitlines()[1:]]
    return {name: int(count.replace(",", "")) for name, count, *_ in lines}


def test_the_numbers_are_those_of_inject(bert: str) -> None:
    found = parameters(bert, LoRAConfig(r=4, target_modules=TARGETS))
    assert list(found) == list(available())
    for name, cls in available().items():
        model = without_weights(bert).to_empty(device="cpu")
        config = LoRAConfig(r=4, target_modules=TARGETS, method=cls())
        assert found[name].parameters == loradrop.inject(model, config).trainable > 0
        assert found[name].changes == cls().warms_up


def test_nothing_is_drawn_or_changed(bert: str) -> None:
    model, drawn = without_weights(bert), torch.get_rng_state()
    before = [*model.state_dict()], [type(m) for m in model.modules()]
    assert all(p.is_meta for p in model.parameters())
    for cls in available().values():
        assert count(model, LoRAConfig(target_modules=TARGETS, method=cls())).parameters
    assert before == ([*model.state_dict()], [type(m) for m in model.modules()])
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_method_that_does_not_fit_says_why() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, device="meta") for _ in range(4)))
    config = LoRAConfig(r=3, target_modules=[str(i) for i in range(4)], method=RaSA(k=3))
    found = count(model, config)
    assert found.parameters is None and "k=3 for 0 of rank 3" in found.reason


def test_the_command(bert: str, tmp_path: Path, capsys: Capsys) -> None:
    layers = without_weights(bert).config.num_hidden_layers
    size = without_weights(bert).config.hidden_size
    whole = 2 * layers * 2 * size
    out = works(capsys, "methods", bert)
    assert numbers(out)["lora"] == 8 * whole and list(numbers(out)) == list(available())
    assert "at first: it decides after a warm-up" in out.split("lora_drop")[1].splitlines()[0]
    out = works(capsys, "methods", bert, "--rank", 2, "--targets", "query")
    assert numbers(out)["lora"] == whole
    file = tmp_path / "run.yaml"
    method = "{name: share_lora, share: AB}"
    file.write_text(f"model: {bert}\nlora: {{r: 4, target_modules: [query], method: {method}}}\n")
    found = numbers(works(capsys, "methods", file))
    assert found["lora"] == 2 * whole and found["share_lora"] == 2 * whole // layers


@pytest.mark.parametrize("command", ["methods", "tune"])
def test_the_revision_of_a_run(
    command: str, bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    """A file's `model.revision` is the one whose layers are counted, or measured."""
    asked, read = [], AutoConfig.from_pretrained

    def from_pretrained(where: str, revision: str | None = None) -> Any:
        asked.append(revision)
        return read(where)

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    file, points = tmp_path / "run.yaml", tmp_path / "points.json"
    file.write_text(f"{{model: {{id: {bert}, revision: v1}}, lora: {{method: lora}}}}")
    quick = ["--device", "cpu", "--tokens", 3, "--seconds", 0, "--out", points]
    works(capsys, command, file, *(quick if command == "tune" else []))
    assert asked == ["v1"]


def test_a_class_that_transformers_lacks(tmp_path: Path, capsys: Capsys) -> None:
    """The remedy is one of the command that was called."""
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["Mine"]}')
    of = f"the model {str(tmp_path)!r} is not a transformers model: "
    fails(capsys, of + "name one, or count in Python: loradrop.inject", "methods", tmp_path)
    fails(capsys, of + "give layer sizes instead, such as 4096x4096", "tune", tmp_path)


def test_where_nothing_matches_strict_is_no_remedy(bert: str, capsys: Capsys) -> None:
    """It would take what matches."""
    _, _, error = command(capsys, "methods", bert, "--targets", "qwery")
    assert error.strip().endswith("Correct the entry")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", 4], "--rank and --targets need a model"),
        (["BERT", "--targets", "qwery"], "'qwery' matches nothing"),
        (["BERT", "--targets", "query,qwery"], "strict=False (of a run: lora.strict=false)"),
        (["nowhere/at-all"], "the model 'nowhere/at-all' cannot be loaded"),
        (["no.yaml"], "no.yaml is not a file"),
    ],
)
def test_refusals(arguments: list[Any], message: str, bert: str, capsys: Capsys) -> None:
    fails(capsys, message, "methods", *(bert if a == "BERT" else a for a in arguments))
