"""The checks of the op's arguments against each other; the messages name what does not fit."""

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_operands(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    y0: Tensor | None = None,
) -> None:
    """Shapes and dtypes of the operands against each other."""
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise ValueError(
            f"A (r, K) is {_shape(A)} and B (N, r) is {_shape(B)}: their r must agree and be > 0"
        )
    if x.ndim == 0 or x.shape[-1] != A.shape[1]:
        raise ValueError(
            f"x (..., K) is {_shape(x)} and A (r, K) is {_shape(A)}: their K must agree"
        )
    n, k = B.shape[0], A.shape[1]
    for name, tensor, want in (
        ("weight", weight, (n, k)),
        ("bias", bias, (n,)),
        ("y0", y0, (*x.shape[:-1], n)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(want):
            raise ValueError(
                f"{name} is {_shape(tensor)}; x {_shape(x)}, A {_shape(A)} and B {_shape(B)} "
                f"need {tuple(want)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move one of them")
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} and x is {x.dtype}: "
                "cast one, or run under torch.autocast"
            )
    for name, tensor in (("x", x), ("A", A), ("B", B)):
        if tensor.dtype not in _FLOATS:
            raise TypeError(
                f"{name} is {tensor.dtype}: float64, float32, bfloat16 or float16 is needed"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move one of them")


def check_options(
    x: Tensor,
    dropout: float,
    seed: Tensor | None,
    token_weights: Tensor | None,
    sqnorm_sink: Tensor | None,
) -> None:
    """The keyword arguments against x; `dropout` is already in range."""
    if dropout > 0.0 and (
        seed is None or seed.ndim != 0 or seed.dtype != torch.int64 or seed.device != x.device
    ):
        raise ValueError(
            f"dropout={dropout:g} needs a seed: a 0-dim int64 tensor on {x.device}, got {seed!r}"
        )
    if token_weights is not None and token_weights.shape != x.shape[:-1]:
        raise ValueError(
            f"token_weights is {_shape(token_weights)} and x is {_shape(x)}: "
            f"{tuple(x.shape[:-1])} is needed"
        )
    if token_weights is not None and token_weights.device != x.device:
        raise ValueError(
            f"token_weights is on {token_weights.device} and x on {x.device}: move one"
        )
    if token_weights is not None and token_weights.is_complex():
        raise TypeError(f"token_weights is {token_weights.dtype}: give bool, integers or floats")
    if sqnorm_sink is not None and (sqnorm_sink.ndim != 0 or sqnorm_sink.dtype != torch.float64):
        raise ValueError(
            f"sqnorm_sink must be a 0-dim float64 leaf, got {_shape(sqnorm_sink)} of {sqnorm_sink.dtype}"
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
