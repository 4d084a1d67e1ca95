"""What the op measures beside its output: the norm, and the statistics that sinks receive."""

import math

import pytest
import torch
from op_cases import (
    DEVICE,
    EIGHTHS,
    HALF,
    INTERPRETED,
    LEAVES,
    SAME_BITS,
    SEED,
    SINKS,
    S,
    all_sinks,
    draw,
    each_backend,
    each_dtype,
    each_size,
    factors_in_use,
    kept,
    leaves,
    op,
    plain_backend,
    short,
    sink,
    through_op,
    through_torch,
)
from torch import Tensor
from torch.testing import assert_close

from loradrop.op import philox, reference
from loradrop.op.linear import lora_linear
from loradrop.testing import AWKWARD, Shape, assert_within, torch_delta

pytestmark = pytest.mark.numbers


@pytest.mark.product
@each_dtype
@pytest.mark.parametrize("name", ["one token", "rank 1", "rank 64"])
@each_backend
def test_error_of_the_norm_is_within_that_of_pytorch(
    backend: str, name: str, dtype: torch.dtype
) -> None:
    _, k, _, r = AWKWARD[name]
    drawn = [draw(AWKWARD[name], dtype, seed) for seed in range(6 if INTERPRETED else 32)]
    ours = torch.stack([through_op(t, backend, 0.0)[4] for t in drawn])
    pytorchs, exact = (
        torch.stack([through_torch(t, d, 0.0)[4].double() for t in drawn])
        for d in (dtype, torch.float64)
    )
    # A square is off by twice as much as what it is of.
    assert_within(ours, pytorchs, exact, 4 * (k + r + 1))
    # Each is a 0-dim float64 tensor that autograd does not follow, though x, A and B are leaves.
    assert (ours.shape, ours.dtype, ours.requires_grad) == ((len(drawn),), torch.float64, False)


@pytest.mark.product
@pytest.mark.parametrize("p", [0.0, 0.25])
@each_dtype
@pytest.mark.parametrize("B_is", ["random", "cancelling"])
@pytest.mark.parametrize(
    "size", [AWKWARD["rank 64"], EIGHTHS["eighths, rank 64"]], ids=["odd", "eighths"]
)
@each_backend
def test_norm_accuracy(backend: str, size: Shape, B_is: str, dtype: torch.dtype, p: float) -> None:
    """Within 1e-5 of ‖|B||s·h|‖² for the h that is kept, which is unscaled.

    Also where B·h cancels almost to nothing.
    """
    t = draw(size, dtype)
    if B_is == "cancelling":
        other = 2.0**-6 * torch.rand(size.n, 64, generator=torch.Generator().manual_seed(1))
        t["B"] = t["B"][:, :1].repeat(1, 64) * (1 + other.to(DEVICE))
        signs = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0).unsqueeze(1)
        t["A"] = t["A"][:1] * signs.to(DEVICE)
        t["A"], t["B"] = (t[n].to(draw(Shape(0, 1, 1, 1), dtype)["A"].dtype) for n in "AB")
    _, norm = op(t, backend, p, return_sqnorm=True)
    h, B = factors_in_use(t, backend, p)
    exact = float((S * h @ B.T).square().sum())
    largest = float((S * h.abs() @ B.abs().T).square().sum())
    if B_is == "cancelling":
        assert exact < 1e-3 * largest
    assert abs(float(norm) - exact) <= 1e-5 * largest
    assert float(norm) == pytest.approx(exact, rel=1e-5)


@each_dtype
@each_backend
def test_norm_is_of_the_h_that_was_added(backend: str, dtype: torch.dtype) -> None:
    """With W = 0, B = 1 and s = 1, y is h itself."""
    t = draw(Shape(50, 40, 1, 1), dtype)
    operands = (t["x"], torch.zeros_like(t["weight"]), None, t["A"], torch.ones_like(t["B"]), 1.0)
    for p in (0.0, 0.25):
        y, norm = lora_linear(*operands, dropout=p, seed=SEED, return_sqnorm=True, backend=backend)
        # A float32 sum of so many squares, in whatever order a CPU or a GPU takes them.
        assert float(norm) == pytest.approx(float(y.double().square().sum()), rel=len(y) * 2**-24)


