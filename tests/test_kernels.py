"""The Triton kernels by themselves, in the interpreter: variants and shapes the op does not reach.

Every output is poisoned with NaN before a kernel writes it.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from op_cases import INTERPRETED, S, call_of, draw
from torch import Tensor

from loradrop.op import philox, reference
from loradrop.testing import Shape, error

pytestmark = pytest.mark.interpreter
if not INTERPRETED:
    pytest.skip("Triton's interpreter has a process of its own", allow_module_level=True)
pytest.importorskip("triton")

from loradrop.kernels import (  # noqa: E402
    backward,
    cast,
    expand,
    gemm_ext,
    gram,
    outer,
    shrink,
    single_pass,
)
from loradrop.kernels.tiles import (  # noqa: E402
    GemmTiles,
    OuterTiles,
    ShrinkTiles,
    row_bytes,
    rows_aligned,
)

SEED = torch.tensor(-81985529216486895)
SHAPES = {  # ragged in every direction, and with more than one tile
    "one token": Shape(1, 50, 130, 17),
    "small": Shape(5, 8, 6, 1),
    "ragged": Shape(70, 103, 65, 8),
    "aligned": Shape(64, 128, 192, 16),
    "wide rank": Shape(70, 72, 40, 100),
    "widest rank": Shape(33, 64, 48, 256),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_wide_shape = pytest.mark.parametrize(
    "shape", [SHAPES[name] for name in ("one token", "ragged", "aligned", "wide rank")], ids=str
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
each_weighting = pytest.mark.parametrize("weighted", [False, True])
each_p = pytest.mark.parametrize("p", [0.0, 0.25])
GRAMS = ShrinkTiles(32, 32, 1, 4, 2)
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or all bits."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = new_empty(self, *args, **kwargs)
        return made.fill_(math.nan if made.is_floating_point() else 0xFF)

    with mock.patch.object(Tensor, "new_empty", poisoned):
        yield


class Case:
    """Inputs, and the reference's answers in the dtype and in float64."""

    def __init__(self, shape: Shape, dtype: torch.dtype, p: float = 0.0) -> None:
        m, k, _, _ = shape
        t = draw(shape, dtype)
        self.x, self.weight, self.bias, self.A, self.B, self.dy = t.values()
        self.p, self.seed = philox.quantize(p), SEED if p else None
        generator = torch.Generator().manual_seed(1)
        self.weights = torch.rand(m, generator=generator) * (torch.arange(m) % 3 != 1)
        self.kept = philox.keep_mask(SEED, m, k, self.p) if p else torch.ones(m, k, dtype=bool)
        self.y, self.h, *_ = reference.forward(call_of(t, self.p)._replace(seed=self.seed))
        self.h = self.h.contiguous()
        self.mask = pack(self.kept) if p else None

    def shrink(self, tiles: ShrinkTiles, **more: Any) -> shrink.Shrunk:
        scale = 1.0 / (1.0 - self.p)
        return shrink.shrink(self.x, self.A, scale, tiles, dropout=self.p, seed=self.seed, **more)


