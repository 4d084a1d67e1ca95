"""The backends of fused kernels: three thin products by Triton around one wide product.

    forward    h = shrink(x, A)      y  = xWᵀ + b + s·hBᵀ     G = Σ w h hᵀ, and the norm from it
    backward   t = shrink(dy, Bᵀ)    dx = dy W + mask∘(tA)    dA = tᵀ(mask∘x)    dB = s·dyᵀh

with t = s·dyB/(1 − p). `thin` leaves the wide product to cuBLAS and adds the LoRA product in place;
`triton` and `cuda` compute both in one kernel; `overlap` makes h and t beside it. The mask of
dropout is drawn once, by the first `shrink`, and kept as one bit an element. Adapters that must
have x's dtype are copied by one launch of `cast`, which the backward pass reads too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from loradrop.kernels import tiles
from loradrop.kernels.backward import t_and_db
from loradrop.kernels.cast import cast
from loradrop.kernels.expand import expand
from loradrop.kernels.gemm_ext import gemm_ext
from loradrop.kernels.gram import Grams, sums, total, wide_grams
from loradrop.kernels.outer import outer
from loradrop.kernels.shrink import shrink
from loradrop.kernels.single_pass import single_pass
from loradrop.kernels.tiles import as_stored, rows_aligned
from loradrop.op import cuda, eager
from loradrop.op.call import Call, Grads, Needs, Output, Saved
from loradrop.op.philox import gain
from loradrop.op.replay import Passes
from loradrop.op.warn import warn_once

SINGLE_PASS_ROWS = 64  # rows up to which one pass over everything may beat two launches
SINGLE_PASS_RANK = 32  # ... with ranks that are cheap to compute again for every tile of outputs
ROUNDED_ROWS = 2048  # rows from which a copy of A and B in x's dtype pays
ROUNDED_RANKS = range(64, 129)  # ... with such ranks; of wider ones ptxas serialises the products
ONE_READ_OF_DY = False  # for t and dB, where `tiles.backward` says so; no device has timed it yet
DECODE_ROWS, DECODE_RANK = 32, 128  # what the CUDA kernel for decoding takes

# p (M, D)   q (D, C)   bias (C,) or None   h (M, r)   l (r, C)   s   mask (M, row_bytes(C)) or None
Extend = Callable[..., Tensor]


class Near(NamedTuple):
    """The adapters as the kernels of a pass read them: copies in x's dtype, or None for themselves,
    as what a pass hands over it must have made.
    """

    a: Tensor | None  # (r, K)
    b: Tensor | None  # (N, r), times s where that is exact
    scale: float  # what is left of s


def _as_read(token_weights: Tensor | None) -> Tensor | None:
    """Weights (M,) as the kernels read them."""
    return None if token_weights is None else token_weights.float().contiguous()


def _add_masked(y: Tensor, h: Tensor, l: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    cut = tiles.expand(tiles.machine_of(y.device), y.dtype)
    return expand(y, h, l, scale, cut, mask, in_place=True)


def by_cublas(
    p: Tensor, q: Tensor, bias: Tensor | None, h: Tensor, l: Tensor, scale: float,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """p·q + bias by cuBLAS, and the LoRA product in place on its fresh output."""
    y = linear(p, q.T, bias)
    if mask is not None:
        return _add_masked(y, h, l, scale, mask)
    return eager.added(y, h, l.to(h.dtype), scale)


def by_triton(
    p: Tensor, q: Tensor, bias: Tensor | None, h: Tensor, l: Tensor, scale: float,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The LoRA product as further steps of the sum."""
    machine = tiles.machine_of(p.device)
    whole = q.shape[1] * q.element_size() % 16 == 0  # the rows of the result
    aligned = whole and rows_aligned(p) and rows_aligned(as_stored(q))
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
    if not rows_aligned(p):
        p = p.contiguous()
    if mask is not None:
        return _add_masked(cuda.gemm_ext(p, q, bias, None, None, 1.0), h, l, scale, mask)
    return cuda.gemm_ext(p, q, bias, h, l, scale)


def with_h_by_cuda(
    p: Tensor, q: Tensor, bias: Tensor | None, a: Tensor, l: Tensor, scale: float, h_scale: float
) -> tuple[Tensor, Tensor] | None:
    """(p·q + bias + s·h·l, h = h_scale·p·a) in one launch, or None where two are faster.

    p (M, D)   q (D, C)   bias (C,) or None   a (D, r)   l (r, C), all in p's dtype
    """
    (m, k), n, r = p.shape, q.shape[1], a.shape[1]
    turned = as_stored(a) is not a
    if not cuda.streams(m, n, k, r, turned, p.get_device()) or not rows_aligned(p):
        return None
    return cuda.gemm_lora(p, q, bias, a, l, scale, h_scale)


