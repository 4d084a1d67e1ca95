"""LoRA (Hu et al., arXiv:2106.09685): every target has its own A and B."""

from dataclasses import dataclass
from typing import ClassVar

from loradrop.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Plain LoRA. The rank, alpha and dropout are fields of `LoRAConfig`."""

    name: ClassVar[str] = "lora"