def pack(kept: Tensor) -> Tensor:
    """A mask of booleans as the kernels keep it."""
    m, k = kept.shape
    bits = torch.zeros(m, 8 * row_bytes(k), dtype=torch.uint8)
    bits[:, :k] = kept
    return (bits.view(m, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def unpack(mask: Tensor, columns: int) -> Tensor:
    bits = (mask.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :columns].bool()


@pytest.mark.product
@each_shape
@each_dtype
@each_p
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("BM", [16, 64])
def test_shrink(shape: Shape, dtype: torch.dtype, p: float, split: int, BM: int) -> None:
    case = Case(shape, dtype, p)
    found = case.shrink(ShrinkTiles(BM, 32, split, 4, 2))
    assert error(found.h, case.h) <= BOUND[dtype]
    assert (found.mask is None) == (p == 0.0)
    if found.mask is not None:
        assert found.mask.shape == (shape.m, row_bytes(shape.k))
        assert torch.equal(unpack(found.mask, shape.k), case.kept)


def assert_norm(case: Case, weights: Tensor | None, tiles: ShrinkTiles = GRAMS) -> shrink.Shrunk:
    """The norm by Gram matrices is that of the h beside them."""
    found = case.shrink(tiles, B=case.B, token_weights=weights)
    ours, none = gram.sums(found.grams, found.h, case.B, S, weights)
    exact = float(reference.sqnorm(found.h, case.B, S, weights))
    assert float(ours) == pytest.approx(exact, rel=1e-5) and none is None
    return found


@pytest.mark.product
@each_shape
@pytest.mark.parametrize("split", [1, 2])
@each_weighting
def test_norm_from_gram_matrices(shape: Shape, split: int, weighted: bool) -> None:
    case = Case(shape, torch.float16)
    tiles = GRAMS._replace(split=split, B_ROWS=64)
    found = assert_norm(case, case.weights if weighted else None, tiles)
    assert torch.equal(found.h, case.shrink(tiles).h)  # the norm changes no bit


@pytest.mark.parametrize(("r", "blocks", "b_blocks"), [(8, 300, 5), (8, 2, 129), (256, 40, 33)])
def test_norm_of_many_blocks(r: int, blocks: int, b_blocks: int) -> None:
    """More than `_add_blocks` loads at once, of h, of B, and of both."""
    case, ranks, generator = Case(Shape(5, 8, 6, r), torch.float16), max(16, r), torch.Generator()
    g, c = (torch.rand(n, ranks, ranks, generator=generator) for n in (blocks, b_blocks))
    exact = S * S * float((g.double().sum(0) * c.double().sum(0)).sum())
    norm, kept = gram.sums(gram.Grams(g, c), case.h, case.B, S, None, gram=True)
    assert float(norm) == pytest.approx(exact, rel=1e-12)
    norm, alone = gram.sums(gram.Grams(g, None), case.h, case.B, S, None, gram=True)
    assert norm is None and torch.equal(alone, kept) and kept.shape == (r, r)
    torch.testing.assert_close(kept, g.double().sum(0)[:r, :r], rtol=1e-14, atol=0.0)


@pytest.mark.product
@pytest.mark.parametrize("r", [1, 12, 64, 100])
@pytest.mark.parametrize("split", [1, 2])
@each_weighting
def test_gram_matrix_of_the_pass_that_makes_h(r: int, split: int, weighted: bool) -> None:
    """The same bits whether the norm is asked for, too, and of h that were not asked for it."""
    case = Case(Shape(150, 96, 40, r), torch.float16)
    weights, tiles = case.weights if weighted else None, GRAMS._replace(split=split)
    alone = case.shrink(tiles, gram=True, token_weights=weights)
    assert alone.grams.of_b is None and torch.equal(alone.h, case.shrink(tiles).h)
    norm, found = gram.sums(alone.grams, alone.h, case.B, S, weights, gram=True)
    exact = reference.gram(alone.h, weights)
    assert norm is None and found.shape == (r, r) and found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=0.0, atol=1e-6 * float(exact.trace()))
    both = case.shrink(tiles, gram=True, B=case.B, token_weights=weights)
    norm, again = gram.sums(both.grams, both.h, case.B, S, weights, gram=True)
    assert norm is not None and torch.equal(found, again)


@pytest.mark.parametrize("r", [1, 16, 24, 64, 100])
@each_weighting
def test_gram_matrices_of_an_h_that_was_not_shrunk_here(r: int, weighted: bool) -> None:
    case = Case(Shape(300, 8, 270, r), torch.float16)
    weights = case.weights if weighted else torch.ones(300)
    of_h, of_b = gram.wide_grams(case.h, case.B, weights if weighted else None)
    h, b = case.h.double(), case.B.half().double()
    for found, exact in ((of_h, h.T @ (weights.double().unsqueeze(1) * h)), (of_b, b.T @ b)):
        assert error(found.double().sum(0)[:r, :r], exact) < 1e-6
        assert not found.sum(0)[r:].any() and not found.sum(0)[:, r:].any()


@pytest.mark.parametrize("r", [8, 64, 100])
@each_weighting
def test_norm_where_the_inner_product_cancels(r: int, weighted: bool) -> None:
    case = Case(Shape(70, 64, 40, r), torch.float16)
    other = torch.rand(40, r, generator=torch.Generator().manual_seed(0))
    case.B = case.B[:, :1] * (1 + 2.0**-6 * other)
    signs = torch.where(torch.arange(r) % 2 == 0, 1.0, -1.0).unsqueeze(1)
    case.A = case.A[:1] * signs
    found = assert_norm(case, case.weights if weighted else None)
    g, c = (planes.double().sum(0) for planes in found.grams)
    value, size = float((g * c).sum()), float((g * c).abs().sum())
    assert gram._CANCELS * value < size, "the case must reach the second form"


@pytest.mark.parametrize("r", [8, 100])
def test_gram_leaves_out_rows_of_weight_zero(r: int) -> None:
    case = Case(Shape(40, 64, 40, r), torch.float16)
    case.x[case.weights == 0] = math.nan
    assert_norm(case, case.weights)


@pytest.mark.product
@pytest.mark.parametrize("size", [0.0, 1e-6, 1e-3, 1.0, 1e5])
@pytest.mark.parametrize("r", [8, 100])
def test_weights_of_any_size(size: float, r: int) -> None:
    """float16 holds neither 1e5·h nor the digits of 1e-6·h; the pieces are scaled."""
    case = Case(Shape(40, 64, 40, r), torch.float16)
    assert_norm(case, size * case.weights)


TILES = {
    "pointers": GemmTiles(32, 64, 32, 4, 2, group=2),
    "accelerator": GemmTiles(32, 64, 32, 4, 2, group=2, tma=True),
    "halves": GemmTiles(32, 64, 32, 4, 2, tma=True, halves=2),
    "pointers, halves": GemmTiles(64, 32, 64, 4, 2, halves=2),
}
each_tiles = pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)


