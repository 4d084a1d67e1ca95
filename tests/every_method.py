"""Every method, and one from outside, on a small model with a training loop of one's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig, methods
from loradrop.bank import AdapterBank
from loradrop.injection import injection_of
from loradrop.methods import LoRA, Method
from loradrop.methods.adalora import AdaLoRA
from loradrop.methods.prilora import PRILoRA
from loradrop.scores import Scores, Target
from loradrop.statistics.collector import Collector
from loradrop.statistics.masks import EVERY_TOKEN

WIDTH, R, DEPTH = 10, 3, 3
TOTAL = 20  # steps, as a method is told them


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.query(x)) * self.value(x)
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.classifier = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


TARGETS = ("query", "value", "up")
X = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))
OWN = 3 * 2 * R * WIDTH * 2 + 3 * R * 3 * WIDTH  # query and value, and up


def net(method: Method | None = None, seed: int | None = None, **options: Any) -> Any:
    """The same model every time; `seed` draws other adapters."""
    torch.manual_seed(0)
    model = Net()
    if seed is not None:
        torch.manual_seed(seed)
    options = {"r": R, "lora_alpha": 5, "target_modules": TARGETS} | options
    loradrop.inject(model, LoRAConfig(method=method or LoRA(), **options))
    return model


def optimizer_of(model: Any) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)


def rolled(step: int) -> Tensor:
    """Inputs whose columns have another size in every step."""
    return X * torch.logspace(-1, 1, WIDTH).roll(step)


def train(
    model: Any, steps: int = 4, done: int = 0, optimizer: Any = None, rows: Any = lambda step: X
) -> Any:
    """A loop of one's own with the method's events, up to step `steps` after `done` of them."""
    bank, method = model.lora_bank, injection_of(model).config.method
    optimizer = optimizer or optimizer_of(model)
    names = method.statistics or ("sqnorm",)
    collector = Collector(model, bank, online=True, statistics=names, masking=EVERY_TOKEN)
    for step in range(done + 1, steps + 1):
        (model(rows(step).to(model.classifier.weight)) - 1.0).square().mean().backward()
        method.before_step(bank, step, TOTAL)
        optimizer.step()
        method.on_step_end(bank, step, collector.close_row())
        optimizer.zero_grad()
    collector.detach()
    return model


def by_sgd(model: Any, rows: Tensor, wrap: Any = lambda model: model, steps: int = 3) -> Any:
    """The factors after some steps of plain SGD, which no rounding of a gradient can turn round.

    wrap   makes the module that is called of the model
    """
    bank, method, called = model.lora_bank, injection_of(model).config.method, wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    names = method.statistics or ("sqnorm",)
    collector = Collector(model, bank, online=True, statistics=names, masking=EVERY_TOKEN)
    for step in range(1, steps + 1):
        (called(rows) - 1.0).square().mean().backward()
        method.before_step(bank, step, TOTAL)
        optimizer.step()
        method.on_step_end(bank, step, collector.close_row())
        optimizer.zero_grad()
    collector.detach()
    return values(model)


def loss(model: Any) -> float:
    x = X.to(model.classifier.weight)
    return float((model(x) - 1.0).square().mean().detach())


def values(model: Any) -> list[Tensor]:
    """The factors of every target, copied."""
    bank = model.lora_bank
    return [f.detach().clone() for i in range(len(bank.targets)) for f in bank.factors(i) or ()]


def scores(model: Any) -> Scores:
    """Rising with the layer."""
    targets = model.lora_bank.targets
    rows = torch.arange(1, len(targets) + 1, dtype=torch.float64)[None]
    found = injection_of(model).scores = Scores(targets, rows, tokens=1, source="offline")
    return found


@dataclass(frozen=True, kw_only=True)
class Core(Method):
    """A method of another package: one trained pair for all targets of a shape, and a trained
    r x r core for each target between the two.
    """

    name: ClassVar[str] = "core"
    start: float = 0.1

    def bank(
        self, targets: Sequence[Target], scaling: Sequence[float], likes: Sequence[Tensor]
    ) -> AdapterBank:
        return CoreBank(targets, scaling, self.start)


class CoreBank(AdapterBank):
    def __init__(self, targets: Sequence[Target], scaling: Sequence[float], start: float) -> None:
        super().__init__(targets, scaling)
        self.left, self.right = nn.ParameterDict(), nn.ParameterDict()
        for _, K, N, r in dict.fromkeys(t.group for t in targets):
            self.right[f"{r} {K}"] = torch.full((r, K), start)
            self.left[f"{N} {r}"] = torch.full((N, r), start)
        self.core = nn.ParameterList(torch.zeros(t.r, t.r) for t in targets)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def factors(self, i: int) -> tuple[Tensor, Tensor]:
        _, _, K, N, r = self.targets[i]
        return self.core[i] @ self.right[f"{r} {K}"], self.left[f"{N} {r}"]


EVERY: dict[str, Method] = {name: cls() for name, cls in methods.available().items()}
EVERY["prilora"] = PRILoRA(prune_every=2)
EVERY["adalora"] = AdaLoRA(t_initial=0.0, mask_every=1)  # also in a few steps
EVERY["from outside"] = Core()
