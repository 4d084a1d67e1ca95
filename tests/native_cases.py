"""A small Bert whose adapters are saved in our own format, and loaded into a fresh one."""

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import bert, outputs
from torch import nn

import loradrop
from loradrop import LoRAConfig, LoraDropConfig

OURS = LoraDropConfig(r=4, lora_alpha=12)


def adapt(model: nn.Module, config: LoRAConfig = OURS) -> Any:
    return models.adapt(model, config)


def loaded(path: Path, found: Any = None) -> Any:
    """The adapters in `path`, in a fresh model."""
    found = bert() if found is None else found
    loradrop.load(found, path)
    return found


def same(one: nn.Module, two: nn.Module) -> bool:
    return torch.equal(outputs(one), outputs(two))


@pytest.fixture
def model() -> Any:
    return adapt(bert())


@pytest.fixture
def path(model: nn.Module, tmp_path: Path) -> Path:
    """The folder that holds the adapters of `model`."""
    loradrop.save(model, tmp_path)
    return tmp_path
