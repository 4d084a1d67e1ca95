"""The op: a frozen linear map plus its LoRA delta, and the squared norm of that delta from the same
call.

    y = xWᵀ + b + s·hBᵀ       h = (mask∘x)Aᵀ/(1−p)       sqnorm = Σ_t w_t ‖s·B·h_t‖²

`reference.py` is the specification. One autograd Function serves the library (`function.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.functional import linear

from loradrop.op import dispatch
from loradrop.op.call import NO_SINKS, Call, Sinks
from loradrop.op.checks import check_base_gradient, check_operands, check_options, check_whole
from loradrop.op.compiled import run_op
from loradrop.op.function import autocasting, run, run_transformed, transformed
from loradrop.op.philox import quantize

_TENSORS = frozenset((Tensor, nn.Parameter))


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
    gram_in_sink: Tensor | None = None,
    core_sink: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """y = xWᵀ + b + s·(x Aᵀ)Bᵀ with W and b frozen (Hu et al., arXiv:2106.09685).

    x (..., K)   weight (N, K), any strides   bias (N,) or None   A (r, K)   B (N, r)
    ->  y (..., N)

    With `return_sqnorm`, (y, sqnorm): sqnorm = Σ_t w_t ‖s·B·h_t‖² over the rows t of x, a 0-dim
    float64 tensor without gradient (Zhou et al., COLING 2025). `token_weights`, of x's shape
    without its last axis and not negative, are the w_t; rows of weight 0 are left out whatever they
    hold. `dropout` is the probability p of dropping an element of x on its way into A; the mask is
    a function of `seed`, a 0-dim int64 tensor on x's device (`philox.keep_mask`).

    Sinks are float64 leaves on x's device that receive a statistic as their gradient in every
    backward pass: `sqnorm_sink` (0-dim) gets sqnorm, `moment_sink` (K,) gets Σ_t w_t x_tk² of the x
    before dropout, `gram_in_sink` (r, r) gets Σ_t w_t h_t h_tᵀ, and `core_sink` (r, r) gets
    Σ_t u_t h_tᵀ of u = dy·B.

    A and B may be of a wider type than x; they are rounded to it. A weight that requires a gradient
    gets it, through `lora_add`, which also serves a weight of a type of its own, such as a
    quantised one. `backend` names one of `dispatch.BACKENDS`.

    Raises ValueError for shapes or values that do not fit, TypeError for dtypes, RuntimeError with
    its reason where a named backend cannot serve.
    """
    call = Call(x, weight, bias, None, A, B, scaling, dropout, seed, token_weights, return_sqnorm)
    own = type(weight) not in _TENSORS and not isinstance(weight, FakeTensor)
    if own or weight.requires_grad or (bias is not None and bias.requires_grad):
        if own:
            check_whole(weight)
        cast = own or autocasting("cpu" if x.is_cpu else x.device.type)  # `linear` does it
        check_operands(call._replace(weight=None, bias=None) if cast else call)
        y0 = linear(x, weight, bias)
        check_base_gradient(x, y0, type(weight).__name__)
        call = call._replace(weight=None, bias=None, y0=y0)
    return _run(call, _sinks(sqnorm_sink, moment_sink, gram_in_sink, core_sink), backend)


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
    gram_in_sink: Tensor | None = None,
    core_sink: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """y = y0 + s·(x Aᵀ)Bᵀ, for a base y0 (..., N) of x (..., K) that is not a plain matrix product.

    Everything else as in `lora_linear`. y0 keeps its gradient and is not changed.
    """
    call = Call(x, None, None, y0, A, B, scaling, dropout, seed, token_weights, return_sqnorm)
    return _run(call, _sinks(sqnorm_sink, moment_sink, gram_in_sink, core_sink), backend)


def _sinks(*given: Tensor | None) -> Sinks:
    for sink in given:
        if sink is not None:
            return Sinks(*given)
    return NO_SINKS


def _run(call: Call, sinks: Sinks, backend: str | None) -> Any:
    """The op of a call as it came: x (..., K), dropout as it was asked for."""
    x, returns_sqnorm = call.x, call.sqnorm
    device = "cpu" if x.is_cpu else x.device.type
    if autocasting(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias, y0 = (_autocast(tensor, dtype) for tensor in call[:4])
        call = call._replace(x=x, weight=weight, bias=bias, y0=y0)
        with torch.autocast(device, enabled=False):  # the op chooses its own dtypes
            return _run(call, sinks, backend)
    check_operands(call)
    if call.dropout:
        call = call._replace(dropout=quantize(call.dropout))
    elif call.seed is not None:
        call = call._replace(seed=None)
    if sinks is not NO_SINKS:
        norm = returns_sqnorm or sinks.sqnorm is not None
        call = call._replace(sqnorm=norm, gram=sinks.gram_in is not None)
    check_options(call, sinks)
    rows = x.shape[:-1]
    if x.ndim != 2:
        call = _by_rows(call)
    grad = torch.is_grad_enabled() and _any_requires_grad(x, call.y0, call.A, call.B, *sinks)
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        y, sqnorm = run_op(call, sinks, backend, grad)
    elif transformed():
        y, sqnorm = run_transformed(call, sinks, backend)
    else:
        y, sqnorm = run(dispatch.serving(call, backend, grad), call, sinks, grad)
    if x.ndim != 2:
        y = y.reshape(*rows, y.shape[1])
    if not returns_sqnorm:
        return y
    assert sqnorm is not None
    return y, sqnorm.detach()


def _by_rows(call: Call) -> Call:
    """With x (M, K) and what goes with its rows."""
    y0, weights, m = call.y0, call.token_weights, call.x.shape[:-1].numel()
    return call._replace(
        x=call.x.reshape(m, call.x.shape[-1]),
        y0=None if y0 is None else y0.reshape(m, y0.shape[-1]),
        token_weights=None if weights is None else weights.reshape(-1),
    )


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    for tensor in tensors:  # noqa: SIM110 - a generator costs a microsecond
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _autocast(tensor: Tensor | None, dtype: torch.dtype) -> Any:
    if tensor is None or tensor.dtype in (dtype, torch.float64):
        return tensor
    return tensor.to(dtype)