@pytest.mark.product
@each_wide_shape
@each_dtype
@each_tiles
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "turned"])
def test_gemm_ext_forward(shape: Shape, dtype: torch.dtype, tiles: GemmTiles, turned: bool) -> None:
    case = Case(shape, dtype)
    q = (case.weight.T.contiguous().T if turned else case.weight).T
    for first in (False, True):
        y = gemm_ext.gemm_ext(case.x, q, case.bias, case.h, case.B.T, S, tiles, 2, first=first)
        assert error(y, case.y) <= BOUND[dtype]


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        *itertools.product([1.0, 2.0, -0.25, 0.0, 1.7, -3e-3], [torch.float32, torch.float16]),
        *((scale, torch.float32) for scale in (2.0**20, 2.0**50, 1.7e30)),
    ],
    ids=str,
)
def test_gemm_ext_scales_only_the_lora_product(scale: float, dtype: torch.dtype) -> None:
    case = Case(SHAPES["ragged"], dtype)
    exact = case.x.double() @ case.weight.double().T
    exact += scale * (case.h.double() @ case.B.to(dtype).double().T)
    operands = (case.x, case.weight.T, None, case.h, case.B.T)
    y = gemm_ext.gemm_ext(*operands, scale, TILES["pointers"], 3)
    assert error(y, exact) <= BOUND[dtype]


@pytest.mark.parametrize(
    ("scale", "dtype", "mode"),
    [
        (1.0, torch.bfloat16, "none"),
        (2.0, torch.bfloat16, "h"),
        (-0.125, torch.bfloat16, "h"),
        (1.5, torch.bfloat16, "sum"),
        (2.0**30, torch.bfloat16, "sum"),
        (2.0, torch.float16, "sum"),
        (0.0, torch.float16, "h"),
        (1.7, torch.float32, "h"),
    ],
)
def test_a_scale_acts_on_h_only_where_that_is_exact(
    scale: float, dtype: torch.dtype, mode: str
) -> None:
    assert gemm_ext.scale_mode(scale, dtype) == mode
    if mode == "h" and dtype == torch.bfloat16:
        h = torch.randn(1000).bfloat16()
        assert torch.equal((h.float() * scale).bfloat16().double(), h.double() * scale)


