"""The backends of fused kernels: three thin products by Triton around one wide product.

    forward    h = shrink(x, A)      y  = xWᵀ + b + s·hBᵀ     the norm from r x r Gram matrices
    backward   t = shrink(dy, Bᵀ)    dx = dy W + mask∘(tA)    dA = tᵀ(mask∘x)    dB = s·dyᵀh

with t = s·dyB/(1 − p). `thin` leaves the wide product to cuBLAS and adds the LoRA product in place;
`triton` and `cuda` compute both in one kernel. The mask of dropout is drawn once, by the first
`shrink`, and kept as one bit an element.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from loradrop.kernels import tiles
from loradrop.kernels.expand import expand
from loradrop.kernels.gemm_ext import as_stored, gemm_ext, scale_mode, tma_refuses
from loradrop.kernels.gram import sqnorm as sqnorm_of_grams
from loradrop.kernels.gram import total
from loradrop.kernels.outer import outer
from loradrop.kernels.shrink import shrink
from loradrop.kernels.single_pass import single_pass
from loradrop.op import cuda, eager
from loradrop.op.philox import row_bytes

SINGLE_PASS_ROWS = 64  # rows up to which one pass over everything may beat two launches
SINGLE_PASS_RANK = 32  # ... with ranks that are cheap to compute anew for every tile of outputs
DECODE_ROWS = 32  # rows that the CUDA kernel for decoding takes

# p (M, D)   q (D, C)   bias (C,) or None   h (M, r)   l (r, C)   s   mask (M, row_bytes(C)) or None
Extend = Callable[..., Tensor]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def by_cublas(
    p: Tensor, q: Tensor, bias: Tensor | None, h: Tensor, l: Tensor, scale: float,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """p·q + bias by cuBLAS, and the LoRA product in place on its fresh output."""
    y = linear(p, q.T, bias)
    if mask is None:
        return y.addmm_(h, l.to(h.dtype), alpha=scale)
    cut = tiles.expand(tiles.machine_of(p.device), p.dtype)
    return expand(y, h, l, scale, cut, mask, in_place=True)


def by_triton(
    p: Tensor, q: Tensor, bias: Tensor | None, h: Tensor, l: Tensor, scale: float,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The LoRA product as further steps of the sum."""
    machine = tiles.machine_of(p.device)
    aligned = tma_refuses(p, as_stored(q)[0]) is None and q.shape[1] * q.element_size() % 16 == 0
    cut = tiles.gemm_ext(
        machine, p.dtype, p.shape[0], q.shape[1], first=mask is not None, aligned=aligned
    )
    programs = machine.sms * cut.per_sm
    return gemm_ext(p, q, bias, h, l, scale, cut, programs, mask=mask)


