"""What the tests of layers share: sizes, modes, and a module around one layer."""

from typing import Any

import pytest
import torch
from models import WIDTH
from torch import Tensor, nn

import loradrop

K, N, R = WIDTH, 10, 4
each_mode = pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad]
)


def inject(model: nn.Module, *targets: str, **options: Any) -> loradrop.AdapterBank:
    config = loradrop.LoRAConfig(r=R, target_modules=list(targets), strict=False, **options)
    return loradrop.inject(model, config)


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer(x, *args, **kwargs)