def _measured(
    out: Output, call: Call, weights: Tensor | None, grams: Grams | None = None
) -> Output:
    """`out` with the statistics that are asked for and that it lacks, from `grams` of the pass that
    made h, or from one more read of h. `weights` of the tokens, float32.
    """
    h, missing = out.h, call.sqnorm and out.sqnorm is None
    if not (missing or call.gram):
        return out
    if h.dtype == torch.float32:  # the digits of its products need float64
        b = call.B.to(h.dtype)
        sqnorm, gram = eager.statistics(h, b, call._replace(sqnorm=missing))
    else:
        grams = grams or wide_grams(h, call.B if missing else None, weights)
        sqnorm, gram = sums(grams, h, call.B, call.scaling, weights, gram=call.gram)
    return out._replace(sqnorm=sqnorm if missing else out.sqnorm, gram=gram)


def small_m_triton(call: Call, weights: Tensor | None) -> Output | None:
    """Few rows in one pass; None for more, and for wide ranks. `weights` of the tokens, float32."""
    x, weight = call.x, call.weight
    if weight is None or x.shape[0] > SINGLE_PASS_ROWS or call.A.shape[0] > SINGLE_PASS_RANK:
        return None
    cut = tiles.single_pass(tiles.machine_of(x.device), x.dtype, x.shape[0])
    y, h, parts = single_pass(
        x, weight, call.bias, call.A, call.B, call.scaling, cut,
        sqnorm=call.sqnorm, token_weights=weights,
    )  # fmt: skip
    return Output(y, h, None, None if parts is None else total(parts, call.scaling))


def _decodes(call: Call) -> bool:
    return call.x.shape[0] <= DECODE_ROWS and call.A.shape[0] <= DECODE_RANK and not call.dropout


def small_m_cuda(call: Call, weights: Tensor | None) -> Output | None:
    """As `small_m_triton`, by csrc/, of adapters in x's dtype; None for what its kernel cannot
    read, or has no room for.
    """
    x, weight = call.x, call.weight
    if weight is None or not _decodes(call):
        return None
    A, B = call.A, call.B
    if not all(map(rows_aligned, (x, weight, A, B))):
        return None
    if reason := cuda.why_not_placed(x.device.index):
        warn_once(f"LoRA of few tokens takes several kernels, not one: {reason}")
        return None
    y, h, sqnorm = cuda.decode(x, weight, call.bias, A, B, call.scaling, weights, call.sqnorm)
    return Output(y, h, None, None if sqnorm is None else sqnorm.double())