@each_dtype
@each_size
@each_backend
def test_a_statistic_changes_no_bit(backend: str, size: Shape, dtype: torch.dtype) -> None:
    t = draw(size, dtype)
    weights = torch.ones(size.m, device=DEVICE)
    outcomes = []
    inputs = leaves(t)
    for more in (
        {},
        {"return_sqnorm": True},
        {"return_sqnorm": True, "token_weights": weights},
        {"sqnorm_sink": sink()},
        {"moment_sink": sink(size.k), "token_weights": weights},
        dict(zip(SINKS, all_sinks(size.k, size.r), strict=True)),
    ):
        y = op(t, backend, 0.25, **more)
        y = y[0] if isinstance(y, tuple) else y
        outcomes.append([y, *torch.autograd.grad(y, inputs, t["dy"])])
    for other in outcomes[1:]:
        assert_close(other, outcomes[0], **SAME_BITS)


WEIGHTS = {
    "bool": torch.tensor([True, False, True, True, False]),
    "int64": torch.tensor([1, 0, 1, 2, 0]),
    "float32": torch.tensor([0.5, 0.0, 1.0, 2.25, 0.0]),
    "bfloat16": torch.tensor([0.5, 0.0, 1.0, 2.25, 0.0], dtype=torch.bfloat16),
    "float64": torch.tensor([0.1, 0.0, 1e-3, 7.0, 0.0], dtype=torch.float64),
    "all zero": torch.zeros(5),
}


