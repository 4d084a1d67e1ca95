"""Models in the shape of Llama, for training steps: their layers, and who serves those."""

import subprocess
import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from lib import ROOT, package

RANK = 16
TUNING, PATIENCE = 0.2, 60.0  # seconds of `loradrop tune`: of timing a layer, for a backend


class Size(NamedTuple):
    """A model in the shape of Llama, and what it is fed."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    words: int
    batch: int
    tokens: int
    dtype: torch.dtype


SIZES = {
    "tiny": Size(32, 64, 4, 4, 2, 64, 2, 16, torch.float32),
    "1b": Size(2048, 8192, 16, 32, 8, 128256, 4, 2048, torch.bfloat16),
    "8b": Size(4096, 14336, 32, 32, 8, 128256, 4, 2048, torch.bfloat16),
}


def build(size: Size, device: str) -> nn.Module:
    """The base model, born on the device in its dtype: nothing larger ever exists."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.words,
        max_position_embeddings=size.tokens,
        tie_word_embeddings=size.hidden < SIZES["8b"].hidden,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=size.dtype)
    return model.requires_grad_(False)


def layers(size: Size) -> list[tuple[int, int]]:
    """K and N of the distinct layers that get an adapter."""
    hidden, kv = size.hidden, size.hidden // size.heads * size.kv_heads
    return [(hidden, hidden), (hidden, kv), (hidden, size.inner), (size.inner, hidden)]


def problems(size: Size, device: str) -> dict[str, Any]:
    """KxN -> what the dispatcher is asked about the layer."""
    return package.in_training(layers(size), RANK, size.batch * size.tokens, size.dtype, device)


def unmeasured(size: Size, device: str) -> list[str]:
    """KxN of the layers whose backend would be a guess."""
    return [layer for layer, of in problems(size, device).items() if not package.measured(of)]


def tune(size: Size, device: str) -> str | None:
    """Has `loradrop tune` measure the layers of which nothing is measured here, for this machine:
    why some still are not, or None.
    """
    missing = unmeasured(size, device)
    if not missing:
        return None
    command = [sys.executable, "-m", "loradrop", "tune", ",".join(missing), "--train"]
    given = {"rank": RANK, "tokens": size.batch * size.tokens, "dtype": str(size.dtype)[6:]}
    given |= {"device": device, "seconds": TUNING, "limit": PATIENCE}
    for name, value in given.items():
        command += [f"--{name}", str(value)]
    status = subprocess.run(command, cwd=ROOT).returncode
    left = ", ".join(unmeasured(size, device))
    return f"loradrop tune ended with {status}, and did not measure {left}" if left else None


def choices(size: Size, device: str, without: list[str]) -> dict[str, str]:
    """Who serves which layer, and why, once some are left out.

    Raises AssertionError where one of them would serve all the same, for want of another.
    """
    package.leave_out(without)
    chosen = {layer: package.choice(asked) for layer, asked in problems(size, device).items()}
    for layer, why in chosen.items():
        name = why.split(":")[0]
        assert name not in without, f"nobody serves {layer} without {name}, which is left out"
    return chosen
