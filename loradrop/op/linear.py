"""The op: a frozen linear map plus its LoRA delta, and the squared norm of that delta from the same
call.

    y = xWᵀ + b + s·hBᵀ       h = (mask∘x)Aᵀ/(1−p)       sqnorm = Σ_t w_t ‖s·B·h_t‖²

`reference.py` is the specification. One autograd Function serves the library (`function.py`).
"""

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from loradrop.op import dispatch
from loradrop.op.call import Call
from loradrop.op.checks import check_operands, check_options
from loradrop.op.compiled import run_op
from loradrop.op.function import NO_SINKS, Sinks, autocasting, run
from loradrop.op.philox import quantize

_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)


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
    moment_sink: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """y = xWᵀ + b + s·(x Aᵀ)Bᵀ with W and b frozen (Hu et al., arXiv:2106.09685).

    x (..., K)   weight (N, K), any strides   bias (N,) or None   A (r, K)   B (N, r)
    ->  y (..., N)

    With `return_sqnorm`, (y, sqnorm): sqnorm = Σ_t w_t ‖s·B·h_t‖² over the rows t of x, a 0-dim
    float32 tensor without gradient (Zhou et al., COLING 2025). `token_weights`, of x's shape
    without its last axis and not negative, are the w_t; rows of weight 0 are left out whatever they
    hold. `dropout` is the probability p of dropping an element of x on its way into A; the mask is
    a function of `seed`, a 0-dim int64 tensor on x's device (`philox.keep_mask`).

    Sinks are float64 leaves on x's device that receive a statistic as their gradient in every
    backward pass: `sqnorm_sink` (0-dim) gets sqnorm, `moment_sink` (K,) gets Σ_t w_t x_tk² of the x
    before dropout.

    A and B may be of a wider type than x; they are rounded to it. A weight that requires a gradient
    gets it, through `lora_add`. `backend` names one of `dispatch.BACKENDS`.

    Raises ValueError for shapes or values that do not fit, TypeError for dtypes, RuntimeError with
    its reason where a named backend cannot serve.
    """
    y0 = None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        check_operands(x, weight, bias, None, A, B)
        y0 = linear(x, weight, bias)
    sinks = NO_SINKS
    if sqnorm_sink is not None or moment_sink is not None:
        sinks = Sinks(sqnorm_sink, moment_sink)
    return _run(
        x, weight if y0 is None else None, bias if y0 is None else None, y0, A, B,
        scaling, dropout, seed, token_weights, return_sqnorm, sinks, backend,
    )  # fmt: skip


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
    moment_sink: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """y = y0 + s·(x Aᵀ)Bᵀ, for a base y0 (..., N) of x (..., K) that is not a plain matrix product.

    Everything else as in `lora_linear`. y0 keeps its gradient and is not changed.
    """
    sinks = NO_SINKS
    if sqnorm_sink is not None or moment_sink is not None:
        sinks = Sinks(sqnorm_sink, moment_sink)
    return _run(
        x, None, None, y0, A, B,
        scaling, dropout, seed, token_weights, return_sqnorm, sinks, backend,
    )  # fmt: skip


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y0: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    token_weights: Tensor | None,
    return_sqnorm: bool,
    sinks: Sinks,
    backend: str | None,
) -> Any:
    device = "cpu" if x.is_cpu else x.device.type
    if autocasting(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias, y0 = _autocast(bias, dtype), _autocast(y0, dtype)
        with torch.autocast(device, enabled=False):  # the op chooses its own dtypes
            return _run(
                x, weight, bias, y0, A, B,
                scaling, dropout, seed, token_weights, return_sqnorm, sinks, backend,
            )  # fmt: skip
    check_operands(x, weight, bias, y0, A, B)
    dropout = quantize(dropout) if dropout else 0.0
    check_options(x, dropout, seed, token_weights, sinks)
    shape = x.shape
    if x.ndim != 2:
        x = x.reshape(-1, shape[-1])
        y0 = None if y0 is None else y0.reshape(-1, B.shape[0])
        token_weights = None if token_weights is None else token_weights.reshape(-1)
    call = Call(
        x, weight, bias, y0, A, B, float(scaling), dropout, seed if dropout else None,
        token_weights, return_sqnorm or sinks.sqnorm is not None,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        y, sqnorm = run_op(call, sinks, backend)
    else:
        grad = torch.is_grad_enabled() and _any_requires_grad(x, y0, A, B, *sinks)
        y, sqnorm = run(dispatch.serving(call, backend, grad), call, sinks, grad)
    if len(shape) != 2:
        y = y.reshape(*shape[:-1], B.shape[0])
    if not return_sqnorm:
        return y
    assert sqnorm is not None
    return y, sqnorm.detach()


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    for tensor in tensors:  # noqa: SIM110 - a generator costs a microsecond
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _autocast(tensor: _Maybe, dtype: torch.dtype) -> _Maybe:
    if tensor is None or tensor.dtype in (dtype, torch.float64):
        return tensor
    return tensor.to(dtype)
