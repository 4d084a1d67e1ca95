"""The CUDA kernels of csrc/ from Python: refusals with their reasons, and launches.

    gemm_ext   out = p·q + bias + s·h·l
    gemm_lora  the same with h = t·p·a, made meanwhile
    decode     y = xWᵀ + b + s·hBᵀ   h = xAᵀ   sqnorm = Σ_t w_t ‖s·B·h_t‖²   for up to 32 tokens

All operands in bfloat16, or all in float16; sums in float32. Launches go to the current stream.
Rows begin at multiples of 16 bytes: what does not is refused, never copied.
"""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loradrop.kernels.stream import current_stream
from loradrop.kernels.tiles import new_rows
from loradrop.kernels.watch import tell

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
def _why_not_on(device: int | None) -> str | None:
    if isinstance(_extension(), str):
        return f"the extension loradrop._C is {_extension()}"
    if device is None:
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"device {device} has compute capability {major}.{minor}, and the kernels need 9.0"
    built = int(_extension().build_info()["cuda"].split(".")[0])
    known = torch._C._cuda_getDriverVersion() // 1000  # type: ignore[attr-defined]
    if built > known:
        return (
            f"the extension loradrop._C was built by CUDA {built}, and the driver knows {known}: "
            f"build it by an nvcc of CUDA {known}, or renew the driver"
        )
    return None


