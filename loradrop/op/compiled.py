"""The op under `torch.compile`: the custom ops `loradrop::lora_linear` and its backward.

The backend is chosen when the op runs, for the sizes it then has. What the op returns does not
depend on the choice. A tensor that is not there is empty; with dropout there is always a mask, of
zeros where the backend draws dropout again.
"""

from typing import Any

import torch
from torch import Tensor

from loradrop.kernels.tiles import row_bytes
from loradrop.op import dispatch
from loradrop.op.call import Backend, Call, Grads, Needs, Output, Saved, Sinks
from loradrop.op.function import gradients, saved_of, saved_tensors

_FIELDS = len(Call._fields)


def run_op(call: Call, sinks: Sinks, name: str | None, grad: bool) -> tuple[Tensor, Tensor | None]:
    """y and sqnorm, None unless asked for; `grad`: whether there will be a backward pass."""
    if name is not None:
        dispatch.named(name)
    y, _, _, sqnorm, _ = forward_op(*call, *sinks, name, grad)
    return y, sqnorm if call.sqnorm else None


def _mask(call: Call) -> Tensor:
    shape = (call.x.shape[0], row_bytes(call.x.shape[1])) if call.dropout else (0,)
    return call.x.new_empty(shape, dtype=torch.uint8)


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    *_, name, grad = inputs
    call = Call(*inputs[:_FIELDS])
    y, h, mask, *statistics, _, _ = dispatch.serving(call, name, grad).forward(call)
    mask = _mask(call).zero_() if mask is None else mask
    empty = h.new_empty(0, dtype=torch.float64)
    found = (empty.clone() if value is None else value for value in statistics)
    return y, h.contiguous(), mask, *found


forward_op = torch.library.custom_op(
    "loradrop::lora_linear",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, Tensor? y0, Tensor A, Tensor B, "
    "float scaling, float dropout, Tensor? seed, Tensor? token_weights, bool sqnorm, bool gram, "
    "Tensor? sqnorm_sink, Tensor? moment_sink, Tensor? gram_in_sink, Tensor? core_sink, "
    "str? backend, bool grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@forward_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    call = Call(*inputs[:_FIELDS])
    x, m, r, n = call.x, call.x.shape[0], call.A.shape[0], call.B.shape[0]
    sqnorm = x.new_empty(() if call.sqnorm else (0,), dtype=torch.float64)
    gram = x.new_empty((r, r) if call.gram else (0,), dtype=torch.float64)
    return x.new_empty((m, n)), x.new_empty((m, r)), _mask(call), sqnorm, gram


def _backward(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *fields, needs, backend = inputs
    saved = Saved(*fields)
    saved = saved if saved.dropout else saved._replace(mask=None)
    grads = _serving(saved, backend).backward(saved, dy, Needs(*needs))
    return tuple(saved.h.new_empty(0) if grad is None else grad for grad in grads)


def _serving(saved: Saved, name: str | None) -> Backend:
    """Who serves the backward pass. Of an x that is not kept only its sizes count."""
    x, weight, A, B, h, _, seed, scaling, dropout = saved[:9]
    x = h.new_empty(h.shape[0], A.shape[1], device="meta") if x is None else x
    return dispatch.serving(Call(x, weight, None, None, A, B, scaling, dropout, seed), name)


_backward_op = torch.library.custom_op(
    "loradrop::lora_linear_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dy, Tensor? x, Tensor? weight, Tensor A, Tensor B, Tensor h, Tensor mask, "
    "Tensor? seed, float scaling, float dropout, Tensor? token_weights, bool[] needs, "
    "str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_backward_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    _dy, _x, _weight, A, B, h, *_, needs, _backend = inputs
    k = A.shape[1]
    made = (
        ((h.shape[0], k), h.dtype), (A.shape, A.dtype), (B.shape, B.dtype), ((k,), torch.float64),
    )  # fmt: skip
    wanted = zip(made, needs, strict=True)
    return tuple(
        h.new_empty(shape, dtype=dtype) if need else h.new_empty(0)
        for (shape, dtype), need in wanted
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, sinks = Call(*inputs[:_FIELDS]), Sinks(*inputs[_FIELDS:-2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved_tensors(call, sinks, Output(*output)))
    ctx.scaling, ctx.dropout, ctx.backend = call.scaling, call.dropout, inputs[-2]


def _gradients(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = Call(*ctx.needs_input_grad[:_FIELDS])

    def backward(saved: Saved, dy: Tensor, needs: Needs) -> Grads:
        grads = _backward_op(dy, *saved[:10], list(needs), ctx.backend)
        return Grads(*(grad if need else None for grad, need in zip(grads, needs, strict=True)))

    saved = saved_of(ctx.saved_tensors, ctx.scaling, ctx.dropout)
    needs = Needs(bool(wants.x), bool(wants.A), bool(wants.B))
    grads, of_sinks = gradients(backward, saved, dy, needs, ctx.needs_input_grad[_FIELDS:-2])
    rest = dict.fromkeys(Call._fields) | {"x": grads.x, "A": grads.A, "B": grads.B}
    rest["y0"] = dy if wants.y0 else None
    return *rest.values(), *of_sinks, None, None


forward_op.register_autograd(_gradients, setup_context=_setup_context)
