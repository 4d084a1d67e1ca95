"""The op: a frozen linear map plus its LoRA delta, and the squared norm of that delta from the same
call.

    y = xWᵀ + b + s·hBᵀ       h = (mask∘x)Aᵀ/(1−p)       sqnorm = Σ_t w_t ‖s·B·h_t‖²

`reference.py` is the specification. One autograd Function serves the library; under `torch.compile`
the same forward and backward are the custom ops `loradrop::lora_linear` and
`loradrop::lora_linear_backward`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from loradrop import dispatch, philox
from loradrop.checks import check_operands, check_options
from loradrop.costs import Problem
from loradrop.kernels.config import machine_of

_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
# y (M, N), h (M, r), mask (M, row_bytes(K)), sqnorm 0-dim. A mask or norm not there is empty.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
_AUTO = "auto"


class _Call(NamedTuple):
    """The inputs of the op in their order, x already (M, K)."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    y0: Tensor | None
    A: Tensor
    B: Tensor
    seed: Tensor | None
    token_weights: Tensor | None
    statistic: Tensor | None
    scaling: float
    dropout: float
    norm: bool
    backend: str


class _Options(NamedTuple):
    """The keyword arguments of `lora_linear` and `lora_add`."""

    dropout: float
    seed: Tensor | None
    token_weights: Tensor | None
    return_sqnorm: bool
    statistic: Tensor | None
    backend: str | None


def _forward(*inputs: Any) -> Outputs:
    call = _Call(*inputs)
    operands = call[:6]  # x to B
    y, h, mask, norm = dispatch.get(call.backend).forward(
        *operands, call.scaling, call.dropout, call.seed, call.token_weights, call.norm
    )
    return (
        y,
        h,
        _nothing(call.x, torch.uint8) if mask is None else mask,
        _nothing(call.x) if norm is None else norm,
    )


