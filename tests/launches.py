"""What the launchers launch, without a device: every kernel with its arguments, on meta tensors.

Triton specialises a kernel for the types of its arguments, for integers that are 1 and for those
that are multiples of 16. `record` notes the same, so that what is compiled ahead of time is what a
GPU would be asked to run.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from loradrop.kernels import tiles
from loradrop.kernels.tiles import Machine
from loradrop.op.call import Call, Needs, Saved

SMS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}  # of a chip that many have
MACHINES = {arch: Machine(arch, sms) for arch, sms in SMS.items()}

_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


class Launch(NamedTuple):
    """One specialisation of a kernel: what makes one binary."""

    kernel: str
    signature: tuple[tuple[str, str], ...]  # argument -> Triton's type, or constexpr
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments that are multiples of 16
    warps: int
    stages: int


def _type(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        shape = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_NAMES[value.base.dtype]}[{shape}]>"
    if isinstance(value, Tensor):
        return f"*{_NAMES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), value
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _launch(function: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    given = dict(zip(function.arg_names, args, strict=False)) | kwargs
    assert set(given) == set(function.arg_names), set(given) ^ set(function.arg_names)
    constants, signature, aligned = {}, {}, []
    declared = {parameter.name for parameter in function.params if parameter.is_constexpr}
    plain = {parameter.name for parameter in function.params if parameter.do_not_specialize}
    for name in function.arg_names:
        value = given[name]
        one = isinstance(value, int) and value == 1 and name not in plain
        if name in declared or value is None or one:
            constants[name], signature[name] = value, "constexpr"
            continue
        signature[name] = _type(value)
        multiple = isinstance(value, int) and value % 16 == 0 and name not in plain
        if isinstance(value, Tensor) or multiple:
            aligned.append(name)
    return Launch(
        function.fn.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        options.get("num_warps", 4),
        options.get("num_stages", 3),
    )


@contextmanager
def record(machine: Machine) -> Iterator[dict[Launch, JITFunction]]:
    """The launches within, each once, on `machine`; nothing runs."""
    found: dict[Launch, JITFunction] = {}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(size > 0 for size in grid), (self, grid)
        found.setdefault(_launch(self, args, dict(kwargs)), self)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tiles, "machine_of", lambda _: machine),
    ):
        yield found


class Layer(NamedTuple):
    """A call of the op with its backward pass."""

    m: int
    k: int
    n: int
    r: int
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0
    norm: bool = False
    gram: bool = False
    weighted: bool = False
    turned: bool = False  # the weight is stored (K, N)
    scaling: float = 2.0
    adapters: torch.dtype = torch.float32
    bias: bool = False
    added: bool = False  # y0 is given, and no weight
    moment: bool = False


def call(fused: Any, layer: Layer) -> None:
    """Runs one layer forward and backward on meta tensors."""
    m, k, n, r = layer[:4]

    def empty(*size: int, dtype: torch.dtype = layer.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, dy = empty(m, k), empty(m, n)
    weight = empty(k, n).T if layer.turned else empty(n, k)
    A, B = empty(r, k, dtype=layer.adapters), empty(n, r, dtype=layer.adapters)
    seed = empty(dtype=torch.int64) if layer.dropout else None
    bias = empty(n) if layer.bias else None
    y0, weight = (empty(m, n), None) if layer.added else (None, weight)
    weights = empty(m, dtype=torch.float32) if layer.weighted else None
    s, p = layer.scaling, layer.dropout
    wants = layer.norm, layer.gram
    out = fused.forward(Call(x, weight, bias, y0, A, B, s, p, seed, weights, *wants))
    copies = {"a": out.a, "b": out.b}
    saved = Saved(x, weight, A, B, out.h, out.mask, seed, s, p, weights, **copies)
    fused.backward(saved, dy, Needs(True, True, True, layer.moment))


# Llama-3 8B: q and o, k and v, gate and up, down.
LLAMA = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]


def layers() -> Iterator[Layer]:
    """What people run, then what is awkward; the most telling first."""
    for k, n in LLAMA:
        yield Layer(8192, k, n, 16)
    for more in ({"dropout": 0.1}, {"norm": True}, _NORM, {"turned": True}, {"bias": True}):
        yield _llama(16, **more)
    yield _DECODE
    yield _DECODE._replace(**_NORM)
    yield Layer(256, 4096, 4096, 16)
    for r in (64, 128, 256):
        yield _llama(r, norm=True)
        yield _llama(r, dropout=0.1)
        yield _llama(r, dropout=0.1, **_MOMENT)
    for more in (_GRAM, {"gram": True, "norm": True}):
        yield _llama(16, **more)
    yield _llama(256, gram=True)
    yield _FEW._replace(gram=True)
    yield _DECODE._replace(**_GRAM)
    yield _llama(16, moment=True)
    yield Layer(40, 768, 768, 16, bias=True)
    for p in (0.0, 0.1):
        yield Layer(2048, 768, 768, 16, dropout=p, added=True)
    yield Layer(8192, 4096, 4096, 16, scaling=1.7)
    yield Layer(8192, 4096, 4096, 16, dtype=torch.float16, norm=True)
    yield Layer(8192, 4096, 4096, 16, adapters=torch.bfloat16)
    yield _RAGGED
    yield _RAGGED._replace(**_MOMENT)
    yield _FLOAT32._replace(dropout=0.1)
    yield _FLOAT32._replace(**_MOMENT)
    yield _FEW._replace(dropout=0.1, norm=True)
    yield Layer(2048, 4096, 1024, 32, torch.float16, norm=True)
    yield Layer(8192, 4096, 4096, 128, norm=True, weighted=True)
    for r in (16, 256):
        yield Layer(333, 100, 50, r, torch.float32, 0.1)
    yield Layer(5, 768, 768, 16, torch.float32)


@contextmanager
def extension() -> Iterator[list[str]]:
    """In the place of the CUDA kernels: results that nobody fills. The names of those called."""
    from loradrop.op import cuda

    called: list[str] = []

    def gemm_ext(p: Tensor, q: Tensor, *_: Any) -> Tensor:
        called.append("gemm_ext")
        return p.new_empty((p.shape[0], q.shape[1]))

    def gemm_lora(p: Tensor, q: Tensor, _: Any, a: Tensor, *__: Any) -> tuple[Tensor, Tensor]:
        called.append("gemm_lora")
        m = p.shape[0]
        return p.new_empty((m, q.shape[1])), p.new_empty((m, a.shape[1]))

    def decode(x: Tensor, weight: Tensor, _: Any, A: Tensor, *rest: Any) -> tuple[Any, ...]:
        called.append("decode")
        m, norm = x.shape[0], x.new_empty((), dtype=torch.float32) if rest[-1] else None
        return x.new_empty((m, weight.shape[0])), x.new_empty((m, A.shape[0])), norm

    with (
        mock.patch.object(cuda, "streams", lambda *_: 4),
        mock.patch.object(cuda, "why_not_placed", lambda _: None),
        mock.patch.object(cuda, "gemm_ext", gemm_ext),
        mock.patch.object(cuda, "gemm_lora", gemm_lora),
        mock.patch.object(cuda, "decode", decode),
    ):
        yield called


def launches(
    machine: Machine, of: Iterable[Layer] | None = None, *, all_backends: bool = True
) -> dict[Launch, JITFunction]:
    """Every distinct launch of the layers on `machine` in their order, by all backends or by
    Triton's alone.
    """
    from loradrop.op import fused

    with record(machine) as found, extension():
        for layer in layers() if of is None else of:
            for backend in (fused.TRITON, fused.THIN):
                call(backend, layer)
            with mock.patch.object(fused, "ONE_READ_OF_DY", True):
                call(fused.THIN, layer)
            if all_backends and machine.arch == 90 and by_cuda(layer):
                for backend in (fused.CUDA, fused.OVERLAP):
                    call(backend, layer)
    return found


def by_cuda(layer: Layer) -> bool:
    """Whether the CUDA kernels serve a layer on a Hopper."""
    half = layer.dtype in (torch.bfloat16, torch.float16)
    return half and layer.k % 8 == layer.n % 8 == 0


class Pick(NamedTuple):
    """The one launch of a layer that calls this kernel with these constants."""

    layer: Layer
    kernel: str
    constants: dict[str, Any] = {}  # noqa: RUF012 - never written


def _llama(r: int, **more: Any) -> Layer:
    return Layer(8192, 4096, 4096, r, **more)


_NORM, _GRAM, _MOMENT = ({n: True, "weighted": True} for n in ("norm", "gram", "moment"))
_DROPPED = _llama(64, dropout=0.1)
_FEW, _DECODE = Layer(1, 4096, 4096, 64), Layer(8, 4096, 4096, 16)
_FLOAT32 = Layer(2048, 768, 768, 8, torch.float32)
_RAGGED = Layer(1000, 4100, 1001, 12, dropout=0.1)
_FORWARD, _BACKWARD = {"sak": 1}, {"sar": 1}  # the strides of A, and of Bᵀ
_MASKED, _TURNED, _SQUARED = {"MASKED": True}, {"Q_T": True}, {"MOMENTS": True}
NAMED = {
    80: {
        "shrink forward r16": Pick(_llama(16), "_shrink", _FORWARD),
        "gemm_ext forward r16": Pick(_llama(16), "_gemm_ext", _TURNED),
        "gemm_ext backward masked, ragged": Pick(_RAGGED, "_gemm_ext", _MASKED),
        "outer r128": Pick(_llama(128), "_outer", {"sor": 1}),
        "t and dB r16": Pick(_llama(16), "_t_and_db"),
        "single_pass decode r16 with bias": Pick(_DECODE._replace(bias=True), "_single_pass"),
        "finish of a split K r64": Pick(_FEW, "_finish"),
        "shrink forward float32 r256 with dropout": Pick(
            Layer(333, 100, 50, 256, torch.float32, 0.1), "_shrink", {"DROPOUT": True}
        ),
        "outer float32 r8": Pick(_FLOAT32, "_outer", {"sor": 1}),
        "outer with the moment r16": Pick(_llama(16, moment=True), "_outer", _SQUARED),
        "expand float32 r8": Pick(_FLOAT32._replace(added=True), "_expand", {"HAS_BASE": True}),
        "single_pass decode float32 r8": Pick(_FLOAT32._replace(m=5), "_single_pass"),
    },
    86: {
        "shrink forward r16": Pick(_llama(16), "_shrink", _FORWARD),
        "shrink with weighted Gram matrices r64": Pick(_llama(64, **_NORM), "_shrink", _FORWARD),
        "gemm_ext forward r16": Pick(_llama(16), "_gemm_ext", _TURNED),
        "gemm_ext backward masked r64": Pick(_DROPPED, "_gemm_ext", _MASKED),
        "outer masked r64": Pick(_DROPPED, "_outer", _MASKED),
        "squared norm r256": Pick(_llama(256, norm=True), "_sqnorm"),
    },
    89: {
        "shrink forward r16": Pick(_llama(16), "_shrink", _FORWARD),
        "shrink with weighted Gram matrices r64": Pick(_llama(64, **_NORM), "_shrink", _FORWARD),
        "gemm_ext forward r16": Pick(_llama(16), "_gemm_ext", _TURNED),
        "gemm_ext backward masked r64": Pick(_DROPPED, "_gemm_ext", _MASKED),
        "outer masked r64": Pick(_DROPPED, "_outer", _MASKED),
        "squared norm r256": Pick(_llama(256, norm=True), "_sqnorm"),
    },
    90: {
        "shrink backward r16": Pick(_llama(16), "_shrink", _BACKWARD),
        "shrink forward r64 with dropout": Pick(_DROPPED, "_shrink", {"DROPOUT": True}),
        "shrink with weighted Gram matrices r64": Pick(_llama(64, **_NORM), "_shrink", _FORWARD),
        "shrink of few rows, K split r64": Pick(_FEW, "_shrink", _FORWARD),
        "finish of a split K with weighted Gram matrices r64": Pick(
            _FEW._replace(**_NORM), "_finish", {"GRAMS": True}
        ),
        "shrink with the weighted Gram matrix of h alone r64": Pick(
            _llama(64, **_GRAM), "_shrink", {"GRAMS": True, "NORM": False}
        ),
        "finish of a split K with the Gram matrix of h alone r64": Pick(
            _FEW._replace(gram=True), "_finish", {"GRAMS": True, "NORM": False}
        ),
        "weighted Gram matrices r256": Pick(_llama(256, **_NORM), "_gram"),
        "weighted Gram matrix of h alone r256": Pick(_llama(256, **_GRAM), "_gram"),
        "Gram matrix added r64": Pick(_llama(64, **_GRAM), "_add_blocks"),
        "Gram matrix added, and for the norm r64": Pick(
            _llama(64, norm=True, gram=True), "_add_blocks"
        ),
        "Gram matrices added, for the norm r256": Pick(_llama(256, norm=True), "_add_blocks"),
        "squared norm r128, weighted": Pick(_llama(128, **_NORM), "_sqnorm"),
        "gemm_ext forward TMA 128x256 r16": Pick(_llama(16), "_gemm_ext", _TURNED),
        "gemm_ext forward TMA 128x256 r64 with bias": Pick(
            _llama(64, bias=True), "_gemm_ext", {"Q_T": True, "HAS_BIAS": True}
        ),
        "gemm_ext forward TMA 128x256 float16 r16, the sum scaled": Pick(
            _llama(16, dtype=torch.float16), "_gemm_ext", {"Q_T": True, "SCALE": "sum"}
        ),
        "gemm_ext backward TMA 128x256 masked r128": Pick(
            _llama(128, dropout=0.1), "_gemm_ext", _MASKED
        ),
        "gemm_ext forward TMA 128x128 r16": Pick(_DECODE._replace(m=256), "_gemm_ext", _TURNED),
        "gemm_ext forward ragged r12": Pick(_RAGGED, "_gemm_ext", {"Q_T": True, "TMA": False}),
        "gemm_ext forward float32 r8": Pick(_FLOAT32, "_gemm_ext", _TURNED),
        "outer masked r64": Pick(_DROPPED, "_outer", _MASKED),
        "outer masked, ragged": Pick(_RAGGED, "_outer", _MASKED),
        "outer with the weighted moment r16": Pick(_llama(16, **_MOMENT), "_outer", _SQUARED),
        "outer masked with the weighted moment r256": Pick(
            _llama(256, dropout=0.1, **_MOMENT), "_outer", _SQUARED
        ),
        "planes of the moment added": Pick(_llama(16, moment=True), "_add_planes", {"WIDE": True}),
        "t and dB r16": Pick(_llama(16), "_t_and_db"),
        "planes of outer added": Pick(_llama(16), "_add_planes", {"WIDE": False}),
        "single_pass decode r16 with the squared norm, weighted": Pick(
            _DECODE._replace(**_NORM), "_single_pass"
        ),
        "total of the tiles' squared norms": Pick(_DECODE._replace(**_NORM), "_total"),
        "cast r16": Pick(_llama(16), "_cast"),
        "cast of B alone r16": Pick(_llama(16, adapters=torch.bfloat16), "_cast"),
    },
    100: {
        "shrink with weighted Gram matrices r32": Pick(_llama(32, **_NORM), "_shrink", _FORWARD),
        "Gram matrices r128": Pick(_llama(128, norm=True), "_gram"),
        "Gram matrices added, for the norm r16": Pick(_llama(16, norm=True), "_add_blocks"),
        "Gram matrix added r32": Pick(_llama(32, gram=True), "_add_blocks"),
        "squared norm r16": Pick(_llama(16, norm=True), "_sqnorm"),
        "gemm_ext forward TMA 128x256 r16": Pick(_llama(16), "_gemm_ext", _TURNED),
        "gemm_ext backward TMA 128x256 masked r64": Pick(_DROPPED, "_gemm_ext", _MASKED),
        "outer masked r64": Pick(_DROPPED, "_outer", _MASKED),
        "outer masked with the weighted moment r64": Pick(
            _DROPPED._replace(**_MOMENT), "_outer", _SQUARED
        ),
        "t and dB r32": Pick(_llama(32), "_t_and_db"),
        "expand masked r64": Pick(_DROPPED, "_expand"),
        "expand without a base r16": Pick(_llama(16, added=True), "_expand", {"HAS_BASE": False}),
    },
    120: {
        "shrink forward r16": Pick(_llama(16), "_shrink", _FORWARD),
        "shrink with weighted Gram matrices r32": Pick(_llama(32, **_NORM), "_shrink", _FORWARD),
        "gemm_ext forward r16": Pick(_llama(16), "_gemm_ext", _TURNED),
        "gemm_ext backward masked r64": Pick(_DROPPED, "_gemm_ext", _MASKED),
        "outer masked r64": Pick(_DROPPED, "_outer", _MASKED),
        "t and dB r16": Pick(_llama(16), "_t_and_db"),
        "squared norm r256": Pick(_llama(256, norm=True), "_sqnorm"),
    },
}


def the_launch(pick: Pick, arch: int) -> tuple[Launch, JITFunction]:
    """The launch of a Pick for one architecture; what is not one launch is an error."""
    layer, kernel, constants = pick
    made = launches(MACHINES[arch], [layer], all_backends=kernel == "_cast")  # else Triton's alone
    fitting = [
        (launch, function)
        for launch, function in made.items()
        if launch.kernel == kernel and constants.items() <= dict(launch.constants).items()
    ]
    assert len(fitting) == 1, f"{pick} on sm_{arch} is {len(fitting)} launches"
    return fitting[0]


def named(arch: int) -> dict[str, tuple[Launch, JITFunction]]:
    """The launches of NAMED for one architecture."""
    return {name: the_launch(pick, arch) for name, pick in NAMED[arch].items()}
