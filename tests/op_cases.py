"""What the tests of the op share: the backends at hand, inputs, and PyTorch's own path.

On a CPU the backends are `reference` and `eager`; under Triton's interpreter, in a process of its
own, the kernels; on a CUDA device all of them.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from loradrop.op import dispatch, philox, points
from loradrop.op.call import Call, Problem
from loradrop.op.linear import lora_add, lora_linear
from loradrop.testing import AWKWARD, Shape, assert_within, torch_delta

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
S = 1.3  # no power of two, so that scaling rounds
SEED = torch.tensor(81985529216486895, device=DEVICE)
PLAIN = [] if INTERPRETED else ["reference", "eager"]
KERNELS = [name for name in points.KERNELS if dispatch.BACKENDS[name].missing() is None]
_MARKS = () if INTERPRETED else pytest.mark.gpu
BACKENDS = [*PLAIN, *(pytest.param(name, marks=_MARKS) for name in KERNELS)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
if INTERPRETED:  # it multiplies bfloat16 wrongly, and no kernel computes in float64
    DTYPES = [torch.float32, torch.float16]
HALF = torch.float16 if INTERPRETED else torch.bfloat16
HALVES = list(dict.fromkeys((HALF, torch.float16)))
LEAVES = ("x", "A", "B")
OF_CUDA = ("cuda", "overlap")  # the backends with kernels of csrc/, which refuse most sizes
# N and K in eighths: in half precision those backends serve them, by all their kernels.
EIGHTHS = {
    "eighths, few tokens": Shape(20, 48, 32, 1),
    "eighths, rank 8": Shape(37, 104, 72, 8),
    "eighths, rank 17": Shape(130, 56, 136, 17),
    "eighths, rank 64": Shape(37, 72, 136, 64),
}
Tensors = dict[str, Tensor]
Results = list[list[Tensor]]  # of each draw y, dx, dA, dB, and maybe more


def short(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def widest(backend: str) -> torch.dtype:
    """The widest dtype that a backend computes in."""
    return torch.float32 if backend in KERNELS else torch.float64


def near(dtype: torch.dtype) -> dict[str, float]:
    """What a handful of roundings may make of numbers of ordinary size."""
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    return {"rtol": bound, "atol": bound}


SAME_BITS = {"rtol": 0.0, "atol": 0.0}

each_backend = pytest.mark.parametrize("backend", BACKENDS)
plain_backend = pytest.mark.parametrize("backend", PLAIN)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)
each_size = pytest.mark.parametrize(
    "size", [AWKWARD["rank 8"], EIGHTHS["eighths, rank 8"]], ids=["odd", "eighths"]
)


def draw(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Inputs of ordinary sizes; the adapters are parameters in float32, in float64 for float64."""
    m, k, n, r = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": normal(m, k).to(dtype),
        "weight": (normal(n, k) / math.sqrt(k)).to(dtype),
        "bias": normal(n).to(dtype),
        "A": (normal(r, k) / math.sqrt(k)).to(wide),
        "B": (normal(n, r) / math.sqrt(r)).to(wide),
        "dy": normal(m, n).to(dtype),
    }


def leaves(t: Tensors) -> list[Tensor]:
    return [t[name].requires_grad_() for name in LEAVES]


def sink(*shape: int) -> Tensor:
    """A leaf for a statistic, still empty."""
    return torch.zeros(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)


def all_sinks(k: int, r: int) -> list[Tensor]:
    """Leaves for sqnorm, moment, the Gram matrix and the core."""
    return [sink(), sink(k), sink(r, r), sink(r, r)]


SINKS = ("sqnorm_sink", "moment_sink", "gram_in_sink", "core_sink")


def kept(t: Tensors, p: float) -> Tensor | None:
    return philox.keep_mask(SEED, *t["x"].shape, p) if p else None


def through_torch(t: Tensors, dtype: torch.dtype, p: float) -> list[Tensor]:
    """y, dx, dA, dB, norm by PyTorch's own path in `dtype`; the adapters rounded to x's dtype."""
    d = {name: tensor.detach().to(t["x"].dtype).to(dtype) for name, tensor in t.items()}
    inputs = leaves(d)
    delta = torch_delta(d["x"], d["A"], d["B"], S, kept(d, p), p)
    y = F.linear(d["x"], d["weight"], d.get("bias")) + delta
    grads = torch.autograd.grad(y, inputs, d["dy"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [y.detach(), *grads, delta.detach().to(wide).square().sum()]


def assert_each_within(
    ours: Results, pytorchs: Results, exact: Results, additions: Sequence[int] = (0, 0, 0, 0)
) -> None:
    """`assert_within` for y, dx, dA and dB, each over all draws; the error names which."""
    for i, (what, count) in enumerate(zip(("y", "dx", "dA", "dB"), additions, strict=True)):
        values = (torch.cat([run[i].flatten() for run in runs]) for runs in (ours, pytorchs, exact))
        try:
            assert_within(*values, count)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None


def op(t: Tensors, backend: str | None = None, p: float = 0.0, **more: Any) -> Any:
    """`lora_linear` of the tensors, with a bias if it is there; `lora_add` where there is a y0."""
    more = {"dropout": p, "seed": SEED if p else None, "backend": backend} | more
    if "y0" in t:
        return lora_add(t["y0"], t["x"], t["A"], t["B"], S, **more)
    return lora_linear(t["x"], t["weight"], t.get("bias"), t["A"], t["B"], S, **more)


def through_op(t: Tensors, backend: str | None, p: float) -> list[Tensor]:
    """y, dx, dA, dB, norm."""
    t = {name: tensor.detach() for name, tensor in t.items()}
    inputs = leaves(t)
    y, norm = op(t, backend, p, return_sqnorm=True)
    return [y.detach(), *torch.autograd.grad(y, inputs, t["dy"]), norm]


def call_of(t: Tensors, p: float = 0.0, scaling: float = S, **more: Any) -> Call:
    """What a backend gets; p quantised."""
    operands = [t.get(name) for name in ("x", "weight", "bias", "y0", "A", "B")]
    return Call(*operands, scaling, p, SEED if p else None, **more)  # type: ignore[arg-type]


def factors_in_use(t: Tensors, backend: str, p: float) -> tuple[Tensor, Tensor]:
    """h as the backend rounds it, and B rounded to x's dtype, both in float64."""
    h = dispatch.BACKENDS[backend].forward(call_of(t, philox.quantize(p))).h
    return h.double(), t["B"].to(t["x"].dtype).double()


def must_refuse(problem: Problem) -> bool:
    """Whether the documented limits of the CUDA kernels leave this problem out."""
    half = problem.dtype in (torch.bfloat16, torch.float16)
    whole = problem.aligned and problem.k % 8 == 0 and problem.n % 8 == 0
    return not (half and whole and problem.r <= 256 and problem.arch == 90)


def strided(tensor: Tensor, how: str) -> Tensor:
    """The values of `tensor` (2-D) in another layout."""
    if how == "transposed":
        return tensor.T.contiguous().T
    if how == "every other":
        wide = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1]), 99.0)
        wide[:, ::2] = tensor
        return wide[:, ::2]
    if how == "offset":
        wide = tensor.new_full((tensor.shape[0] + 2, tensor.shape[1] + 3), 99.0)
        wide[2:, 3:] = tensor
        return wide[2:, 3:]
    return tensor


LAYOUTS = ["transposed", "every other", "offset"]
