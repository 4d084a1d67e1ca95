"""The op: a frozen linear map plus its LoRA delta, and the squared norm of that delta from the same
call.

    y = xWᵀ + b + s·hBᵀ       h = (mask∘x)Aᵀ/(1−p)       sqnorm = Σ_t w_t ‖s·B·h_t‖²

`reference.py` is the specification. One autograd Function serves the library (`function.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from loradrop.op import dispatch, philox
from loradrop.op.checks import check_operands, check_options
from loradrop.op.compiled import AUTO, forward_op
from loradrop.op.function import (
    Call,
    LoRAFunction,
    any_requires_grad,
    autocasting,
    forward,
    no_autocast,
    problem_of,
)

_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)


class _Options(NamedTuple):
    """The keyword arguments of `lora_linear` and `lora_add`."""

    dropout: float
    seed: Tensor | None
    token_weights: Tensor | None
    return_sqnorm: bool
    sqnorm_sink: Tensor | None
    backend: str | None


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
    sqnorm_sink: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """y = xWᵀ + b + s·(x Aᵀ)Bᵀ with W and b frozen (Hu et al., arXiv:2106.09685).

    x (..., K)   weight (N, K), any strides   bias (N,) or None   A (r, K)   B (N, r)
    ->  y (..., N)

    With `return_sqnorm`, (y, sqnorm): sqnorm = Σ_t w_t ‖s·B·h_t‖² over the rows t of x, a 0-dim
    float32 tensor without gradient (Zhou et al., COLING 2025). `token_weights`, of x's shape
    without its last axis and not negative, are the w_t; rows of weight 0 are left out whatever they
    hold. `dropout` is the probability p of dropping an element of x on its way into A; the mask is
    a function of `seed`, a 0-dim int64 tensor on x's device (`philox.keep_mask`). `sqnorm_sink`, a
    0-dim float64 leaf, receives sqnorm as its gradient in every backward pass. A and B may be of a
    wider type than x; they are rounded to it. A weight that requires a gradient gets it, through
    `lora_add`. `backend` names one of `dispatch.backends()`.

    Raises ValueError for shapes or values that do not fit, TypeError for dtypes, RuntimeError with
    its reason where a named backend cannot serve.
    """
    options = _Options(dropout, seed, token_weights, return_sqnorm, sqnorm_sink, backend)
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
    sqnorm_sink: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """y = y0 + s·(x Aᵀ)Bᵀ, for a base y0 (..., N) of x (..., K) that is no plain matrix product.

    Everything else as in `lora_linear`. y0 keeps its gradient and is not changed.
    """
    options = _Options(dropout, seed, token_weights, return_sqnorm, sqnorm_sink, backend)
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
    dropout, seed, token_weights, return_sqnorm, sqnorm_sink, backend = options
    device = x.device.type
    if autocasting(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias, y0 = _autocast(bias, dtype), _autocast(y0, dtype)
    check_operands(x, weight, bias, A, B, y0)
    dropout = philox.quantize(dropout)
    check_options(x, dropout, seed, token_weights, sqnorm_sink)
    rows, n = x.shape[:-1], B.shape[0]
    flat = x.reshape(-1, x.shape[-1])
    compiling = torch.compiler.is_compiling()
    needs_grad = torch.is_grad_enabled() and any_requires_grad(x, y0, A, B, sqnorm_sink)
    name = AUTO if backend is None else dispatch.known(backend)
    if not compiling:
        problem = problem_of(flat, weight, A, B, dropout, needs_grad)
        name = dispatch.resolve(backend, problem).name
    inputs = Call(
        flat,
        weight,
        bias,
        None if y0 is None else y0.reshape(-1, n),
        A,
        B,
        seed if dropout > 0.0 else None,
        None if token_weights is None else token_weights.reshape(-1),
        sqnorm_sink,
        float(scaling),
        dropout,
        return_sqnorm or sqnorm_sink is not None,
        name,
    )
    run: Callable[..., Any] = forward
    if compiling:
        run = forward_op
    elif needs_grad:
        run = LoRAFunction.apply
    with no_autocast(device):
        y, _, _, norm = run(*inputs)
    y = y.reshape(*rows, n)
    return (y, norm.detach()) if return_sqnorm else y


def _autocast(tensor: _Maybe, dtype: torch.dtype) -> _Maybe:
    if tensor is None or tensor.dtype in (dtype, torch.float64):
        return tensor
    return tensor.to(dtype)
