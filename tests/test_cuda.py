"""The CUDA kernels: their values on a Hopper GPU against float64, and what is refused anywhere."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from loradrop.op import cuda, reference
from loradrop.testing import assert_within, error

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.bfloat16, torch.float16]
# (M, R, C, r) of p (M, R)·q (R, C) + h (M, r)·l (r, C)
SHAPES = {
    "one row": (1, 64, 8, 1),
    "less than a tile": (37, 72, 136, 17),
    "one tile": (128, 64, 256, 64),
    "one more of everything": (129, 65, 264, 65),
    "ragged": (300, 1000, 520, 8),
    "one chunk short": (257, 63, 1032, 130),
    "more than a wave": (2100, 200, 3000, 16),
    "llama q": (2048, 4096, 4096, 16),
    "rank 256": (512, 1024, 1024, 256),
}
gpu = pytest.mark.gpu


@functools.cache
def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


@pytest.fixture(autouse=True)
def hopper(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and (why := cuda.missing()):
        pytest.skip(why)


def matrix(rows: int, columns: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    """Random; rows begin at multiples of 16 bytes, and what lies between them is NaN."""
    stride = (columns + 7) // 8 * 8
    memory = torch.full((rows, stride), float("nan"), dtype=dtype, device="cuda")
    values = torch.randn(rows, columns, generator=generator(), device="cuda") * size
    memory[:, :columns] = values.to(dtype)
    return memory[:, :columns]


def poison(rows: int, columns: int, dtype: torch.dtype) -> None:
    """The next tensor of this size probably gets memory full of NaN."""
    torch.full((rows, columns), float("nan"), dtype=dtype, device="cuda")


def operands(
    shape: tuple[int, int, int, int], dtype: torch.dtype, q_turned: bool, l_turned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """p, q, bias, h, l, so that both products are of size 1."""
    m, k, n, r = shape
    p, h = matrix(m, k, dtype), matrix(m, r, dtype)
    q = matrix(n, k, dtype, k**-0.5).T if q_turned else matrix(k, n, dtype, k**-0.5)
    l = matrix(n, r, dtype, r**-0.5).T if l_turned else matrix(r, n, dtype, r**-0.5)
    return p, q, matrix(1, n, dtype)[0], h, l


def exact_gemm(p: Tensor, q: Tensor, bias: Tensor | None, h: Tensor, l: Tensor, s: float) -> Tensor:
    base = p.double() @ q.double()
    base = base if bias is None else base + bias.double()
    return base + s * (h.double() @ l.double())


def torch_gemm(p: Tensor, q: Tensor, bias: Tensor | None, h: Tensor, l: Tensor, s: float) -> Tensor:
    base = torch.nn.functional.linear(p, q.T.contiguous(), bias)
    return base.addmm_(h.contiguous(), l.contiguous(), alpha=s)


def assert_gemm(out: Tensor, *operands: Any) -> None:
    """`out` is p·q + bias + s·h·l of the operands."""
    assert_within(out, torch_gemm(*operands), exact_gemm(*operands))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "turned", [(0, 0), (1, 1), (0, 1), (1, 0)], ids=["W,A", "Wt,Bt", "W,Bt", "Wt,A"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_gemm(shape: str, turned: tuple[int, int], dtype: torch.dtype) -> None:
    m, _, n, _ = SHAPES[shape]
    p, q, bias, h, l = operands(SHAPES[shape], dtype, bool(turned[0]), bool(turned[1]))
    for with_bias in (None, bias):
        for s in (1.0, 2.0, -0.3, 16.0 / 3.0):
            poison(m, n, dtype)
            given = (p, q, with_bias, h, l, s)
            assert_gemm(cuda.gemm_ext(*given), *given)


@gpu
@pytest.mark.parametrize("tile_n", [128, 256])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_plan_gives_the_same_bits(
    shape: str, turned: bool, cluster: int, tile_n: int
) -> None:
    p, q, bias, h, l = operands(SHAPES[shape], torch.bfloat16, turned, turned)
    expected = cuda.gemm_ext(p, q, bias, h, l, 0.7)
    poison(*expected.shape, torch.bfloat16)
    out = cuda.gemm_ext(p, q, bias, h, l, 0.7, tile_n=tile_n, cluster=cluster)
    assert torch.equal(out, expected)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm_without_a_thin_product(dtype: torch.dtype) -> None:
    p, q, bias, h, l = operands((300, 520, 776, 8), dtype, True, True)
    exact = p.double() @ q.double() + bias.double()
    torch_path = torch.nn.functional.linear(p, q.T, bias)
    for out in (cuda.gemm_ext(p, q, bias, None, None, 3.0), cuda.gemm_ext(p, q, bias, h, l, 0.0)):
        assert_within(out, torch_path, exact)


@gpu
def test_a_bias_may_begin_anywhere() -> None:
    p, q, bias, h, l = operands(SHAPES["ragged"], torch.bfloat16, True, True)
    odd = torch.cat([bias[:1], bias])[1:]  # not at a multiple of 4 bytes
    expected = cuda.gemm_ext(p, q, bias, h, l, 1.0)
    assert torch.equal(cuda.gemm_ext(p, q, odd, h, l, 1.0), expected)


@gpu
def test_a_scale_does_not_overflow_float16() -> None:
    p, q, _, h, l = operands((256, 64, 256, 16), torch.float16, True, True)
    h, l = h * 5e3, l * 1e-3
    given = (p, q, None, h, l, 24.0)  # s·h is far beyond 65504, s·h·l is not
    assert error(cuda.gemm_ext(*given), exact_gemm(*given)) < 1e-3


@gpu
@pytest.mark.parametrize("shape", ["ragged", "llama q"])
def test_gemm_is_deterministic(shape: str) -> None:
    p, q, bias, h, l = operands(SHAPES[shape], torch.bfloat16, True, True)
    first = cuda.gemm_ext(p, q, bias, h, l, 0.3)
    for _ in range(100):
        assert torch.equal(cuda.gemm_ext(p, q, bias, h, l, 0.3), first)


@gpu
@pytest.mark.parametrize("shape", ["ragged", "llama q"])
def test_overlap_waits_for_h(shape: str) -> None:
    p, q, bias, h, l = operands(SHAPES[shape], torch.bfloat16, True, True)
    expected = cuda.gemm_ext(p, q, bias, h, l, 1.0)
    late = torch.empty_like(h)
    for _ in range(20):
        late.fill_(float("nan"))
        torch.cuda._sleep(1_000_000)
        late.copy_(h)
        assert torch.equal(cuda.gemm_ext(p, q, bias, late, l, 1.0, overlap=True), expected)


LORA = {"llama q": (8192, 4096, 4096, 16), "ragged": (4093, 4096, 4096, 24),
        "down": (2048, 1024, 14336, 16), "wide rank": (4096, 8192, 8192, 64),
        "odd rank": (8192, 4096, 4096, 11)}  # fmt: skip


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["dx", "forward"])
@pytest.mark.parametrize("shape", LORA)
def test_h_is_made_beside_the_product(shape: str, turned: bool, dtype: torch.dtype) -> None:
    m, n, k, r = LORA[shape]
    if not cuda.streams(m, n, k, r, turned, 0):
        pytest.skip("this device makes h before")
    p, q, bias, _, l = operands((m, k, n, r), dtype, turned, turned)
    a = matrix(r, k, dtype, k**-0.5).T if turned else matrix(k, r, dtype, k**-0.5)
    h = ((p.double() @ a.double()) * 0.5).to(dtype)
    for with_bias in (None, bias):
        poison(m, n, dtype)
        out, made = cuda.gemm_lora(p, q, with_bias, a, l, 1.0, 0.5)
        assert_within(made, 0.5 * (p @ a), 0.5 * (p.double() @ a.double()))
        assert_gemm(out, p, q, with_bias, made, l, 1.0)
        assert torch.equal(out, cuda.gemm_ext(p, q, with_bias, made, l, 1.0))
        assert error(made, h) < 1e-2
    for _ in range(30):
        again, made_again = cuda.gemm_lora(p, q, bias, a, l, 1.0, 0.5)
        assert torch.equal(again, out) and torch.equal(made_again, made)


def captured(call: Callable[[], Tensor]) -> Tensor:
    """What `call` gives when it is replayed from a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.fill_(float("nan"))
    graph.replay()
    return out


