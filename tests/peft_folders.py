"""Folders that PEFT wrote, and changed ones; `load` gives PEFT's own logits, or refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Make, assert_same, bert, llama, outputs, snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loradrop
from loradrop.formats.peft_file import CONFIG, TENSORS

peft = pytest.importorskip("peft")

# Both sides compute in float64 from the same float32 factors, in sums of fewer than 1000 terms.
SAME = {"rtol": 1e-10, "atol": 1e-10}
QV = {"target_modules": ["query", "value"]}
QKV = ["q_proj", "k_proj", "v_proj"]
KEY = "bert.encoder.layer.{}.attention.self.{}"
QUERY = KEY.format(1, "query")


class Plain(nn.Module):
    """Not a model of transformers: `lin` is also the end of the name `sub.lin`."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.sub = nn.Linear(size, size), nn.Sequential()
        self.sub.add_module("lin", nn.Linear(size, size))
        self.head = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 3))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = nn.functional.one_hot(input_ids % 16, 16).to(self.lin.weight)
        return {"y": self.head(self.sub(torch.tanh(self.lin(x))))}


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def trained(base: nn.Module, name: str = "default", **options: Any) -> Any:
    """PEFT's model over `base`, with every tensor that it would train away from its start."""
    model = peft.get_peft_model(base, peft.LoraConfig(**options), adapter_name=name)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            step = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.add_(step.to(parameter.dtype))
    return model


def saved(path: Path, make: Make = bert, **options: Any) -> Path:
    """A folder that PEFT wrote."""
    trained(make(), **{**QV, **options}).save_pretrained(path)
    return path


def loaded(path: Path, make: Make = bert) -> Any:
    """The adapters in `path`, in a fresh model."""
    model = make()
    loradrop.load(model, path)
    return model


def as_peft(path: Path, make: Make = bert) -> Tensor:
    """What PEFT computes from the folder."""
    return outputs(peft.PeftModel.from_pretrained(make(), str(path)).eval())


def agree(path: Path, make: Make = bert) -> Any:
    """The model loaded from the folder, once its outputs are PEFT's and not the base's."""
    model, expected = loaded(path, make), as_peft(path, make)
    torch.testing.assert_close(outputs(model), expected, **SAME)
    assert (outputs(make()) - expected).abs().max() > 1e-2
    return model


def rewrite(path: Path, **changes: Any) -> Path:
    """The folder with other options in its configuration."""
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | changes))
    return path


def retensor(path: Path, change: Any) -> Path:
    """The folder with other tensors: `change` gets them by their keys."""
    tensors = load_file(path / TENSORS)
    change(tensors)
    save_file(tensors, path / TENSORS, {"format": "pt"})
    return path


def put(key: str, value: Any) -> Any:
    return lambda tensors: tensors.update({key: value(tensors.get(key))})


def refused(message: str, path: Path, make: Make = bert) -> None:
    """By a ValueError, and the model stays as it is."""
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        loradrop.load(model, path)
    assert_same(model, before)
