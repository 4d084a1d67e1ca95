"""The op's one autograd Function: inputs in their order, the forward, the gradients.

Under `torch.compile` the same forward and backward are custom ops (`compiled.py`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loradrop.kernels.tiles import machine_of
from loradrop.op import dispatch
from loradrop.op.costs import Problem

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
# y (M, N), h (M, r), mask (M, row_bytes(K)), sqnorm 0-dim. A mask or norm not there is empty.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Call(NamedTuple):
    """The inputs of the op in their order, x already (M, K)."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    y0: Tensor | None
    A: Tensor
    B: Tensor
    seed: Tensor | None
    token_weights: Tensor | None
    sqnorm_sink: Tensor | None
    scaling: float
    dropout: float
    norm: bool
    backend: str


def forward(*inputs: Any) -> Outputs:
    call = Call(*inputs)
    operands = call[:6]  # x to B
    y, h, mask, norm = dispatch.get(call.backend).forward(
        *operands, call.scaling, call.dropout, call.seed, call.token_weights, call.norm
    )
    return (
        y,
        h,
        nothing(call.x, torch.uint8) if mask is None else mask,
        nothing(call.x) if norm is None else norm,
    )


def nothing(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    call, (_, h, mask, norm) = Call(*inputs), output
    ctx.mark_non_differentiable(h, mask, norm)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(call.x, call.weight, call.A, call.B, h, mask, call.seed, norm)
    ctx.scaling, ctx.dropout, ctx.backend = call.scaling, call.dropout, call.backend


def gradients(run: Callable[..., Grads], ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """One gradient per input of `Call`. That of `sqnorm_sink` is the norm: autograd sums it over the
    passes.
    """
    x, weight, A, B, h, mask, seed, norm = ctx.saved_tensors
    sqnorm_sink = norm.double() if ctx.needs_input_grad[8] else None
    dx = dA = dB = None
    if dy is not None:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[4], ctx.needs_input_grad[5])
        with no_autocast(dy.device.type):
            dx, dA, dB = run(
                ctx.backend, dy, x, weight, A, B, h, mask, ctx.scaling, ctx.dropout, seed, needs
            )
    dy0 = dy if ctx.needs_input_grad[3] else None
    return dx, None, None, dy0, dA, dB, None, None, sqnorm_sink, None, None, None, None


def any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """The op chooses its own dtypes, also where autocast is on around `backward`."""
    return torch.autocast(device, enabled=False) if autocasting(device) else nullcontext()


def autocasting(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def run_backward(backend: str, *args: Any) -> Grads:
    dy, x, weight, A, B, h, mask, *rest = args
    mask = mask if mask.ndim == 2 else None
    return dispatch.get(backend).backward(dy, x, weight, A, B, h, mask, *rest)


def problem_of(
    x: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, dropout: float, grad: bool = True
) -> Problem:
    """What the dispatcher may know; x (M, K)."""
    (m, k), (n, r) = x.shape, B.shape
    arch, sms = machine_of(x.device)
    aligned = arch == 0 or (_aligned(x) and (weight is None or _aligned(weight)))
    return Problem(
        x.device.type, x.dtype, m, k, n, r, dropout, grad, weight is not None, arch, sms, aligned
    )


def _aligned(matrix: Tensor) -> bool:
    """Whether its rows, or those of its transpose, begin at whole 16 bytes."""
    row, column = matrix.stride()
    step = row if column == 1 else column if row == 1 else 1
    return step * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


class LoRAFunction(torch.autograd.Function):
    """The op with its gradients. W and b are frozen; sqnorm is not differentiable; once
    differentiable.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Outputs:
        # Not a separate setup_context: torch would inspect the signature in every call, for 40 µs.
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients(run_backward, ctx, dy)