@gpu
def test_both_kernels_in_a_cuda_graph() -> None:
    p, q, bias, h, l = operands(SHAPES["ragged"], torch.bfloat16, True, True)
    out = captured(lambda: cuda.gemm_ext(p, q, bias, h, l, 0.3))
    assert torch.equal(out, cuda.gemm_ext(p, q, bias, h, l, 0.3))
    x, weight, bias, A, B = decode_operands((8, 512, 520, 16), torch.bfloat16)
    out = captured(lambda: cuda.decode(x, weight, bias, A, B, 0.3)[0])
    assert torch.equal(out, cuda.decode(x, weight, bias, A, B, 0.3)[0])


@gpu
def test_gemm_beyond_int32() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free memory")
    m, k, n, r = 270_000, 8192, 64, 8  # p has more than 2^31 elements
    p = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    q, h, l = (matrix(*size, torch.bfloat16) for size in ((k, n), (m, r), (r, n)))
    out = cuda.gemm_ext(p, q, None, h, l, 2.0)
    last = slice(m - 1000, m)
    assert_gemm(out[last], p[last], q, None, h[last], l, 2.0)


# ---- decode ----------------------------------------------------------------------------------

# (M, K, N, r)
DECODE = {
    "one token": (1, 64, 16, 8),
    "rank 1": (2, 200, 40, 1),
    "k of one chunk": (3, 128, 4096, 16),
    "ragged": (7, 1000, 523, 17),
    "nine tokens": (9, 384, 384, 64),
    "llama q": (16, 4096, 4096, 16),
    "llama up": (32, 4096, 14336, 64),
    "llama down": (31, 14336, 4096, 128),
    "more rows than a wave": (17, 256, 32000, 100),
}