@dataclass(frozen=True)
class Fused:
    """`forward` and `backward` over one way to compute the wide product.

    `few`: few rows without dropout in one pass. `with_h`: the wide product, and h beside it.
    `rounds`: all of that reads adapters in x's dtype, and B times the scale where that is exact.
    `passes`: where those are nothing but launches, they are played again.
    """

    extend: Extend
    few: Callable[[Call, Tensor | None], Output | None] | None = None
    with_h: Callable[..., tuple[Tensor, Tensor] | None] | None = None
    rounds: bool = False
    passes: Passes | None = None

    def forward(self, call: Call) -> Output:
        """As `reference.forward`; the mask of dropout is kept."""
        if self.passes is None:
            return self._forward(call)
        given = (*call[:6], call.seed, call.token_weights)
        options = ("forward", call.scaling, call.dropout, call.sqnorm, call.gram)
        return self.passes(given, options, lambda: self._forward(call))

    def _near(self, of: Call | Saved, rows: Tensor, masked: bool = False) -> Near:
        """The adapters for these rows (M, ...): copied where the kernels take no others, and where
        they are read so often that halving their bytes pays. Every 64 rows read them again, from
        L2: in float32, from rank 64 on, more bytes than their x.

        masked   x is; its products with a rounded A ptxas serialises
        """
        (r, _), dtype = of.A.shape, rows.dtype
        must = self.rounds and of.weight is not None
        pays = rows.shape[0] >= ROUNDED_ROWS and r in ROUNDED_RANKS and not masked
        if not must and not pays:
            return Near(None, None, of.scaling)

        def fits(factor: Tensor) -> bool:
            return factor.dtype == dtype and (not must or rows_aligned(as_stored(factor)))

        A, B = None if fits(of.A) else of.A, None if fits(of.B) else of.B
        if A is None and B is None and isinstance(of, Call) and _decodes(of):
            return Near(None, None, of.scaling)  # the kernel for few rows takes s by itself
        exact = tiles.scale_mode(of.scaling, dtype) == "h"
        if must and exact:
            B = of.B
        scaled = exact and B is not None
        a, b = (of.a, of.b) if isinstance(of, Saved) else (None, None)
        handed = [copy for copy in (a, b) if copy is not None]
        if not handed or not all(map(fits, handed)):  # a hook that moved them closes the gaps
            a, b = cast(A, B, of.scaling if scaled else 1.0, dtype)
        return Near(a, b, 1.0 if scaled else of.scaling)

    def _forward(self, call: Call) -> Output:
        x, weight, bias, y0, A, B, _, dropout = call[:8]
        if x.numel() == 0 or B.shape[0] == 0:  # nothing for a kernel to do
            return eager.forward(call)
        machine = tiles.machine_of(x.device)
        weights = _as_read(call.token_weights) if call.sqnorm or call.gram else None
        near = self._near(call, x, dropout > 0.0)
        l, scale = B if near.b is None else near.b, near.scale
        if near.a is not None and dropout == 0.0:
            A = near.a
        if self.few is not None and dropout == 0.0:
            done = self.few(call._replace(A=A, B=l, scaling=scale), weights)
            if done is not None:
                return _measured(done._replace(a=near.a, b=near.b), call, weights)
        if self.with_h is not None and dropout == 0.0 and weight is not None:
            both = self.with_h(x, weight.T, bias, A.T, l.T, scale, 1.0)
            if both is not None:
                return _measured(Output(*both, None, None, None, near.a, near.b), call, weights)
        cut = tiles.shrink(machine, x.dtype, x.shape[0], x.shape[1], A.shape[0])
        half = x.dtype != torch.float32
        thin = shrink(
            x, A, gain(dropout), cut, dropout=dropout, seed=call.seed, gram=call.gram and half,
            B=B if call.sqnorm and half else None, token_weights=weights, aligned=self.rounds,
        )  # fmt: skip
        h = thin.h
        if weight is None:
            assert y0 is not None
            y = expand(y0, h, l.T, scale, tiles.expand(machine, x.dtype))
        else:
            y = self.extend(x, weight.T, bias, h, l.T, scale)
        out = Output(y, h, thin.mask, None, None, near.a, near.b)
        return _measured(out, call, weights, thin.grams)

    def backward(self, saved: Saved, dy: Tensor, needs: Needs) -> Grads:
        """As `reference.backward`, with the mask that `forward` kept."""
        if self.passes is None:
            return self._backward(saved, dy, needs)
        given = dy, *saved[:7], saved.token_weights, saved.a, saved.b
        options = "backward", saved.scaling, saved.dropout, needs
        return self.passes(given, options, lambda: self._backward(saved, dy, needs))

    def _backward(self, saved: Saved, dy: Tensor, needs: Needs) -> Grads:
        x, weight, A, B, h, mask, _, scaling, dropout = saved[:9]
        if A.numel() == 0 or dy.numel() == 0:
            return eager.backward(saved, dy, needs)
        reads = needs.x or needs.A
        near = self._near(saved, h) if reads else Near(None, None, scaling)
        if 0 in dy.stride():  # of a sum; the kernels would load it number by number, three times
            dy = dy.contiguous()
        machine, m, k, (n, r) = tiles.machine_of(h.device), h.shape[0], A.shape[1], B.shape
        dx = dA = dB = t = both = squares = None
        dtype_A, dtype_B = A.dtype, B.dtype
        A, B = A if near.a is None else near.a, B if near.b is None else near.b
        scale, rest = near.scale * gain(dropout), 1.0
        if h.dtype == torch.float16 and abs(scale) > 1.0:  # t must not overflow for its scale
            scale, rest = 1.0, scale
        if needs.x and self.with_h is not None and mask is None and weight is not None:
            both = self.with_h(dy, weight, None, B, A, rest, scale)
        if both is not None:
            dx, t = both
        elif needs.x or needs.A:
            at_once = tiles.backward(machine, dy.dtype, m, n, r) if ONE_READ_OF_DY else None
            if needs.B and at_once is not None:
                t, dB = t_and_db(dy, B, h, scale, scaling, dtype_B, at_once)
            else:
                cut = tiles.shrink(machine, dy.dtype, m, n, r)
                t = shrink(dy, B.T, scale, cut, aligned=self.rounds).h
            if needs.x and weight is None:
                dx = expand(None, t, A, rest, tiles.expand(machine, h.dtype), mask)
            elif needs.x:
                dx = self.extend(dy, weight, None, t, A, rest, mask)
        if needs.A:
            assert x is not None and t is not None
            tiles_A = tiles.outer(machine, x.dtype, m, k, r, moment=needs.moment)
            dA, squares = outer(
                x, t, rest, dtype_A, tiles_A, mask=mask, transposed=True,
                moment=needs.moment, token_weights=_as_read(saved.token_weights),
            )  # fmt: skip
        elif needs.moment:
            assert x is not None
            squares = eager.moment(x, saved.token_weights)
        if needs.B and dB is None:
            dB = outer(dy, h, scaling, dtype_B, tiles.outer(machine, h.dtype, m, n, r)).out
        return Grads(dx, dA, dB, squares)


THIN = Fused(by_cublas)
TRITON = Fused(by_triton, small_m_triton, passes=Passes())
CUDA = Fused(by_cuda, small_m_cuda, rounds=True, passes=Passes())
OVERLAP = Fused(by_cuda, small_m_cuda, with_h_by_cuda, rounds=True, passes=Passes())
