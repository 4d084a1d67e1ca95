"""LoRA (Hu et al., arXiv:2106.09685): every target has its own A and B.

    ΔW_i = s · B_i · A_i      s = lora_alpha / r

A_i (r, K) begins Kaiming-uniform with a = √5 and B_i (N, r) at zero, so the model is unchanged at
the start. Both train; a target costs r·(K + N) elements.
"""

from dataclasses import dataclass
from typing import ClassVar

from loradrop.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Plain LoRA. The rank, alpha and dropout are fields of `LoRAConfig`."""

    name: ClassVar[str] = "lora"
