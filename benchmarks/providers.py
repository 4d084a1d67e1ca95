"""What is compared: the rivals, the op with the backend that the dispatcher or its user picks, and
the bare products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import cutlass_gemm
import torch
from cases import Case, Output
from graph_split import graph_split
from machine import problem
from rivals import addmm, frozen, merged, peft, peft_compiled, peft_hook, peft_hook_b
from timing import Cell
from torch import Tensor

from loradrop.op import dispatch
from loradrop.op.costs import SERVING
from loradrop.op.linear import lora_linear

Make = Callable[[Case], Callable[[], Output]]


def ours(case: Case, norm: bool = False, backend: str | None = None) -> Callable[[], Output]:
    """The op; without a `backend` the dispatcher picks. Its seed is drawn as the layer does."""

    def run() -> Output:
        p = case.dropout
        seed = torch.randint(0, 1 << 62, (), device=case.x.device) if p else None
        operands = (case.x, case.weight, case.bias, case.A, case.B, case.scaling)
        result = lora_linear(*operands, dropout=p, seed=seed, return_sqnorm=norm, backend=backend)
        return result if norm else (result, None)

    return run


class Products(torch.autograd.Function):
    """xWᵀ, and dyW for its gradient, by a `multiply` of (p (M, D), q (D, C))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, multiply: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(W)
        ctx.multiply = multiply
        return multiply(x, W.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (W,) = ctx.saved_tensors
        return ctx.multiply(dy, W), None, None


def products(case: Case, multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Output]:
    """The frozen products alone, without a bias."""
    return lambda: (Products.apply(case.x, case.weight, multiply), None)


def by_triton(p: Tensor, q: Tensor) -> Tensor:
    """p·q by `gemm_ext`, in the tiles of the layer and without the LoRA product."""
    from loradrop.kernels import tiles as config
    from loradrop.kernels.gemm_ext import gemm_ext

    machine = config.machine_of(p.device)
    tiles = config.gemm_ext(machine, p.dtype, p.shape[0], q.shape[1])
    return gemm_ext(p, q, None, None, None, 1.0, tiles, machine.sms * tiles.per_sm)[0]


def by_cuda(p: Tensor, q: Tensor) -> Tensor:
    """p·q by the CUDA kernel."""
    from loradrop.op import cuda

    return cuda.gemm_ext(p, q, None, None, None, 1.0)


@dataclass(frozen=True)
class Provider:
    """One way to compute the layer.

    masks    its dropout is the reference's, bit for bit
    bare     the frozen products alone
    silent   the same without the norm, whose y must have the same bits
    refuses  (cell, x) -> why it cannot serve, or None
    """

    name: str
    make: Make
    norm: bool = False
    wide: bool = False  # float32 adapters beside an x of half precision
    masks: bool = False
    bare: bool = False
    silent: Make | None = None
    refuses: Callable[[Cell, Tensor], str | None] = lambda *_: None

    @property
    def key(self) -> str:
        """Its name, and whether it gives the norm."""
        return f"{self.name}+norm" if self.norm else self.name


def _named(backend: str, norm: bool = False) -> Provider:
    def refuses(cell: Cell, x: Tensor) -> str | None:
        of = dispatch.named(backend)
        if backend == "eager" and cell.dropout > 0.0 and x.device.type == "cuda":
            return "its mask takes thousands of launches, too long to be timed"
        grad = cell.direction == "forward_backward"
        return of.missing() or of.why_not(problem(x, cell.N, cell.r, cell.dropout, grad))

    make = partial(ours, backend=backend)
    return Provider(
        f"loradrop_{backend}",
        partial(make, norm=True) if norm else make,
        norm=norm,
        masks=True,
        silent=make if norm else None,
        refuses=refuses,
    )


def _no_cuda_kernels(cell: Cell, x: Tensor) -> str | None:
    from loradrop.op import cuda

    q = x.new_empty(cell.N, cell.K).T
    return cuda.missing() or cuda.why_not_gemm(x.detach(), q, None, None)


def _no_cutlass(cell: Cell, x: Tensor) -> str | None:
    return cutlass_gemm.why_not(x.detach(), x.new_empty(cell.N, cell.K).T)


def _compiles(cell: Cell, _: Tensor) -> str | None:
    few = cell.r == 16
    return None if few else "compiling takes longer than measuring: it is compared at r = 16 only"


def _only_inference(cell: Cell, _: Tensor) -> str | None:
    serves = cell.direction == "forward" and cell.dropout == 0.0
    return None if serves else "it serves the forward pass without dropout only"


def _bare(name: str, multiply: Callable[[Tensor, Tensor], Tensor], **more: Any) -> Provider:
    return Provider(name, partial(products, multiply=multiply), bare=True, **more)


_NORM = Provider("loradrop", partial(ours, norm=True), norm=True, masks=True, silent=ours)


def _short(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]


def providers(dtype: str, device: str) -> list[Provider]:
    """Those of `bench_lora_linear`; the frozen product first."""
    short = _short(dtype)
    base = [Provider("frozen", frozen, bare=True), Provider(f"peft_{short}", peft)]
    own = [Provider("loradrop", ours, masks=True), _NORM]
    if device == "cpu":
        hook = Provider("peft_hook", peft_hook, norm=True)
        return [*base, hook, Provider("addmm", addmm), *own]
    return [
        *base,
        *([Provider("peft_fp32", peft, wide=True)] if short != "fp32" else []),
        Provider("peft_compiled", peft_compiled, refuses=_compiles),
        Provider("addmm", addmm),
        Provider("graph_split", graph_split),
        Provider("merged", merged, refuses=_only_inference),
        *own,
        *map(_named, SERVING),
        _bare("cublas", torch.mm),
        _bare("gemm_triton", by_triton, refuses=_named("triton").refuses),
        _bare("gemm_cuda", by_cuda, refuses=_no_cuda_kernels),
        _bare("gemm_cutlass", cutlass_gemm.gemm, refuses=_no_cutlass),
    ]


def probing(dtype: str, device: str) -> list[Provider]:
    """Those of `bench_probe`: the norm on and off, and hooks as people write them."""
    named = SERVING if device == "cuda" else ()
    return [
        Provider("frozen", frozen, bare=True),
        Provider(f"peft_{_short(dtype)}", peft),
        Provider("peft_hook", peft_hook, norm=True),
        Provider("peft_hook_b", peft_hook_b, norm=True),
        Provider("loradrop", ours, masks=True),
        _NORM,
        *(_named(backend, norm) for backend in named for norm in (False, True)),
    ]
