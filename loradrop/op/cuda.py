"""The CUDA kernels of csrc/ from Python: refusals with their reasons, and launches.

    gemm_ext   out = p·q + bias + s·h·l
    decode     y = xWᵀ + b + s·hBᵀ   h = xAᵀ   sqnorm = Σ_t w_t ‖s·B·h_t‖²   for up to 32 tokens

All operands in bfloat16, or all in float16; sums in float32. Launches go to the current stream.
Rows begin at multiples of 16 bytes: what does not is refused, never copied.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@functools.cache
def _extension() -> Any:
    """The module loradrop._C, or the reason why it is not there."""
    if importlib.util.find_spec("loradrop._C") is None:
        return "not built: LORADROP_BUILD_CUDA=1 pip install --no-build-isolation . does it"
    try:
        return importlib.import_module("loradrop._C")
    except ImportError as error:
        return f"built, but it does not load: {error}"


def built() -> dict[str, Any] | str:
    """What loradrop._C was built for (arch, cuda, debug), or why it is not there."""
    extension = _extension()
    return extension if isinstance(extension, str) else dict(extension.build_info())


@functools.cache
def _why_not_device(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) == (9, 0):
        return None
    return f"device {index} has compute capability {major}.{minor}, and the kernels need 9.0"


def missing() -> str | None:
    """Why the kernels cannot run on the current device, or None."""
    if isinstance(_extension(), str):
        return f"the extension loradrop._C is {_extension()}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _why_not_device(torch.cuda.current_device())


def _numbers(matrix: Tensor) -> tuple[int, int, int, int, int]:
    rows, columns = matrix.shape
    return matrix.data_ptr(), rows, columns, matrix.stride(0), matrix.stride(1)


def _demand(kernel: str, *operands: Tensor | None) -> None:
    """Raises ValueError for what forbids every kernel: where operands are, and of which type.

    Their shapes and layouts are the extension's to refuse, when it launches.
    """
    if reason := _why_not([operand for operand in operands if operand is not None]):
        raise ValueError(f"{kernel} cannot serve this call: {reason}")


def _why_not(operands: list[Tensor]) -> str | None:
    if isinstance(_extension(), str):
        return f"the extension loradrop._C is {_extension()}"
    first = operands[0]
    if first.device.type != "cuda":
        return f"the operands are on {first.device}, not on a CUDA device"
    if first.dtype not in _DTYPES:
        return f"the operands are {first.dtype}, and the kernels take bfloat16 and float16"
    for other in operands:
        if other.device != first.device or other.dtype != first.dtype:
            return (
                f"one operand is {first.dtype} on {first.device}, another {other.dtype} on "
                f"{other.device}"
            )
    return _why_not_device(first.device.index)


def _check_vector(name: str, vector: Tensor | None, like: Tensor, size: int) -> None:
    if vector is None:
        return
    if vector.shape != (size,) or vector.dtype != like.dtype or vector.device != like.device:
        raise ValueError(
            f"{name} is {tuple(vector.shape)}, {vector.dtype}, on {vector.device} where "
            f"({size},), {like.dtype}, on {like.device} is needed"
        )


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def why_not_gemm(p: Tensor, q: Tensor, h: Tensor | None, l: Tensor | None) -> str | None:
    """Why `gemm_ext` refuses these operands, or None."""
    if reason := _why_not([tensor for tensor in (p, q, h, l) if tensor is not None]):
        return reason
    rest = (None if tensor is None else _numbers(tensor) for tensor in (h, l))
    reason = _extension().why_not_gemm(_DTYPES[p.dtype], _numbers(p), _numbers(q), *rest)
    return None if reason is None else str(reason)


def gemm_ext(
    p: Tensor,
    q: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    l: Tensor | None,
    scaling: float,
    *,
    overlap: bool = False,
    tile_n: int = 0,
    cluster: int = 0,
) -> Tensor:
    """out = p·q + bias + s·h·l, the thin product added to the same float32 sums.

    p (M, R)   q (R, C)   bias (C,) or None   h (M, r)   l (r, C), both or neither   ->  out (M, C)

    p and h are row-major. q and l are row-major or the transpose of a row-major matrix: forward is
    (x, W.T, bias, h, B.T), the gradient of x is (dy, W, None, dy·B, A). A scaling of 1 is free,
    so a power of two belongs into l, where it is exact; any other costs one pass over the sums.
    With `overlap` the launch may begin before the one that was launched last has ended: only where
    that one writes h, and no other operand.

    Raises ValueError with the reason that `why_not_gemm` gives.
    """
    _demand("gemm_ext", p, q, h, l)
    _check_vector("bias", bias, p, q.shape[1])
    bias = None if bias is None else bias.contiguous()
    thin = h is not None and l is not None and scaling != 0.0
    out = p.new_empty((p.shape[0], q.shape[1]))
    _extension().gemm_ext(
        dtype=_DTYPES[p.dtype],
        out=_numbers(out),
        p=_numbers(p),
        q=_numbers(q),
        bias=_pointer(bias),
        h=_numbers(h) if h is not None and thin else None,
        l=_numbers(l) if l is not None and thin else None,
        scaling=float(scaling),
        overlap=overlap,
        device=p.device.index,
        stream=_stream(p.device),
        tile_n=tile_n,
        cluster=cluster,
    )
    return out


def _plan(weight: Tensor, cluster: int) -> tuple[int, int]:
    """(rows of weight that a CTA of `decode` keeps, CTAs)."""
    sms = torch.cuda.get_device_properties(weight.device).multi_processor_count
    rows, ctas = _extension().decode_plan(weight.shape[0], sms, cluster)
    return rows, ctas


def decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    token_weights: Tensor | None = None,
    norm: bool = False,
    *,
    cluster: int = 8,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, h, sqnorm or None) of up to 32 tokens, in one launch; the norm adds a second, tiny one.

    x (M, K)   weight (N, K)   bias (N,) or None   A (r, K)   B (N, r)   token_weights (M,) or None
    ->  y (M, N)   h (M, r)   sqnorm 0-dim, float32

    All row-major. h is unscaled and rounded, and its product is what y and sqnorm contain.

    Raises ValueError with the reason for operands that it cannot read: rows that do not begin at
    whole 16 bytes, more than 32 tokens, ranks over 128.
    """
    _demand("decode", x, weight, A, B)
    m, n = x.shape[0], weight.shape[0]
    _check_vector("bias", bias, x, n)
    bias = None if bias is None else bias.contiguous()
    if token_weights is not None:
        if token_weights.shape != (m,) or token_weights.device != x.device:
            raise ValueError(
                f"token_weights is {tuple(token_weights.shape)} on {token_weights.device} where "
                f"({m},) on {x.device} is needed"
            )
        token_weights = token_weights.float().contiguous()
    rows, ctas = _plan(weight, cluster)
    y, h = x.new_empty((m, n)), x.new_empty((m, A.shape[0]))
    planes = x.new_empty(ctas, dtype=torch.float32) if norm else None
    sqnorm = x.new_empty((), dtype=torch.float32) if norm else None
    _extension().decode(
        dtype=_DTYPES[x.dtype],
        y=y.data_ptr(),
        h=h.data_ptr(),
        x=_numbers(x),
        w=_numbers(weight),
        bias=_pointer(bias),
        a=_numbers(A),
        b=_numbers(B),
        scaling=float(scaling),
        weights=_pointer(token_weights),
        planes=_pointer(planes),
        sqnorm=_pointer(sqnorm),
        rows=rows,
        cluster=cluster,
        device=x.device.index,
        stream=_stream(x.device),
    )
    return y, h, sqnorm


def stream_floor(weight: Tensor, m: int, r: int, cluster: int = 8) -> None:
    """Reads weight (N, K) as `decode` of m tokens and rank r would, and does nothing with it.

    With `barrier_floor`, the time that `decode` cannot beat. For benchmarks.
    """
    _demand("stream_floor", weight)
    rows, _ = _plan(weight, cluster)
    _extension().stream_weight(
        dtype=_DTYPES[weight.dtype],
        w=_numbers(weight),
        rows=rows,
        stages=_extension().decode_stages(rows, m, r),
        device=weight.device.index,
        stream=_stream(weight.device),
    )


def barrier_floor(weight: Tensor, cluster: int = 8) -> None:
    """Two cluster barriers on the grid of `decode`, with no work between them. For benchmarks."""
    _demand("barrier_floor", weight)
    _, ctas = _plan(weight, cluster)
    device = weight.device
    _extension().cluster_barriers(
        cluster=cluster, ctas=ctas, device=device.index, stream=_stream(device)
    )
