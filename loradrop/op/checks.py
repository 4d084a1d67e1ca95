"""The checks of the op's arguments against each other; the messages name what does not fit.

They run in every call, so each is one comparison, and what a message needs is made when it is
raised.
"""

import torch
from torch import Tensor

from loradrop.op.call import NO_SINKS, Call, Sinks
from loradrop.ranks import ZERO_3, is_partitioned, is_sharded

_FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def check_whole(weight: Tensor) -> None:
    """Raises RuntimeError for a weight of which every rank computes a part."""
    if is_sharded(weight):
        raise RuntimeError(
            "the weight is a DTensor while its layer computes, as under tensor parallelism "
            "(parallelize_module, tp_plan), and its adapter is whole on every rank: not served. "
            "Use FSDP2 (fully_shard), which gathers the weight first"
        )


def check_base_gradient(x: Tensor, y0: Tensor, base: str) -> None:
    """Raises RuntimeError where y0 = base(x) has lost the gradient of x without a word.

    A base for inference alone does that, and all that comes before would train on the adapter's
    part of its gradient.
    """
    if x.requires_grad and torch.is_grad_enabled() and not y0.requires_grad:
        raise RuntimeError(no_gradient_of(base))


def no_gradient_of(base: str) -> str:
    """What is wrong with a base that gives its input no gradient, and what to do instead."""
    return (
        f"{base} gives its input no gradient, so what comes before it would train on a wrong one: "
        "it is for inference alone, as where activations are quantised too. Quantise weights only, "
        "or train on the base model without quantisation"
    )


def check_operands(call: Call) -> None:
    """Shapes, dtypes and devices of the operands; x (..., K) and y0 (..., N) as they came."""
    x, weight, bias, y0, A, B = call[:6]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] == 0:
        if is_partitioned(A):
            raise ValueError(ZERO_3)
        raise ValueError(
            f"A (r, K) is {_shape(A)} and B (N, r) is {_shape(B)}: their r must agree and be > 0"
        )
    k, n, dtype, device = A.shape[1], B.shape[0], x.dtype, x.device
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(
            f"x (..., K) is {_shape(x)} and A (r, K) is {_shape(A)}: their K must agree"
        )
    if weight is not None:
        _check_like_x("weight", weight, (n, k), call)
    if bias is not None:
        _check_like_x("bias", bias, (n,), call)
    if y0 is not None:
        _check_like_x("y0", y0, (*x.shape[:-1], n), call)
    if dtype not in _FLOATS or A.dtype not in _FLOATS or B.dtype not in _FLOATS:
        named = {"x": x, "A": A, "B": B}.items()
        name, of = next((name, t.dtype) for name, t in named if t.dtype not in _FLOATS)
        raise TypeError(f"{name} is {of}: float64, float32, bfloat16 or float16 is needed")
    if A.device != device or B.device != device:
        raise _elsewhere(*(("A", A) if A.device != device else ("B", B)), x)


def check_options(call: Call, sinks: Sinks) -> None:
    """The other arguments against x (..., K); `dropout` is in its range."""
    x, dropout, seed, token_weights = call.x, call.dropout, call.seed, call.token_weights
    if dropout and (
        seed is None or seed.ndim or seed.dtype != torch.int64 or seed.device != x.device
    ):
        raise ValueError(
            f"dropout={dropout:g} needs a seed: a 0-dim int64 tensor on {x.device}, got {seed!r}"
        )
    if token_weights is not None:
        if token_weights.shape != x.shape[:-1]:
            raise ValueError(
                f"token_weights is {_shape(token_weights)} and x is {_shape(x)}: "
                f"{tuple(x.shape[:-1])} is needed"
            )
        if token_weights.device != x.device:
            raise _elsewhere("token_weights", token_weights, x)
        if token_weights.is_complex():
            raise TypeError(
                f"token_weights is {token_weights.dtype}: give bool, integers or floats"
            )
    if sinks is not NO_SINKS:
        _check_sink("sqnorm_sink", sinks.sqnorm, (), x)
        _check_sink("moment_sink", sinks.moment, (x.shape[-1],), x)
        r = call.A.shape[0]
        _check_sink("gram_in_sink", sinks.gram_in, (r, r), x)
        _check_sink("core_sink", sinks.core, (r, r), x)


def _check_sink(name: str, sink: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if sink is None:
        return
    if sink.shape != shape or sink.dtype != torch.float64:
        raise ValueError(
            f"{name} must be a float64 leaf of shape {shape}, got {_shape(sink)} of {sink.dtype}"
        )
    if sink.device != x.device:
        raise _elsewhere(name, sink, x)


def _check_like_x(name: str, tensor: Tensor, want: tuple[int, ...], call: Call) -> None:
    x = call.x
    if tensor.shape != want:
        shapes = f"x {_shape(x)}, A {_shape(call.A)} and B {_shape(call.B)}"
        raise ValueError(f"{name} is {_shape(tensor)}; {shapes} need {want}")
    if tensor.device != x.device:
        raise _elsewhere(name, tensor, x)
    if tensor.dtype != x.dtype:
        raise TypeError(
            f"{name} is {tensor.dtype} and x is {x.dtype}: cast one, or run under torch.autocast"
        )


def _elsewhere(name: str, tensor: Tensor, x: Tensor) -> ValueError:
    return ValueError(f"{name} is on {tensor.device} and x on {x.device}: move one of them")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
