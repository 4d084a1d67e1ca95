"""The op under `torch.compile`: the custom ops `loradrop::lora_linear` and its backward.

The backend is chosen when the op runs, for the sizes it then has: "auto" is an unnamed one. What
the op returns does not depend on the choice. A tensor that is not there is empty; with dropout
there is always a mask, of zeros where the backend draws dropout again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loradrop.kernels.tiles import row_bytes
from loradrop.op import dispatch
from loradrop.op.call import Backend, Call, Grads, Needs, Output, Saved
from loradrop.op.function import Sinks, gradients, saved_of, saved_tensors

AUTO = "auto"
_FIELDS = len(Call._fields)


def run_op(call: Call, sinks: Sinks, name: str | None) -> tuple[Tensor, Tensor | None]:
    """y and sqnorm, None unless asked for."""
    y, _, _, sqnorm = forward_op(*call, *sinks, AUTO if name is None else dispatch.named(name).name)
    return y, sqnorm if call.sqnorm else None


def _serving(call: Call, name: str) -> Backend:
    return dispatch.serving(call, None if name == AUTO else name)


def _absent(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def _mask(call: Call) -> Tensor:
    if call.dropout == 0.0:
        return _absent(call.x, torch.uint8)
    return call.x.new_empty((call.x.shape[0], row_bytes(call.x.shape[1])), dtype=torch.uint8)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(*inputs[:_FIELDS])
    y, h, mask, sqnorm = _serving(call, inputs[-1]).forward(call)
    mask = _mask(call).zero_() if mask is None else mask
    return y, h, mask, _absent(call.x) if sqnorm is None else sqnorm


forward_op = torch.library.custom_op(
    "loradrop::lora_linear",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, Tensor? y0, Tensor A, Tensor B, "
    "float scaling, float dropout, Tensor? seed, Tensor? token_weights, bool sqnorm, "
    "Tensor? sqnorm_sink, Tensor? moment_sink, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


@forward_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(*inputs[:_FIELDS])
    m, r, n = call.x.shape[0], call.A.shape[0], call.B.shape[0]
    sqnorm = call.x.new_empty((), dtype=torch.float32) if call.sqnorm else _absent(call.x)
    return call.x.new_empty((m, n)), call.x.new_empty((m, r)), _mask(call), sqnorm


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    h: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    saved = Saved(x, weight, A, B, h, mask if dropout else None, seed, scaling, dropout)
    call = Call(x, weight, None, None, A, B, scaling, dropout, seed)
    grads = _serving(call, backend).backward(saved, dy, Needs(*needs))
    dx, dA, dB = (_absent(x) if grad is None else grad for grad in grads)
    return dx, dA, dB


# The schema comes from the signature.
_backward_op = torch.library.custom_op("loradrop::lora_linear_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    _dy, x, _weight, A, B, *_, needs, _backend = inputs
    dx, dA, dB = (
        like.new_empty(like.shape) if need else _absent(x)
        for like, need in zip((x, A, B), needs, strict=True)
    )
    return dx, dA, dB


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, sinks = Call(*inputs[:_FIELDS]), Sinks(*inputs[_FIELDS:-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved_tensors(call, sinks, Output(*output)))
    ctx.scaling, ctx.dropout, ctx.backend = call.scaling, call.dropout, inputs[-1]


def _gradients(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = Call(*ctx.needs_input_grad[:_FIELDS])

    def backward(saved: Saved, dy: Tensor, needs: Needs) -> Grads:
        grads = _backward_op(dy, *saved[:9], list(needs), ctx.backend)
        return Grads(*(grad if need else None for grad, need in zip(grads, needs, strict=True)))

    saved = saved_of(ctx.saved_tensors, ctx.scaling, ctx.dropout)
    needs = Needs(bool(wants.x), bool(wants.A), bool(wants.B))
    grads, of_sinks = gradients(backward, saved, dy, needs, ctx.needs_input_grad[_FIELDS:-1])
    rest = dict.fromkeys(Call._fields) | {"x": grads.x, "A": grads.A, "B": grads.B}
    rest["y0"] = dy if wants.y0 else None
    return *rest.values(), *of_sinks, None


forward_op.register_autograd(_gradients, setup_context=_setup_context)
