"""Small models with adapters, and what surgery is tested with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import bert, gpt2, wake
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig

WIDTH, R = 8, 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mix, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mix(self.query(x).tanh() * self.value(x)))


class Net(nn.Module):
    """Embedding, three layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.classifier = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x.mean(1))


def config(*targets: str, **options: Any) -> LoRAConfig:
    options = {"target_modules": list(targets or ("query", "value")), **options}
    return LoRAConfig(r=R, **options)


def injected(*targets: str, **options: Any) -> Any:
    """A `Net` with B away from zero."""
    model = Net()
    loradrop.inject(model, config(*targets, **options))
    return wake(model, 0.25)


def names(bank: loradrop.AdapterBank) -> list[str]:
    return [target.name for target in bank.targets]


IDS = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def output(model: nn.Module) -> Tensor:
    """In eval mode, and the mode kept."""
    training = model.training
    with torch.no_grad():
        y = model.eval()(IDS)
    model.train(training)
    return y if isinstance(y, Tensor) else y.logits


def train(model: nn.Module) -> None:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        y = model(IDS)
        (y if isinstance(y, Tensor) else y.logits).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "net": (Net, ["query", "value"]),
    "bert": (bert, ["query", "value", "dense"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
}
each_model = pytest.mark.parametrize(("make", "targets"), MODELS.values(), ids=MODELS)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Tied(Twice):
    """Two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