def by_cuda(
    p: Tensor, q: Tensor, bias: Tensor | None, h: Tensor, l: Tensor, scale: float,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `by_triton`, by csrc/; a masked LoRA product is added to its frozen product afterwards.

    A p in rows that its loads cannot address, such as the gradient of a sum, is copied.
    """
    if tma_refuses(p) is not None:
        p = p.contiguous()
    if mask is not None:
        y = cuda.gemm_ext(p, q, bias, None, None, 1.0)
        cut = tiles.expand(tiles.machine_of(p.device), p.dtype)
        return expand(y, h, l, scale, cut, mask, in_place=True)
    l = l.to(p.dtype)
    if scale_mode(scale, p.dtype) == "h":
        l, scale = l * scale, 1.0  # exact
    if missing := -h.shape[1] % 8:  # rows of whole 16 bytes
        h, l = pad(h, (0, missing)), pad(l, (0, 0, 0, missing))
    if tma_refuses(as_stored(l)[0]) is not None:
        l = l.contiguous()
    return cuda.gemm_ext(p, q, bias, h, l, scale)


def small_m_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float,
    token_weights: Tensor | None, norm: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:  # fmt: skip
    """y, h and the norm of few rows in one pass; None for more, and for wide ranks."""
    if x.shape[0] > SINGLE_PASS_ROWS or A.shape[0] > SINGLE_PASS_RANK:
        return None
    cut = tiles.single_pass(tiles.machine_of(x.device), x.dtype, x.shape[0])
    y, h, parts = single_pass(
        x, weight, bias, A, B, scaling, cut, sqnorm=norm, token_weights=token_weights
    )
    return y, h, None if parts is None else total(parts, scaling)


def small_m_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float,
    token_weights: Tensor | None, norm: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:  # fmt: skip
    """As `small_m_triton`, by csrc/; None for what its kernel refuses."""
    if x.shape[0] > DECODE_ROWS:
        return None
    A, B = A.to(x.dtype), B.to(x.dtype)
    if cuda.supports_decode(x, weight, A, B) is not None:
        return None
    return cuda.decode(x, weight, bias, A, B, scaling, token_weights, norm)


def _on_its_device(method: _Method) -> _Method:
    """Makes the device of the first operand the current one: kernels are launched there."""

    @functools.wraps(method)
    def run(self: Any, first: Tensor, *rest: Any) -> Any:
        device = first.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return method(self, first, *rest)
        with torch.cuda.device(device):
            return method(self, first, *rest)

    return run  # type: ignore[return-value]


@dataclass(frozen=True)
class Fused:
    """`forward` and `backward` over one way to compute the wide product.

    `few`: few rows without dropout in one pass.
    """

    extend: Extend
    few: Callable[..., tuple[Tensor, Tensor, Tensor | None] | None] | None = None

    @_on_its_device
    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y0: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        dropout: float,
        seed: Tensor | None,
        token_weights: Tensor | None,
        norm: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """As `dispatch.Backend.forward` says."""
        if x.numel() == 0 or B.shape[0] == 0:  # nothing for a kernel to do
            y, h = eager.forward(x, weight, bias, y0, A, B, scaling, dropout, seed)
            empty = None
            if dropout > 0.0:
                empty = x.new_empty((x.shape[0], row_bytes(x.shape[1])), dtype=torch.uint8)
            return y, h, empty, x.new_zeros((), dtype=torch.float32) if norm else None
        machine = tiles.machine_of(x.device)
        weights = None if token_weights is None or not norm else token_weights.float().contiguous()
        if self.few is not None and weight is not None and dropout == 0.0:
            done = self.few(x, weight, bias, A, B, scaling, weights, norm)
            if done is not None:
                y, h, sqnorm = done
                return y, h, None, sqnorm
        cut = tiles.shrink(machine, x.dtype, x.shape[0], x.shape[1], A.shape[0])
        in_pass = norm and x.dtype != torch.float32
        thin = shrink(
            x, A, 1.0 / (1.0 - dropout), cut,
            dropout=dropout, seed=seed, B=B if in_pass else None, token_weights=weights,
        )  # fmt: skip
        h = thin.h
        if weight is None:
            assert y0 is not None
            y = expand(y0, h, B.T, scaling, tiles.expand(machine, x.dtype))
        else:
            y = self.extend(x, weight.T, bias, h, B.T, scaling)
        sqnorm = None
        if thin.grams is not None:
            sqnorm = sqnorm_of_grams(thin.grams, h, B, scaling, weights)
        elif norm:  # float32: the digits of its products need float64
            sqnorm = eager.sqnorm(h, B, scaling, token_weights)
        return y, h, thin.mask, sqnorm

    @_on_its_device
    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        A: Tensor,
        B: Tensor,
        h: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout: float,
        seed: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As `dispatch.Backend.backward` says."""
        if x.numel() == 0 or dy.numel() == 0:
            return eager.backward(dy, x, weight, A, B, h, scaling, dropout, seed, needs)
        machine, (m, k), (n, r) = tiles.machine_of(x.device), x.shape, B.shape
        dx = dA = dB = None
        scale, rest = scaling / (1.0 - dropout), 1.0
        if x.dtype == torch.float16 and abs(scale) > 1.0:  # t must not overflow for its scale
            scale, rest = 1.0, scale
        if needs[0] or needs[1]:
            cut = tiles.shrink(machine, dy.dtype, m, n, r)
            t = shrink(dy, B.T, scale, cut).h
        if needs[0] and weight is None:
            dx = expand(None, t, A, rest, tiles.expand(machine, x.dtype), mask)
        elif needs[0]:
            dx = self.extend(dy, weight, None, t, A, rest, mask)
        if needs[1]:
            tiles_A = tiles.outer(machine, x.dtype, m, k, r)
            dA = outer(x, t, rest, A.dtype, tiles_A, mask=mask, transposed=True)
        if needs[2]:
            dB = outer(dy, h, scaling, B.dtype, tiles.outer(machine, x.dtype, m, n, r))
        return dx, dA, dB


THIN = Fused(by_cublas)
TRITON = Fused(by_triton, small_m_triton)
CUDA = Fused(by_cuda, small_m_cuda)