@pytest.mark.product
@each_wide_shape
@each_dtype
@each_p
@each_tiles
def test_gemm_ext_backward(shape: Shape, dtype: torch.dtype, p: float, tiles: GemmTiles) -> None:
    case = Case(shape, dtype, p)
    t = (S / (1 - case.p) * (case.dy.float() @ case.B.to(dtype).float())).to(dtype)
    delta = torch.where(case.kept, t.double() @ case.A.to(dtype).double(), 0.0)
    exact = case.dy.double() @ case.weight.double() + delta
    dx = gemm_ext.gemm_ext(case.dy, case.weight, None, t, case.A, 1.0, tiles, 2, mask=case.mask)
    assert error(dx, exact) <= BOUND[dtype]
    base, thin = case.dy @ case.weight, (t, case.A, 1.0, GemmTiles(32, 32, 0, 4, 1), case.mask)
    assert error(expand.expand(base, *thin, in_place=True), exact) <= 2 * BOUND[dtype]
    alone = expand.expand(None, *thin)
    assert error(alone, delta) <= BOUND[dtype]


@each_dtype
@each_tiles
def test_gemm_ext_without_lora(tiles: GemmTiles, dtype: torch.dtype) -> None:
    case = Case(SHAPES["ragged"], dtype)
    y = gemm_ext.gemm_ext(case.x, case.weight.T, None, None, None, 1.0, tiles, 2)
    assert error(y, case.x.double() @ case.weight.double().T) <= BOUND[dtype]


@pytest.mark.parametrize(("tiles_m", "tiles_n"), [(1, 1), (3, 5), (8, 2), (17, 4), (5, 1)])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_every_tile_has_its_turn_once(tiles_m: int, tiles_n: int, group: int) -> None:
    """The walk of `place_tile`, through a product whose tiles are single elements' neighbours."""
    m, n = 16 * tiles_m, 32 * tiles_n
    p = torch.arange(1.0, m + 1).unsqueeze(1).repeat(1, 16)
    q = torch.arange(1.0, n + 1).repeat(16, 1) / 16
    tiles = GemmTiles(16, 32, 16, 4, 2, group=group)
    for programs in (1, 4):
        y = gemm_ext.gemm_ext(p, q, None, None, None, 1.0, tiles, programs)
        torch.testing.assert_close(y, p @ q)


@pytest.mark.product
@each_shape
@each_dtype
@each_p
@pytest.mark.parametrize("split", [1, 3])
def test_outer(shape: Shape, dtype: torch.dtype, p: float, split: int) -> None:
    case = Case(shape, dtype, p)
    tall = OuterTiles(32, 16, split, 4, 2)
    t = (case.dy.float() @ case.B / 4).to(dtype)
    options = {"mask": case.mask, "transposed": True}
    dA, moment = outer.outer(case.x, t, 1.0, torch.float32, tall, **options)
    dropped = torch.where(case.kept, case.x, 0.0).double()
    assert (dA.shape, dA.dtype) == (case.A.shape, torch.float32)
    assert error(dA, t.double().T @ dropped) <= 2e-6 and moment is None
    for weights in (None, case.weights):
        options |= {"moment": True, "token_weights": weights}
        again, moment = outer.outer(case.x, t, 1.0, torch.float32, tall, **options)
        assert torch.equal(again, dA) and moment.dtype == torch.float64
        assert error(moment, reference.moment(case.x, weights)) <= 2e-6
    dB = outer.outer(case.dy, case.h, S, dtype, tall).out
    assert (dB.shape, dB.dtype) == (case.B.shape, dtype)
    assert error(dB, S * case.dy.double().T @ case.h.double()) <= BOUND[dtype]
    assert torch.equal(dB, outer.outer(case.dy, case.h, S, dtype, tall).out)