@pytest.mark.product
@each_backend
@pytest.mark.parametrize("padding", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_token_weights(weights: Tensor, padding: float, backend: str) -> None:
    t = draw(Shape(5, 12, 9, 3), torch.float32)
    weights = weights.to(DEVICE)
    per_token = torch_delta(*(t[n].double() for n in LEAVES), S).square().sum(1)
    t["x"][weights == 0] = padding
    _, norm = op(t, backend, token_weights=weights, return_sqnorm=True)
    assert float(norm) == pytest.approx(float((per_token * weights.double()).sum()), rel=1e-5)


@pytest.mark.product
@each_backend
@pytest.mark.parametrize("padding", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("weights", [*WEIGHTS.values(), None], ids=[*WEIGHTS, "none"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=short)
def test_moment_of_x(
    dtype: torch.dtype, weights: Tensor | None, padding: float, backend: str
) -> None:
    """Σ_t w_t x_tk², of x before dropout, in every leading shape."""
    t = draw(Shape(5, 12, 9, 3), dtype)
    w = torch.ones(5) if weights is None else weights
    want = (w.double().unsqueeze(1) * t["x"].cpu().double().square()).sum(0)
    if weights is not None:
        weights = weights.to(DEVICE)
        t["x"][weights == 0] = padding
        t["dy"][weights == 0] = 0.0
    for rows in ((5,), (1, 5)):
        d = {n: v.view(*rows, -1) if n == "x" else v for n, v in t.items()}
        moment = sink(12)
        w = None if weights is None else weights.view(rows)
        y = op(d, backend, 0.25, token_weights=w, moment_sink=moment)
        y.backward(t["dy"].view(y.shape))
        assert_close(moment.grad.cpu(), want, rtol=1e-5, atol=0.0)


@plain_backend
def test_moment_of_float64_is_summed_in_float64(backend: str) -> None:
    t = draw(AWKWARD["rank 8"], torch.float64)
    moment = sink(100)
    op(t, backend, moment_sink=moment).sum().backward()
    assert_close(moment.grad, t["x"].square().sum(0), rtol=1e-13, atol=0.0)


@pytest.mark.product
@each_backend
@pytest.mark.parametrize("padding", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("weights", [*WEIGHTS.values(), None], ids=[*WEIGHTS, "none"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_gram_and_core(p: float, weights: Tensor | None, padding: float, backend: str) -> None:
    """Σ_t w_t h_t h_tᵀ and Σ_t u_t h_tᵀ, u = dy·B: token by token, from float64 factors."""
    t = draw(Shape(5, 12, 9, 3), torch.float32)
    w = torch.ones(5) if weights is None else weights
    if weights is not None:
        weights = weights.to(DEVICE)
        t["x"][weights == 0] = padding
        t["dy"][weights == 0] = 0.0
    x, A, B, dy = (t[name].cpu().double() for name in ("x", "A", "B", "dy"))
    mask = kept(t, p)
    if mask is not None:
        x = torch.where(mask.cpu(), x, 0.0) / (1 - philox.quantize(p))
    want_in, want_core = torch.zeros(2, 3, 3, dtype=torch.float64)
    size = 0.0
    for token in range(5):
        if w[token]:
            h, u = A @ x[token], B.T @ dy[token]
            want_in += float(w[token]) * h.outer(h)
            want_core += u.outer(h)
            size += float(u.norm() * h.norm())
    for trained in (True, False):  # B: its gradient is at hand, or is not
        gram_in, core = sink(3, 3), sink(3, 3)
        given = {"token_weights": weights, "gram_in_sink": gram_in, "core_sink": core}
        t["B"].requires_grad_(trained and padding == 0.0)  # what is not finite spoils dB itself
        op(t, backend, p, **given).backward(t["dy"])
        assert gram_in.grad is not None and core.grad is not None
        assert gram_in.grad.dtype == core.grad.dtype == torch.float64
        assert_close(gram_in.grad.cpu(), want_in, rtol=0.0, atol=1e-5 * float(want_in.trace()))
        if padding == 0.0:
            assert_close(core.grad.cpu(), want_core, rtol=0.0, atol=1e-5 * size)


@plain_backend
def test_statistics_of_float64_are_exact(backend: str) -> None:
    t = draw(AWKWARD["rank 8"], torch.float64)
    sinks = all_sinks(100, 8)
    op(t, backend, **dict(zip(SINKS, sinks, strict=True))).backward(t["dy"])
    h, u = t["x"] @ t["A"].T, t["dy"] @ t["B"]
    want = [S**2 * (h @ t["B"].T).square().sum(), t["x"].square().sum(0), h.T @ h, u.T @ h]
    assert_close([leaf.grad for leaf in sinks], want, rtol=1e-12, atol=1e-12)


@each_backend
def test_sinks_receive_their_statistics_once_per_backward(backend: str) -> None:
    t = draw(AWKWARD["rank 8"])
    leaves(t)
    sinks = total, moment, gram_in, core = all_sinks(100, 8)
    weights = (torch.arange(37, device=DEVICE) % 3).float()
    given = dict(zip(SINKS, sinks, strict=True))
    y, norm = op(t, backend, token_weights=weights, return_sqnorm=True, **given)
    assert all(leaf.grad is None for leaf in sinks) and float(norm) > 0
    once = reference.moment(t["x"].detach(), weights)
    first: list[Tensor] = []
    for times in (1, 2, 3):
        (1024.0 * y).sum().backward(retain_graph=True)  # its scale enters that of dy alone
        first = first or [leaf.grad.clone() for leaf in (gram_in, core, moment)]
        assert float(total.grad) == pytest.approx(times * float(norm), rel=1e-15)
        found = [leaf.grad for leaf in (gram_in, core, moment)]
        assert_close(found, [times * f for f in first], rtol=1e-14, atol=0)
    assert_close(first[2], once, rtol=1e-6, atol=0.0)
    op(t, backend, token_weights=weights, core_sink=(small := sink(8, 8))).sum().backward()
    assert_close(1024.0 * small.grad, first[1], rtol=1e-5, atol=1e-5 * float(first[1].norm()))
    assert not any(leaf.detach().any() for leaf in sinks)


@each_backend
def test_sinks_of_frozen_inputs(backend: str) -> None:
    t = draw(AWKWARD["rank 8"])
    total, moment = sink(), sink(100)
    op(t, backend, sqnorm_sink=total).sum().backward()
    op(t, backend, moment_sink=moment).sum().backward()
    op(t, backend, core_sink=(gram := sink(8, 8))).sum().backward()
    assert gram.grad.norm() > 0
    _, norm = op(t, backend, return_sqnorm=True)
    assert float(total.grad) == float(norm)
    assert_close(moment.grad, reference.moment(t["x"], None), rtol=1e-6, atol=0.0)