def _nothing(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    call, (_, h, mask, norm) = _Call(*inputs), output
    ctx.mark_non_differentiable(h, mask, norm)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(call.x, call.weight, call.A, call.B, h, mask, call.seed, norm)
    ctx.scaling, ctx.dropout, ctx.backend = call.scaling, call.dropout, call.backend


def _gradients(run: Callable[..., Grads], ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """One gradient per input of `_Call`. That of `statistic` is the norm: autograd sums it over the
    passes.
    """
    x, weight, A, B, h, mask, seed, norm = ctx.saved_tensors
    statistic = norm.double() if ctx.needs_input_grad[8] else None
    dx = dA = dB = None
    if dy is not None:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[4], ctx.needs_input_grad[5])
        with _no_autocast(dy.device.type):
            dx, dA, dB = run(
                ctx.backend, dy, x, weight, A, B, h, mask, ctx.scaling, ctx.dropout, seed, needs
            )
    dy0 = dy if ctx.needs_input_grad[3] else None
    return dx, None, None, dy0, dA, dB, None, None, statistic, None, None, None, None


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """The op chooses its own dtypes, also where autocast is on around `backward`."""
    return torch.autocast(device, enabled=False) if _autocasting(device) else nullcontext()


def _autocasting(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _run(backend: str, *args: Any) -> Grads:
    dy, x, weight, A, B, h, mask, *rest = args
    mask = mask if mask.ndim == 2 else None
    return dispatch.get(backend).backward(dy, x, weight, A, B, h, mask, *rest)


def _problem(
    x: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, dropout: float, grad: bool = True
) -> Problem:
    """What the dispatcher may know; x (M, K)."""
    (m, k), (n, r) = x.shape, B.shape
    arch, sms = machine_of(x.device)
    return Problem(
        x.device.type, x.dtype, m, k, n, r, dropout, grad, weight is not None, arch, sms
    )


class LoRAFunction(torch.autograd.Function):
    """The op with its gradients. W and b are frozen; sqnorm is not differentiable; once
    differentiable.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Outputs:
        # Not a separate setup_context: torch would inspect the signature in every call, for 40 µs.
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(_run, ctx, dy)


# Under `torch.compile` the backend is chosen when the op runs, for the sizes it then has: "auto" is
# an unnamed one. What the op returns must not depend on the choice.


def _named(call: _Call) -> str:
    name = None if call.backend == _AUTO else call.backend
    problem = _problem(call.x, call.weight, call.A, call.B, call.dropout)
    return dispatch.resolve(name, problem).name


def _keeps_mask(call: _Call) -> bool:
    if call.dropout == 0.0:
        return False
    if call.backend == _AUTO:
        return call.x.device.type == "cuda"
    return dispatch.get(call.backend).masks


def _forward_now(*inputs: Any) -> Outputs:
    call = _Call(*inputs)
    y, h, mask, norm = _forward(*call._replace(backend=_named(call)))
    if _keeps_mask(call) and mask.ndim == 1:
        mask = mask.new_empty(call.x.shape[0], philox.row_bytes(call.x.shape[1]))  # never read
    return y, h, mask, norm


_forward_op = torch.library.custom_op(
    "loradrop::lora_linear",
    _forward_now,
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, Tensor? y0, Tensor A, Tensor B, Tensor? seed, "
    "Tensor? token_weights, Tensor? statistic, float scaling, float dropout, bool norm, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(*inputs: Any) -> Outputs:
    call = _Call(*inputs)
    (m, k), r, n = call.x.shape, call.A.shape[0], call.B.shape[0]
    mask = _nothing(call.x, torch.uint8)
    if _keeps_mask(call):
        mask = mask.new_empty(m, philox.row_bytes(k))
    norm = call.x.new_empty((), dtype=torch.float32) if call.norm else _nothing(call.x)
    return call.x.new_empty((m, n)), call.x.new_empty((m, r)), mask, norm


@torch.library.custom_op("loradrop::lora_linear_backward", mutates_args=())
def _backward_op(
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
    name = None if backend == _AUTO else backend
    backend = dispatch.resolve(name, _problem(x, weight, A, B, dropout)).name
    grads = _run(backend, dy, x, weight, A, B, h, mask, scaling, dropout, seed, tuple(needs))
    dx, dA, dB = (_nothing(x) if grad is None else grad for grad in grads)
    return dx, dA, dB


@_backward_op.register_fake
def _(
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
    dx, dA, dB = (
        like.new_empty(like.shape) if need else _nothing(x)
        for like, need in zip((x, A, B), needs, strict=True)
    )
    return dx, dA, dB


def _run_op(backend: str, *args: Any) -> Grads:
    *tensors, needs = args
    grads = _backward_op(backend, *tensors, list(needs))
    dx, dA, dB = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dx, dA, dB


_forward_op.register_autograd(
    lambda ctx, dy, *_: _gradients(_run_op, ctx, dy),
    setup_context=lambda ctx, inputs, output: _setup_context(ctx, inputs, output),
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    token_weights: Tensor | None = None,
    return_sqnorm: bool = False,
    statistic: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """y = xWᵀ + b + s·(x Aᵀ)Bᵀ with W and b frozen (Hu et al., arXiv:2106.09685).

    x (..., K)   weight (N, K), any strides   bias (N,) or None   A (r, K)   B (N, r)
    ->  y (..., N)

    With `return_sqnorm`, (y, sqnorm): sqnorm = Σ_t w_t ‖s·B·h_t‖² over the rows t of x, a 0-dim
    float32 tensor without gradient (Zhou et al., COLING 2025). `token_weights`, of x's shape
    without its last axis and not negative, are the w_t; rows of weight 0 are left out whatever they
    hold. `dropout` is the probability p of dropping an element of x on its way into A; the mask is
    a function of `seed`, a 0-dim int64 tensor on x's device (`philox.keep_mask`). `statistic`, a
    0-dim float64 leaf, receives sqnorm as its gradient in every backward pass. A and B may be of a
    wider type than x; they are rounded to it. A weight that requires a gradient gets it, through
    `lora_add`. `backend` names one of `dispatch.backends()`.

    Raises ValueError for shapes or values that do not fit, TypeError for dtypes, RuntimeError with
    its reason where a named backend cannot serve.
    """
    options = _Options(dropout, seed, token_weights, return_sqnorm, statistic, backend)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        check_operands(x, weight, bias, A, B)
        return _call(x, None, None, linear(x, weight, bias), A, B, scaling, options)
    return _call(x, weight, bias, None, A, B, scaling, options)


def lora_add(
    y0: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    token_weights: Tensor | None = None,
    return_sqnorm: bool = False,
    statistic: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """y = y0 + s·(x Aᵀ)Bᵀ, for a base y0 (..., N) of x (..., K) that is no plain matrix product.

    Everything else as in `lora_linear`. y0 keeps its gradient and is not changed.
    """
    options = _Options(dropout, seed, token_weights, return_sqnorm, statistic, backend)
    return _call(x, None, None, y0, A, B, scaling, options)


def _call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y0: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    options: _Options,
) -> Any:
    dropout, seed, token_weights, return_sqnorm, statistic, backend = options
    device = x.device.type
    if _autocasting(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias, y0 = _autocast(bias, dtype), _autocast(y0, dtype)
    check_operands(x, weight, bias, A, B, y0)
    dropout = philox.quantize(dropout)
    check_options(x, dropout, seed, token_weights, statistic)
    rows, n = x.shape[:-1], B.shape[0]
    flat = x.reshape(-1, x.shape[-1])
    compiling = torch.compiler.is_compiling()
    needs_grad = torch.is_grad_enabled() and _any_requires_grad(x, y0, A, B, statistic)
    name = _AUTO if backend is None else dispatch.known(backend)
    if not compiling:
        problem = _problem(flat, weight, A, B, dropout, needs_grad)
        name = dispatch.resolve(backend, problem).name
    inputs = _Call(
        flat,
        weight,
        bias,
        None if y0 is None else y0.reshape(-1, n),
        A,
        B,
        seed if dropout > 0.0 else None,
        None if token_weights is None else token_weights.reshape(-1),
        statistic,
        float(scaling),
        dropout,
        return_sqnorm or statistic is not None,
        name,
    )
    run: Callable[..., Any] = _forward
    if compiling:
        run = _forward_op
    elif needs_grad:
        run = LoRAFunction.apply
    with _no_autocast(device):
        y, _, _, norm = run(*inputs)
    y = y.reshape(*rows, n)
    return (y, norm.detach()) if return_sqnorm else y


def _autocast(tensor: _Maybe, dtype: torch.dtype) -> _Maybe:
    if tensor is None or tensor.dtype in (dtype, torch.float64):
        return tensor
    return tensor.to(dtype)
