"""The op under `torch.compile`: the custom ops `loradrop::lora_linear` and its backward.

The backend is chosen when the op runs, for the sizes it then has: "auto" is an unnamed one. What
the op returns does not depend on the choice.
"""

from typing import Any

import torch
from torch import Tensor

from loradrop.op import dispatch, philox
from loradrop.op.function import (
    Call,
    Grads,
    Outputs,
    forward,
    gradients,
    nothing,
    problem_of,
    run_backward,
    setup_context,
)

AUTO = "auto"


def _named(call: Call) -> str:
    name = None if call.backend == AUTO else call.backend
    problem = problem_of(call.x, call.weight, call.A, call.B, call.dropout)
    return dispatch.resolve(name, problem).name


def _keeps_mask(call: Call) -> bool:
    if call.dropout == 0.0:
        return False
    if call.backend == AUTO:
        return call.x.device.type == "cuda"
    return dispatch.get(call.backend).masks


def _forward(*inputs: Any) -> Outputs:
    call = Call(*inputs)
    y, h, mask, norm = forward(*call._replace(backend=_named(call)))
    if _keeps_mask(call) and mask.ndim == 1:
        mask = mask.new_empty(call.x.shape[0], philox.row_bytes(call.x.shape[1]))  # never read
    return y, h, mask, norm


forward_op = torch.library.custom_op(
    "loradrop::lora_linear",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, Tensor? y0, Tensor A, Tensor B, Tensor? seed, "
    "Tensor? token_weights, Tensor? sqnorm_sink, float scaling, float dropout, bool norm, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


@forward_op.register_fake
def _(*inputs: Any) -> Outputs:
    call = Call(*inputs)
    (m, k), r, n = call.x.shape, call.A.shape[0], call.B.shape[0]
    mask = nothing(call.x, torch.uint8)
    if _keeps_mask(call):
        mask = mask.new_empty(m, philox.row_bytes(k))
    norm = call.x.new_empty((), dtype=torch.float32) if call.norm else nothing(call.x)
    return call.x.new_empty((m, n)), call.x.new_empty((m, r)), mask, norm


def _backward(
    backend: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    h: Tensor,
    mask: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    name = None if backend == AUTO else backend
    backend = dispatch.resolve(name, problem_of(x, weight, A, B, dropout)).name
    operands = (dy, x, weight, A, B, h, mask)
    grads = run_backward(backend, *operands, scaling, dropout, seed, tuple(needs))
    dx, dA, dB = (nothing(x) if grad is None else grad for grad in grads)
    return dx, dA, dB


# The schema comes from the signature.
_backward_op = torch.library.custom_op("loradrop::lora_linear_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    _backend, _dy, x, _weight, A, B, *_rest, needs = inputs
    dx, dA, dB = (
        like.new_empty(like.shape) if need else nothing(x)
        for like, need in zip((x, A, B), needs, strict=True)
    )
    return dx, dA, dB


def _run_op(backend: str, *args: Any) -> Grads:
    *tensors, needs = args
    grads = _backward_op(backend, *tensors, list(needs))
    dx, dA, dB = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dx, dA, dB


forward_op.register_autograd(
    lambda ctx, dy, *_: gradients(_run_op, ctx, dy),
    setup_context=lambda ctx, inputs, output: setup_context(ctx, inputs, output),
)