def missing() -> str | None:
    """Why the kernels can run on no device of this machine, or None."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reasons = [_why_not_on(device) for device in range(count)] or [_why_not_on(None)]
    return None if None in reasons else reasons[0]


def _why_not(first: Tensor, *others: Tensor | None) -> str | None:
    """What forbids every kernel: where operands are, and of which type.

    Their shapes and layouts are the extension's to refuse, when it launches.
    """
    if not first.is_cuda:
        return f"the operands are on {first.device}, not on a CUDA device"
    device, dtype = first.get_device(), first.dtype
    if dtype not in _DTYPES:
        return f"the operands are {dtype}, and the kernels take bfloat16 and float16"
    for other in others:
        if other is not None and (other.get_device() != device or other.dtype != dtype):
            return (
                f"one operand is {first.dtype} on {first.device}, another {other.dtype} on "
                f"{other.device}"
            )
    return _why_not_on(device)


def _demand(kernel: str, first: Tensor, *others: Tensor | None) -> None:
    if reason := _why_not(first, *others):
        raise ValueError(f"{kernel} cannot serve this call: {reason}")


def _vector(name: str, vector: Tensor | None, size: int, like: Tensor) -> Tensor | None:
    """The vector in one piece. Raises ValueError unless it is (size,), as `like` in all else."""
    if vector is None:
        return None
    if vector.shape != (size,) or vector.dtype != like.dtype or vector.device != like.device:
        raise ValueError(
            f"{name} is {tuple(vector.shape)}, {vector.dtype}, on {vector.device} where "
            f"({size},), {like.dtype}, on {like.device} is needed"
        )
    return vector.contiguous()


def _pairs(name: str, vector: Tensor | None, size: int, like: Tensor) -> Tensor | None:
    """As `_vector`, where it is read in pairs."""
    vector = _vector(name, vector, size, like)
    return vector.clone() if vector is not None and vector.data_ptr() % 4 != 0 else vector


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _form(matrix: Tensor | None) -> tuple[int, ...] | None:
    return None if matrix is None else (*matrix.shape, *matrix.stride())


def _numbers(matrix: Tensor | None) -> tuple[int, ...] | None:
    form = _form(matrix)
    return None if form is None else (_pointer(matrix), *form)


def _launch(
    kernel: str,
    matrices: Sequence[Tensor | None],
    pointers: Sequence[Tensor | None],
    *numbers: Any,
) -> None:
    """Launches a kernel of the extension on the device of the first matrix, on its current stream.

    It takes `matrices` with their sizes and strides, and of the others only where they begin; then
    `numbers`, all in the order of csrc/bindings.cpp: to look up names costs the host.
    """
    run, tensors = getattr(_extension(), kernel), (*matrices, *pointers)
    forms = [*map(_form, matrices)]
    device = next(tensor.get_device() for tensor in tensors if tensor is not None)

    def again(stream: int, addresses: Sequence[int]) -> None:
        given: list[Any] = [*addresses]
        for i, form in enumerate(forms):
            given[i] = None if form is None else (given[i], *form)
        run(device, stream, *given, *numbers)

    again(current_stream(device), [*map(_pointer, tensors)])
    tell(tensors, again)


def why_not_gemm(p: Tensor, q: Tensor, h: Tensor | None, l: Tensor | None) -> str | None:
    """Why `gemm_ext` refuses these operands, or None."""
    if reason := _why_not(p, q, h, l):
        return reason
    reason = _extension().why_not_gemm(_DTYPES[p.dtype], *map(_numbers, (p, q, h, l)))
    return None if reason is None else str(reason)


def _gemm(
    out: Tensor,
    p: Tensor,
    q: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    l: Tensor | None,
    scaling: float,
    a: Tensor | None = None,
    h_scale: float = 1.0,
    *,
    overlap: bool = False,
    tile_n: int = 0,
    cluster: int = 0,
) -> None:
    """Fills out with p·q + bias + s·h·l, and with an `a` h before that."""
    ready = None if a is None else p.new_empty(-(-p.shape[0] // 128), dtype=torch.int32)
    _launch(
        "gemm_ext", (out, p, q, h, l, a), (_pairs("bias", bias, q.shape[1], p), ready),
        _DTYPES[p.dtype], float(scaling), float(h_scale), overlap, tile_n, cluster,
    )  # fmt: skip


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
    if h is None or l is None or scaling == 0.0:
        h = l = None
    out = p.new_empty((p.shape[0], q.shape[1]))
    _gemm(out, p, q, bias, h, l, scaling, overlap=overlap, tile_n=tile_n, cluster=cluster)
    return out


@functools.lru_cache(maxsize=4096)
def streams(m: int, n: int, k: int, r: int, turned: bool, device: int) -> int:
    """How many clusters of `gemm_lora` would make h; 0 where it is better made before.

    Of p (m, k), q (k, n) and a (k, r), `turned` where a is the transpose of what lies in memory.
    The tiles' last wave leaves them without work anyway.
    """
    return int(_extension().gemm_streams(m, n, k, r, turned, device))


def gemm_lora(
    p: Tensor, q: Tensor, bias: Tensor | None, a: Tensor, l: Tensor, scaling: float, h_scale: float
) -> tuple[Tensor, Tensor]:
    """(out, h): out = p·q + bias + s·h·l with h = h_scale·p·a, rounded, in one launch.

    p (M, R)   q (R, C)   bias (C,) or None   a (R, r)   l (r, C)   ->  out (M, C)   h (M, r)

    q, a and l lie either way round: forward is (x, W.T, bias, A.T, B.T), the gradient of x is
    (dy, W, None, B, A). Only where `streams` is not 0.

    Raises ValueError with the reason for operands that it cannot read, as `gemm_ext`.
    """
    _demand("gemm_lora", p, q, a, l)
    m = p.shape[0]
    h, out = new_rows(p, m, a.shape[1]), p.new_empty((m, q.shape[1]))
    _gemm(out, p, q, bias, h, l, scaling, a, h_scale)
    return out, h


@functools.cache
def occupancy(device: int) -> dict[int, int]:
    """{CTAs of a cluster: how many such clusters of `decode` the device holds at once}.

    Empty where the kernels cannot run. The device is asked once.
    """
    if _why_not_on(device) is not None:
        return {}
    return dict(zip((1, 2, 4, 8), _extension().decode_occupancy(device), strict=True))


@functools.cache
def why_not_placed(device: int) -> str | None:
    """Why no cluster of `decode` has room on the device, or None."""
    reason = _extension().why_not_placed(tuple(occupancy(device).values()), 0)
    return None if reason is None else str(reason)


def _plan(weight: Tensor, r: int, cluster: int) -> tuple[int, int, int]:
    """(rows of weight that a CTA of `decode` keeps, CTAs of a cluster, CTAs)."""
    clusters = tuple(occupancy(weight.device.index).values())
    rows, cluster, ctas = _extension().decode_plan(weight.shape[0], r, clusters, cluster)
    return rows, cluster, ctas


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
    cluster: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, h, sqnorm or None) of up to 32 tokens, in one launch; the norm adds a second, tiny one.

    x (M, K)   weight (N, K)   bias (N,) or None   A (r, K)   B (N, r)   token_weights (M,) or None
    ->  y (M, N)   h (M, r)   sqnorm 0-dim, float32

    All row-major. h is unscaled and rounded, and its product is what y and sqnorm contain. The
    cluster is 1, 2, 4 or 8 CTAs that share the work on h, or 0 for those that fill the device best.

    Raises ValueError with the reason for operands that it cannot read: rows that do not begin at
    whole 16 bytes, more than 32 tokens, ranks over 128; and for a cluster that has no room.
    """
    _demand("decode", x, weight, A, B)
    m, n = x.shape[0], weight.shape[0]
    bias = _vector("bias", bias, n, x)
    planes = sqnorm = None
    if token_weights is not None:
        like = x.new_empty(0, dtype=torch.float32)
        token_weights = _vector("token_weights", token_weights.float(), m, like)
    rows, cluster, ctas = _plan(weight, A.shape[0], cluster)
    y, h = x.new_empty((m, n)), x.new_empty((m, A.shape[0]))
    if norm:
        planes, sqnorm = (x.new_empty(shape, dtype=torch.float32) for shape in ((ctas,), ()))
    _launch(
        "decode", (x, weight, A, B), (y, h, bias, token_weights, planes, sqnorm),
        _DTYPES[x.dtype], float(scaling), rows, cluster,
    )  # fmt: skip
    return y, h, sqnorm
