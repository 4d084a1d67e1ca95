"""LoRAFusion's scheme (arXiv 2510.00206), written anew from its description: "graph splitting".

    forward    x̂ = mask∘x/(1−p), and the mask as bytes     h = x̂Aᵀ     y  = xWᵀ + s·hBᵀ
    backward   dh = s·dyB and dB = s·dyᵀh                   dA = dhᵀx̂   dx = dyW + mask∘(dhA)/(1−p)

Reproduced is its traffic: a masked copy of x and a byte an element are written and read again; y
and dx are one kernel each, with the LoRA product first in the accumulator; dy is read once for dB
and dh. The fused products are our `gemm_ext`; everything thin is cuBLAS's. What differs, and how:

- dB and dh: two products over a block of rows that stays in L2, where LoRAFusion has one kernel
  with atomics. Partial sums are added in float32, in their order.
- `gemm_ext` reads a mask of bits. The bytes are packed once before dx, which reads them once as the
  original does, and moves a quarter more.
- Without dropout there is neither a copy nor a mask; the original cannot do without.

Where the Triton kernels cannot run, PyTorch computes the same products.
"""

from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Output
from machine import problem
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from loradrop.op import dispatch

_L2_PART = 0.4  # of the cache that a block of dy may take


def rows_per_block(dy: Tensor) -> int:
    """How many rows of dy (M, N) stay in L2 from the first product to the second."""
    if dy.device.type != "cuda":
        return max(1, dy.shape[0])
    cache = torch.cuda.get_device_properties(dy.device).L2_cache_size
    return max(256, int(_L2_PART * cache / (dy.shape[1] * dy.element_size())))


def thin_gradients(dy: Tensor, B: Tensor, h: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dh = s·dyB (M, r) and dB = s·dyᵀh (N, r), from one read of dy (M, N)."""
    block = rows_per_block(dy)
    dh, dB = dy.new_empty(h.shape), torch.zeros(B.shape, dtype=torch.float32, device=dy.device)
    for start in range(0, dy.shape[0], block):
        rows = slice(start, start + block)
        torch.mm(dy[rows], B, out=dh[rows])
        dB += dy[rows].T @ h[rows]
    return dh.mul_(scaling), dB.mul_(scaling).to(B.dtype)


def pack(kept: Tensor) -> Tensor:
    """The bits (M, C / 8) uint8 of a mask (M, C) of bytes, lowest bit first; C a multiple of 32."""
    from pack_bits import WORDS, pack_bits

    m, columns = kept.shape
    bits = torch.empty(m, columns // 8, dtype=torch.uint8, device=kept.device)
    words = bits.view(torch.int32)
    grid, count = (-(-words.numel() // WORDS),), words.numel()
    pack_bits[grid](kept.view(torch.uint8), words, count, WORDS=WORDS)
    return bits


def extend(
    p: Tensor, q: Tensor, bias: Tensor | None, h: Tensor, l: Tensor, s: float, kept: Tensor | None
) -> Tensor:
    """p·q + bias + s·mask∘(h·l), the LoRA product first.

    p (M, D)   q (D, C)   h (M, r)   l (r, C)   kept (M, C) bool or None
    """
    triton, layer = dispatch.named("triton"), problem(p, q.shape[1], h.shape[1])
    packable = kept is None or kept.shape[1] % 32 == 0
    if not packable or triton.missing() or triton.why_not(layer):
        delta = (h @ l).mul_(s)
        return F.linear(p, q.T, bias).add_(delta if kept is None else delta * kept)
    from loradrop.kernels import tiles as config
    from loradrop.kernels.gemm_ext import gemm_ext

    machine = config.machine_of(p.device)
    tiles = config.gemm_ext(machine, p.dtype, p.shape[0], q.shape[1], first=True)
    mask, programs = None if kept is None else pack(kept), machine.sms * tiles.per_sm
    return gemm_ext(p, q, bias, h, l, s, tiles, programs, mask=mask, first=True)[0]


class GraphSplit(torch.autograd.Function):
    """The scheme as one function of x, W, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        s: float,
        p: float,
    ) -> Tensor:
        dropped, kept = torch.native_dropout(x, p, True) if p else (x, None)
        h = dropped @ A.T
        ctx.save_for_backward(dropped, W, A, B, h, kept)
        ctx.scaling, ctx.dropout = s, p
        return extend(x, W.T, b, h, B.T, s, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, W, A, B, h, kept = ctx.saved_tensors
        dh, dB = thin_gradients(dy, B, h, ctx.scaling)
        dx = extend(dy, W, None, dh, A, 1.0 / (1.0 - ctx.dropout), kept)
        return dx, None, None, dh.T @ dropped, dB, None, None


def graph_split(case: Case) -> Callable[[], Output]:
    """The scheme on the operands of a case."""
    operands = (case.x, case.weight, case.bias, case.A, case.B, case.scaling, case.dropout)
    return lambda: (GraphSplit.apply(*operands), None)
