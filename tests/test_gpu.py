"""What only a device can show: repeatable bits, CUDA graphs, long offsets, saved memory.

The op's whole suite (`test_linear.py` and its neighbours) runs on a CUDA device by itself, over
every backend. `benchmarks/gpu.py` runs `test_small` under compute-sanitizer.
"""

import math
from typing import Any

import pytest
import torch
from op_cases import (
    KERNELS,
    SAME_BITS,
    SEED,
    S,
    Tensors,
    assert_each_within,
    draw,
    leaves,
    op,
    through_torch,
)
from torch import Tensor
from torch.testing import assert_close

from loradrop.op import philox
from loradrop.op.linear import lora_linear
from loradrop.testing import Shape

pytestmark = pytest.mark.gpu
each_kernel = pytest.mark.parametrize("backend", KERNELS or ["triton"])
TABLE = {  # odd rows, unaligned sizes, every rank
    **{f"{m} rows": Shape(m, 256, 512, 16) for m in (1, 7, 32, 127, 8191)},
    **{f"rank {r}": Shape(300, 512, 256, r) for r in (1, 4, 8, 12, 48, 64, 128, 256)},
    "unaligned": Shape(300, 1001, 777, 16),
    "llama q": Shape(4096, 4096, 4096, 16),
}


def run(t: Tensors, backend: str, p: float = 0.0) -> list[Tensor]:
    """y, norm, dx, dA, dB, with all free memory poisoned before."""
    t = {name: tensor.detach() for name, tensor in t.items()}
    inputs = leaves(t)
    poison()
    y, norm = op(t, backend, p, return_sqnorm=True)
    return [y.detach(), norm, *torch.autograd.grad(y, inputs, t["dy"])]


def poison() -> None:
    """What the allocator hands out next holds NaN."""
    blocks = [torch.full((1 << 24,), math.nan, device="cuda") for _ in range(16)]
    blocks += [torch.full((1 << n,), math.nan, device="cuda") for n in range(4, 18)]
    del blocks


@each_kernel
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", TABLE)
def test_against_float64(name: str, dtype: torch.dtype, p: float, backend: str) -> None:
    t = draw(TABLE[name], dtype)
    y, _, *grads = run(t, backend, p)
    pytorchs, exact = ([through_torch(t, d, p)] for d in (dtype, torch.float64))
    assert_each_within([[y, *grads]], pytorchs, exact)


@each_kernel
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("m", [16, 2048])
def test_a_hundred_runs_give_the_same_bits(m: int, p: float, backend: str) -> None:
    t = draw(Shape(m, 2048, 1024, 16), torch.bfloat16)
    first = run(t, backend, p)
    for _ in range(99):
        assert_close(run(t, backend, p), first, **SAME_BITS)


@each_kernel
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_cuda_graph(p: float, backend: str) -> None:
    """A replay computes with what the tensors then hold, the seed of dropout included."""
    t = draw(Shape(256, 512, 384, 16), torch.bfloat16)
    seed = torch.tensor(1, device="cuda")
    inputs = leaves(t)

    def step() -> list[Tensor]:
        y, norm = op(t, backend, p, seed=seed if p else None, return_sqnorm=True)
        return [y.detach(), norm, *torch.autograd.grad(y, inputs, t["dy"])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number in (7, 8):
        fresh = draw(Shape(256, 512, 384, 16), torch.bfloat16, number)
        with torch.no_grad():
            for name in ("x", "A", "B", "dy"):
                t[name].copy_(fresh[name])
            seed.fill_(number)
        graph.replay()
        assert_close(captured, step(), **SAME_BITS)


@each_kernel
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_more_than_two_to_the_31_elements(p: float, backend: str) -> None:
    """The last rows of an x beyond 32-bit offsets are what they are by themselves."""
    m, k, n, r, tail = 2**31 // 4096 + 300, 4096, 64, 16, 200
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("60 GiB of device memory must be free")
    small = draw(Shape(tail, k, n, r), torch.bfloat16)
    x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
    x[-tail:] = small["x"]
    A, B = (small[name].requires_grad_() for name in "AB")
    more: dict[str, Any] = {"dropout": p, "seed": SEED if p else None, "backend": backend}
    x.requires_grad_()
    y = lora_linear(x, small["weight"], None, A, B, S, **more)
    dy = torch.zeros_like(y)
    dy[-tail:] = small["dy"]
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), dy)
    kept = torch.ones(tail, k, dtype=torch.bool, device="cuda")
    if p:
        kept = last_rows(philox.quantize(p), m, k, tail)
    d = {name: tensor.detach().double() for name, tensor in small.items()}
    dropped = d["x"] * kept / (1 - philox.quantize(p) if p else 1)
    h = dropped @ d["A"].bfloat16().double().T
    want = d["x"] @ d["weight"].T + S * h @ d["B"].bfloat16().double().T
    assert float((y[-tail:].double() - want).norm() / want.norm()) < 1e-2
    t = S * d["dy"] @ d["B"].bfloat16().double()
    assert float((dA.double() - t.T @ dropped).norm() / (t.T @ dropped).norm()) < 1e-2
    assert float((dB.double() - S * d["dy"].T @ h).norm() / (d["dy"].T @ h).norm()) < 2e-2
    assert not dx[:-tail].any() and dx[-tail:].any()


def last_rows(p: float, m: int, k: int, tail: int) -> Tensor:
    """The mask of the last rows, from the counters of their words."""
    assert k % 32 == 0
    words = torch.arange((m - tail) * k // 32, m * k // 32, device="cuda")
    calls = torch.arange(3, device="cuda").unsqueeze(1)
    digits = torch.stack(philox.philox4x32(words, calls, SEED.cuda()), 1).flatten(0, 1)  # (12, n)
    bits = digits.unsqueeze(2) >> torch.arange(32, device="cuda") & 1
    places = 2 ** torch.arange(11, -1, -1, device="cuda")
    numbers = (bits * places.view(12, 1, 1)).sum(0)
    return (numbers >= round(p * 4096)).view(tail, k)


@each_kernel
def test_what_is_saved_for_backward(backend: str) -> None:
    """x is alive anyway; h and one bit an element are all that comes on top."""
    m, k, n, r = 4096, 2048, 1024, 16
    t = draw(Shape(m, k, n, r), torch.bfloat16)
    for p, mask in ((0.0, 0), (0.1, m * k // 8)):
        saved: list[Tensor] = []

        def pack(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        leaves(t)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            op(t, backend, p)
        known = {tensor.data_ptr() for tensor in (*t.values(), SEED)}
        fresh = {s.data_ptr(): s.untyped_storage().nbytes() for s in saved}
        total = sum(size for pointer, size in fresh.items() if pointer not in known)
        assert total <= m * r * 2 + mask + 64


@each_kernel
def test_a_second_device(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    t = {name: tensor.to("cuda:1") for name, tensor in draw(Shape(64, 128, 96, 8)).items()}
    assert_close(op(t, backend), op(t, "reference"), rtol=1e-4, atol=1e-4)


@each_kernel
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("m", [5, 200])
def test_small(m: int, p: float, backend: str) -> None:
    """Few programs, for compute-sanitizer, which is slow."""
    if backend == "cuda" and p:
        pytest.skip("the same kernels as without")
    for value in run(draw(Shape(m, 136, 264, 16), torch.bfloat16), backend, p):
        assert value.isfinite().all()