def decode_operands(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, k, n, r = shape
    x, weight = matrix(m, k, dtype), matrix(n, k, dtype, k**-0.5)
    A, B = matrix(r, k, dtype, k**-0.5), matrix(n, r, dtype, r**-0.5)
    return x, weight, matrix(1, n, dtype)[0], A, B


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cluster", [0, 2, 4, 8, 1])
@pytest.mark.parametrize("shape", DECODE)
def test_decode(shape: str, cluster: int, dtype: torch.dtype) -> None:
    m, _, n, r = DECODE[shape]
    x, weight, bias, A, B = decode_operands(DECODE[shape], dtype)
    weights = torch.rand(m, device="cuda", generator=generator())
    for with_bias, s in ((None, 2.0), (bias, 0.3)):
        poison(m, n, dtype)
        poison(m, r, dtype)
        y, h, norm = cuda.decode(x, weight, with_bias, A, B, s, weights, True, cluster=cluster)
        assert_within(h, x @ A.T, x.double() @ A.double().T)
        # With the h that was rounded: its error is not that of the product.
        assert_gemm(y, x, weight.T, with_bias, h, B.T, s)
        assert error(norm, reference.sqnorm(h, B, s, weights)) < 1e-5


@gpu
def test_decode_leaves_tokens_of_weight_zero_out() -> None:
    x, weight, bias, A, B = decode_operands((12, 512, 1040, 16), torch.bfloat16)
    weights = torch.ones(12, device="cuda")
    weights[3] = 0.0
    clean = cuda.decode(x, weight, bias, A, B, 0.5, weights, True)
    x[3] = float("nan")
    y, _, norm = cuda.decode(x, weight, bias, A, B, 0.5, weights, True)
    assert norm is not None and torch.equal(norm, clean[2])
    others = [row for row in range(12) if row != 3]
    assert torch.equal(y[others], clean[0][others]) and y[3].isnan().all()
    assert cuda.decode(x, weight, bias, A, B, 0.5)[2] is None


@gpu
@pytest.mark.parametrize("cluster", [2, 8])
def test_decode_is_deterministic(cluster: int) -> None:
    x, weight, bias, A, B = decode_operands(DECODE["llama q"], torch.bfloat16)
    first = cuda.decode(x, weight, bias, A, B, 0.3, None, True, cluster=cluster)
    for _ in range(100):
        again = cuda.decode(x, weight, bias, A, B, 0.3, None, True, cluster=cluster)
        torch.testing.assert_close(again, first, rtol=0.0, atol=0.0)


# ---- Refusals, on any machine ------------------------------------------------------------------


def test_a_cpu_tensor_is_refused_with_the_reason() -> None:
    a = torch.zeros(8, 8, dtype=torch.bfloat16)
    reason = cuda.why_not_gemm(a, a, a, a)
    assert reason is not None and ("not built" in reason or "on cpu" in reason)
    with pytest.raises(ValueError, match="gemm_ext cannot serve this call: the "):
        cuda.gemm_ext(a, a, None, a, a, 1.0)
    with pytest.raises(ValueError, match="decode cannot serve this call: the "):
        cuda.decode(a, a, None, a, a, 1.0)


def test_what_is_built_or_why_not() -> None:
    built = cuda.built()
    assert "arch" in built if isinstance(built, dict) else "LORADROP_BUILD_CUDA=1" in built
    if not torch.cuda.is_available():
        assert cuda.missing() is not None


@pytest.mark.parametrize("known", [12080, 13000])
def test_a_driver_that_is_too_old_is_a_reason(known: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a crash in the first step of training; and of two devices one that fits is enough."""
    built = SimpleNamespace(build_info=lambda: {"cuda": "13.0"})
    monkeypatch.setattr(cuda, "_extension", lambda: built)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: known, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8 + device, 0))
    monkeypatch.setattr(cuda, "_why_not_on", functools.cache(cuda._why_not_on.__wrapped__))
    reason = cuda._why_not_on(1)
    assert (reason is None) == (known == 13000) == (cuda.missing() is None)
    assert reason is None or "built by CUDA 13, and the driver knows 12" in reason
    assert "device 0 has compute capability 8.0" in str(cuda._why_not_on(0))


def names_of(kernel: str) -> list[str]:
    """Of the arguments of a function of the extension, in their order."""
    source = (ROOT / "csrc" / "bindings.cpp").read_text(encoding="utf-8")
    signature = re.search(rf"void {kernel}\((.*?)\) \{{", source, re.S)
    given = re.search(rf'm\.def\("{kernel}", &.*?\);', source, re.S)
    assert signature is not None and given is not None
    names = re.findall(r'py::arg\("(\w+)"\)', given[0])
    assert names == [one.split()[-1].strip("&").rstrip("_") for one in signature[1].split(",")]
    return names


def form(matrix: Tensor) -> tuple[int, ...]:
    return (matrix.data_ptr(), *matrix.shape, *matrix.stride())


@pytest.mark.parametrize("kernel", ["gemm_ext", "gemm_lora", "decode"])
def test_arguments_go_to_their_places(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have names in the extension, and a call hands them over by place."""
    told: list[tuple[Any, ...]] = []
    launch = SimpleNamespace(gemm_ext=lambda *given: told.append(given))
    launch.decode = launch.gemm_ext
    monkeypatch.setattr(cuda, "_extension", lambda: launch)
    monkeypatch.setattr(cuda, "_why_not", lambda *given: None)
    monkeypatch.setattr(cuda, "_plan", lambda *given: (16, 2, 4))
    x, w, A, B = (
        torch.zeros(n, k, dtype=DTYPES[0]) for n, k in ((5, 16), (24, 16), (8, 16), (24, 8))
    )
    bias, weights, h = torch.zeros(24, dtype=DTYPES[0]), torch.zeros(5), x.new_zeros(5, 8)
    matrices, wanted = (
        {"q": w.T, "l": B.T, "p": x},
        {"device": -1, "stream": 0, "dtype": "bfloat16"},
    )
    if kernel == "gemm_ext":
        out = cuda.gemm_ext(x, w.T, bias, h, B.T, 0.5, overlap=True, tile_n=128, cluster=2)
        wanted |= {"h_scale": 1.0, "a": None, "ready": 0, "overlap": True, "tile_n": 128}
        wanted |= {"cluster": 2}
        matrices |= {"out": out, "h": h}
    elif kernel == "gemm_lora":
        out, made = cuda.gemm_lora(x, w.T, bias, A.T, B.T, 0.5, 0.25)
        wanted |= {"h_scale": 0.25, "overlap": False, "tile_n": 0, "cluster": 0}
        matrices |= {"out": out, "h": made, "a": A.T}
    else:
        y, low, norm = cuda.decode(x, w, bias, A, B, 0.5, weights, True)
        assert norm is not None
        matrices = {"x": x, "w": w, "a": A, "b": B}
        wanted |= {"y": y.data_ptr(), "h": low.data_ptr(), "weights": weights.data_ptr()}
        wanted |= {"sqnorm": norm.data_ptr(), "rows": 16, "cluster": 2}
    wanted |= {"bias": bias.data_ptr(), "scaling": 0.5}
    wanted |= {name: form(matrix) for name, matrix in matrices.items()}
    (given,) = told
    found = dict(zip(names_of("decode" if kernel == "decode" else "gemm_ext"), given, strict=True))
    unseen = {"gemm_ext": set(), "gemm_lora": {"ready"}, "decode": {"planes"}}[kernel]
    assert all(found.pop(name) for name in unseen)  # memory that nobody else sees
    assert found == wanted


@pytest.mark.parametrize("kernel", ["gemm_ext", "decode"])
def test_the_stand_ins_take_them_in_that_order(kernel: str) -> None:
    pytest.importorskip("triton")
    import test_replay

    told = [
        name for name in inspect.signature(getattr(test_replay, kernel)).parameters if name != "_"
    ]
    assert names_of(kernel)[: len(told)] == told


class Extension:
    """Of loradrop._C, what is asked before a launch, on a device with room for pairs or not."""

    def __init__(self, pairs: int) -> None:
        self.pairs, self.asked = pairs, 0

    def decode_occupancy(self, device: int) -> list[int]:
        self.asked += 1
        return [7, self.pairs, 0, 0]

    def why_not_placed(self, clusters: tuple[int, ...], cluster: int) -> str | None:
        return None if clusters[1] else f"no room for {cluster}"


@pytest.mark.parametrize("pairs", [0, 3])
def test_the_device_is_asked_once_for_its_clusters(
    pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    extension = Extension(pairs)
    monkeypatch.setattr(cuda, "_extension", lambda: extension)
    monkeypatch.setattr(cuda, "_why_not_on", lambda device: "none" if device == 1 else None)
    for ask in ("occupancy", "why_not_placed"):  # without what is known of this machine
        monkeypatch.setattr(cuda, ask, functools.cache(getattr(cuda, ask).__wrapped__))
    for _ in range(2):
        assert cuda.occupancy(0) == {1: 7, 2: pairs, 4: 0, 8: 0}
        assert cuda.why_not_placed(0) == (None if pairs else "no room for 0")
    assert extension.asked == 1
    assert cuda.occupancy(1) == {}


@gpu
def test_a_hopper_gpu_has_room_for_pairs() -> None:
    clusters = cuda.occupancy(torch.cuda.current_device())
    assert set(clusters) == {1, 2, 4, 8} and clusters[1] >= clusters[2] > 0


@gpu
def test_operands_that_do_not_fit_are_refused() -> None:
    p, q, bias, h, l = operands((40, 64, 48, 8), torch.bfloat16, True, True)
    assert cuda.why_not_gemm(p, q, h, l) is None
    odd = torch.zeros(40, 65, dtype=torch.bfloat16, device="cuda")[:, :64]
    assert "row stride 65" in str(cuda.why_not_gemm(odd, q, h, l))
    assert "16 bytes" in str(cuda.why_not_gemm(p[:, 4:], q[4:], h, l))
    assert "torch.float16" in str(cuda.why_not_gemm(p, q.half(), h, l))
    assert "torch.float32" in str(cuda.why_not_gemm(p.float(), q.float(), h.float(), l.float()))
    for given, words in (
        ((p, q, bias.float(), h, l, 1.0), r"bias is \(48,\), torch.float32"),
        ((p, q, bias, h, l, float("inf")), r"2\^-32"),
        ((odd, q, bias, h, l, 1.0), "row stride 65"),
    ):
        with pytest.raises(ValueError, match=words):
            cuda.gemm_ext(*given)
    x, weight, _, A, B = decode_operands((33, 64, 48, 8), torch.bfloat16)
    with pytest.raises(ValueError, match="33 rows, and decode takes up to 32"):
        cuda.decode(x, weight, None, A, B, 1.0)