@pytest.mark.product
@each_shape
@each_dtype
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "turned"])
def test_t_and_db(shape: Shape, dtype: torch.dtype, split: int, turned: bool) -> None:
    """As `shrink` and `outer` of dy, whose sum over rows has the same order."""
    case, tall = Case(shape, dtype), OuterTiles(32, 16, split, 4, 2)
    dy, B = (case.dy.T.contiguous().T, case.B.T.contiguous().T) if turned else (case.dy, case.B)
    t, dB = backward.t_and_db(dy, B, case.h, 0.25, S, torch.float32, tall)
    exact = case.dy.double() @ case.B.to(dtype).double() / 4
    assert t.dtype == dtype and error(t, exact) <= BOUND[dtype]
    assert torch.equal(dB, outer.outer(case.dy, case.h, S, torch.float32, tall).out)
    again = backward.t_and_db(dy, B, case.h, 0.25, S, torch.float32, tall)
    assert torch.equal(again[0], t) and torch.equal(again[1], dB)


@pytest.mark.product
@each_shape
@each_dtype
@each_weighting
def test_single_pass(shape: Shape, dtype: torch.dtype, weighted: bool) -> None:
    case = Case(shape, dtype)
    weights = case.weights if weighted else None
    operands = (case.x, case.weight, case.bias, case.A, case.B, S, GemmTiles(16, 32, 32, 4, 2))
    y, h, parts = single_pass.single_pass(*operands, sqnorm=True, token_weights=weights)
    assert error(h, case.h) <= BOUND[dtype]
    assert error(y, case.y) <= BOUND[dtype]
    exact = float(reference.sqnorm(h, case.B, S, weights))
    assert float(gram.total(parts, S)) == pytest.approx(exact, rel=1e-5)
    without = single_pass.single_pass(*operands)
    assert torch.equal(y, without[0]) and torch.equal(h, without[1])


@pytest.mark.product
@pytest.mark.parametrize("digit", range(12))
@pytest.mark.parametrize("k", [75, 96], ids=["ragged", "whole words"])
def test_thresholds_of_every_digit(digit: int, k: int) -> None:
    """The comparison in the kernel is that of the specification, for each digit of p."""
    operands = (torch.ones(5, k), torch.ones(1, k), 1.0, ShrinkTiles(16, 32, 1, 4, 2))
    for threshold in {1 << digit, (1 << digit) + 1, 4096 - (1 << digit)} - {4096}:
        p = threshold / 4096
        found = shrink.shrink(*operands, dropout=p, seed=SEED)
        assert torch.equal(found.mask, philox.draw(SEED, 5, k, p))


@pytest.mark.parametrize("scale", [1.0, 2.0, S])
@pytest.mark.parametrize("which", ["both", "A", "B"])
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("r", [33, 32, 8])
def test_cast(r: int, given: torch.dtype, which: str, scale: float) -> None:
    """Of any strides, over more than one program."""
    torch.manual_seed(0)
    A = torch.randn(100, r, dtype=given).T  # (r, K), a transposed view
    B = torch.randn(40, 2 * r, dtype=given)[:, ::2]  # (N, r), every other column
    if r % 8 == 0:
        A, B = A.contiguous(), B.contiguous()
    a, b = cast.cast(None if which == "B" else A, None if which == "A" else B, scale, torch.float16)
    assert (a is None) == (which == "B") and (b is None) == (which == "A")
    if a is not None:
        assert rows_aligned(a) and torch.equal(a, A.to(torch.float16))
    if b is not None:
        assert rows_aligned(b) and torch.equal(b, (B.float() * scale).to(torch.float16))


def test_cast_of_nothing() -> None:
    """No launch, and none of an empty matrix that goes wrong."""
    with mock.patch.object(cast, "_cast", None):
        assert cast.cast(None, None, 1.0, torch.float16) == (None, None)
    a, b = cast.cast(torch.zeros(0, 8), torch.ones(6, 2), 2.0, torch.float16)
    assert a is not None and a.shape == (0, 8)
    assert b is not None and b.stride() == (8, 1)
    assert torch.equal(b, torch.full((6, 2), 2.0, dtype=torch.float16))
