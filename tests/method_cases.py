"""What the tests of single methods share: a model whose targets have several shapes, and checks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig
from loradrop.bank import AdapterBank
from loradrop.methods import Method
from loradrop.scores import Target

LAYERS, R, ALPHA = 3, 3, 6.0
KINDS = {"query": (6, 6), "up": (6, 9), "down": (9, 6)}
EVERY = [*KINDS, "last"]
X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three layers of three kinds of targets, and a target that is alone of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({kind: nn.Linear(*size) for kind, size in KINDS.items()})
            for _ in range(LAYERS)
        )
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer["query"](x))
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return self.last(x)


def adapted(method: Method, names: Any = EVERY, seed: int = 0, **options: Any) -> Any:
    """(model, bank): the model is always the same, `seed` is that of the adapters."""
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(seed)
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": names} | options
    return model, loradrop.inject(model, LoRAConfig(method=method, **options))


def awake(bank: AdapterBank, seed: int = 1) -> Any:
    """The bank with a value of its own in every element that trains."""
    generator = torch.Generator().manual_seed(seed)
    for p in bank.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    return bank


def train(model: Any, steps: int = 4) -> Any:
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0
    )
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1.0).square().mean().backward()
        optimizer.step()
    return model


def grads(model: Any) -> list[Tensor]:
    """Of all parameters of the bank, for the loss of `train`."""
    loss = (model(X.to(next(model.parameters()))) - 1.0).square().mean()
    return list(torch.autograd.grad(loss, list(model.lora_bank.parameters())))


def factors(bank: AdapterBank) -> list[Tensor]:
    """A and B of every target, copied."""
    pairs = [bank.factors(i) for i in range(len(bank.targets))]
    return [factor.detach().clone() for pair in pairs if pair is not None for factor in pair]


def equal(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def trained_elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def by_kind(bank: AdapterBank) -> dict[str, list[tuple[int, Target]]]:
    """The targets with their numbers, kind by kind."""
    found: dict[str, list[tuple[int, Target]]] = {}
    for i, target in enumerate(bank.targets):
        found.setdefault(target.kind, []).append((i, target))
    return found


class _Deltas(nn.Module):
    def __init__(self, bank: AdapterBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self) -> tuple[Tensor, ...]:
        pairs = [self.bank.factors(i) for i in range(len(self.bank.targets))]
        return tuple(pair[1] @ pair[0] for pair in pairs if pair is not None)


def gradcheck(bank: AdapterBank) -> bool:
    """Whether the gradients through `factors` are those of finite differences, in float64."""
    awake(bank.double())
    deltas = _Deltas(bank)
    names = [name for name, _ in deltas.named_parameters()]
    inputs = [p.detach().clone().requires_grad_() for p in deltas.parameters()]

    def function(*values: Tensor) -> Any:
        return torch.func.functional_call(deltas, dict(zip(names, values, strict=True)), ())

    return torch.autograd.gradcheck(function, inputs)
