"""How the fused backends are put together, with PyTorch in the place of the CUDA kernels."""

import pytest
import torch
from op_cases import INTERPRETED, S, Tensors, call_of, draw
from torch import Tensor

from loradrop.op import philox, reference
from loradrop.op.call import Call, Grads, Needs, Output, Saved
from loradrop.op.warn import warn_once
from loradrop.testing import Shape, error

pytestmark = pytest.mark.interpreter
if not INTERPRETED:
    pytest.skip("Triton's interpreter has a process of its own", allow_module_level=True)
pytest.importorskip("triton")

from loradrop.kernels import tiles  # noqa: E402
from loradrop.op import fused  # noqa: E402

ALL = Needs(True, True, True)


def saved_of(call: Call, out: Output) -> Saved:
    return Saved(
        call.x, call.weight, call.A, call.B, out.h, out.mask, call.seed, call.scaling, call.dropout,
        a=out.a, b=out.b,
    )  # fmt: skip


def assert_near(grads: Grads, wanted: Grads) -> None:
    for grad, exact in zip(grads[:3], wanted[:3], strict=True):
        assert grad is not None and exact is not None and error(grad, exact) < 2e-3


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """`cuda.gemm_ext` and `cuda.decode` with their demands: one dtype, rows of whole 16 bytes.

    The x of every call of `decode`.
    """
    decoded: list[Tensor] = []

    def check(*matrices: Tensor) -> None:
        for matrix in matrices:
            assert matrix.dtype == torch.float16
            stored = matrix if matrix.stride(1) == 1 else matrix.T
            assert stored.stride(1) == 1 and stored.stride(0) % 8 == 0

    def gemm_ext(
        p: Tensor, q: Tensor, bias: Tensor | None, h: Tensor | None, l: Tensor | None, s: float
    ) -> Tensor:
        wide = p.float() @ q.float() + (0.0 if bias is None else bias.float())
        check(p, q)
        if h is not None and l is not None:
            check(h, l)
            wide += s * (h.float() @ l.float())
        return wide.to(p.dtype)

    def decode(
        x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float,
        weights: Tensor | None, sqnorm: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        check(x, weight, A, B)
        decoded.append(x)
        call = Call(x, weight, bias, None, A, B, s, token_weights=weights, sqnorm=sqnorm)
        y, h, _, norm, *_ = reference.forward(call)
        return y, h, norm

    def gemm_lora(
        p: Tensor, q: Tensor, bias: Tensor | None, a: Tensor, l: Tensor, s: float, h_scale: float
    ) -> tuple[Tensor, Tensor]:
        check(a)
        h = tiles.new_rows(p, p.shape[0], a.shape[1])
        h.copy_(h_scale * (p.float() @ a.float()))
        return gemm_ext(p, q, bias, h, l, s), h

    monkeypatch.setattr(fused.cuda, "gemm_ext", gemm_ext)
    monkeypatch.setattr(fused.cuda, "gemm_lora", gemm_lora)
    monkeypatch.setattr(fused.cuda, "streams", lambda *sizes: 4)
    monkeypatch.setattr(fused.cuda, "decode", decode)
    monkeypatch.setattr(fused.cuda, "why_not_placed", lambda device: None)
    return decoded


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("name", ["CUDA", "OVERLAP"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("scaling", [2.0, S], ids=["s in B", "s"])
@pytest.mark.parametrize("r", [8, 12])
@pytest.mark.parametrize("rows", [40, 5], ids=["many", "few"])
def test_the_cuda_backend(
    rows: int, r: int, scaling: float, p: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An s of 2 goes into the copy of B, as where x is in bfloat16. Also from copies without gaps
    between their rows, as hooks of saved tensors leave them.
    """
    monkeypatch.setattr(tiles, "scale_mode", lambda s, _: "h" if s == 2.0 else "sum")
    t, backend = draw(Shape(rows, 64, 48, r), torch.float16), getattr(fused, name)
    call = call_of(t, philox.quantize(p), scaling, sqnorm=True)
    out, want = backend.forward(call), reference.forward(call)
    assert error(out.h, want.h) < 1e-3 and error(out.y, want.y) < 1e-3
    exact = float(reference.sqnorm(out.h, t["B"], scaling, None))
    assert float(out.sqnorm) == pytest.approx(exact, rel=1e-5)
    saved = saved_of(call, out)
    assert saved.a is not None and saved.b is not None
    moved = saved._replace(a=saved.a.contiguous(), b=saved.b.contiguous(), h=saved.h.contiguous())
    of_a_sum = torch.ones((), dtype=torch.float16).expand(rows, 48)
    for of, dy in ((saved, t["dy"]), (saved, of_a_sum), (moved, t["dy"])):
        assert_near(backend.backward(of, dy, ALL), reference.backward(of, dy, ALL))


@pytest.mark.parametrize("change", ["none", "a row more", "dropout", "rank 12", "odd rows", "y0"])
def test_what_goes_to_the_decode_kernel(change: str, by_torch: list[Tensor]) -> None:
    """Up to 32 rows of whole 16 bytes without dropout; all else has the right values."""
    m, r = 32 + (change == "a row more"), 12 if change == "rank 12" else 8
    t: Tensors = draw(Shape(m, 64, 48, r), torch.float16)
    if change == "odd rows":
        t["x"] = torch.cat([t["x"], t["x"][:, :1]], 1)[:, :64]
    if change == "y0":
        t |= {"y0": t["dy"], "weight": None, "bias": None}  # type: ignore[dict-item]
    p = 0.25 if change == "dropout" else 0.0
    weights = torch.arange(m) % 3
    call = call_of(t, p, sqnorm=True, token_weights=weights)
    y, h, _, sqnorm, *_ = fused.CUDA.forward(call)
    want = reference.forward(call)
    assert error(y, want.y) < 1e-3 and error(h, want.h) < 1e-3
    assert float(sqnorm) == pytest.approx(float(want.sqnorm), rel=2e-3)
    assert len(by_torch) == (change in ("none", "rank 12"))


def test_clusters_without_room_are_served_by_more_kernels(
    by_torch: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason, once."""
    monkeypatch.setattr(fused.cuda, "why_not_placed", lambda device: "there is no room")
    warn_once.cache_clear()
    call = call_of(draw(Shape(5, 64, 48, 8), torch.float16), 0.0, sqnorm=True)
    with pytest.warns(UserWarning, match="there is no room") as said:
        outputs = [fused.CUDA.forward(call) for _ in range(2)]
    assert len(said) == 1 and by_torch == []
    assert error(outputs[1].y, reference.forward(call).y) < 1e-3


def test_t_does_not_overflow_float16_for_its_scale() -> None:
    """s·dyB is 120 000 here, beyond float16; dyB and all gradients are not."""
    one = torch.ones(2, 64, dtype=torch.float16)
    dy = torch.full((2, 32), 2.0, dtype=torch.float16)
    A, B = torch.full((4, 64), 2.0**-10), torch.full((32, 4), 50.0)
    weight, h = torch.zeros(32, 64, dtype=torch.float16), torch.ones(2, 4, dtype=torch.float16)
    saved = Saved(one, weight, A, B, h, None, None, 37.5, 0.0)
    for backend in (fused.THIN, fused.TRITON):
        dx, dA, *_ = backend.backward(saved, dy, ALL)
        torch.testing.assert_close(dx, torch.full_like(dx, 4 * 120000 * 2.0**-10))
        torch.testing.assert_close(dA, torch.full_like(dA, 240000.0))


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("r", [8, 12])
@pytest.mark.parametrize("name", ["THIN", "TRITON", "CUDA"])
def test_one_read_of_dy(name: str, r: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """For t and dB, where both are wanted; alone, each has its own kernel."""
    monkeypatch.setattr(fused, "ONE_READ_OF_DY", True)
    backend = getattr(fused, name)
    called, t_and_db = [], fused.t_and_db

    def spy(*given: object) -> tuple[Tensor, Tensor]:
        called.append(given)
        return t_and_db(*given)

    monkeypatch.setattr(fused, "t_and_db", spy)
    t = draw(Shape(70, 104, 64, r), torch.float16)
    call = call_of(t, p)
    saved = saved_of(call, backend.forward(call))
    wanted = reference.backward(saved_of(call, reference.forward(call)), t["dy"], ALL)
    assert_near(backend.backward(saved, t["dy"], ALL), wanted)
    assert len(called) == 1
    for needs in (Needs(True, True, False), Needs(False, False, True)):
        grads = backend.backward(saved, t["dy"], needs)
        for grad, exact, needed in zip(grads, wanted, needs, strict=True):
            assert (grad is not None) == needed
            assert grad is None or error(grad, exact) < 2e-3
    assert len(called) == 1


@pytest.mark.parametrize("backend", [fused.THIN, fused.TRITON], ids=["thin", "triton"])
def test_rounded_adapters_change_no_bit(
    backend: fused.Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide adapters are rounded once for many rows, and their gradients stay float32."""
    seen, shrink = [], fused.shrink

    def spy(x: Tensor, A: Tensor, *args: object, **kwargs: object) -> object:
        seen.append(A.dtype)
        return shrink(x, A, *args, **kwargs)

    monkeypatch.setattr(fused, "shrink", spy)
    t = draw(Shape(65, 64, 48, 64), torch.float16)
    call, found = call_of(t, sqnorm=True), []
    for rows in (66, 65):
        monkeypatch.setattr(fused, "ROUNDED_ROWS", rows)
        out = backend.forward(call)
        grads = backend.backward(saved_of(call, out), t["dy"], ALL)
        found.append((out.y, out.h, out.sqnorm, *grads[:3]))
    assert seen == 2 * [torch.float32] + 2 * [torch.float16]
    assert found[0][4].dtype == found[0][5].dtype == torch.float32
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_the_gradient_of_a_sum_is_read_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one number, expanded."""
    seen, outer = [], fused.outer

    def spy(p: Tensor, *args: object, **kwargs: object) -> object:
        seen.append(p.stride())
        return outer(p, *args, **kwargs)

    monkeypatch.setattr(fused, "outer", spy)
    t = draw(Shape(20, 64, 48, 8), torch.float16)
    call = call_of(t)
    saved = saved_of(call, fused.THIN.forward(call))
    dy = torch.ones((), dtype=torch.float16).expand(20, 48)
    assert_near(fused.THIN.backward(saved, dy, ALL), reference.backward(saved, dy, ALL))
    assert seen == [(64, 1), (48, 1)]


def test_a_mask_is_drawn_once() -> None:
    """The backward reads the bits that the forward kept, not the seed."""
    t = draw(Shape(20, 64, 48, 8), torch.float16)
    call = call_of(t, philox.quantize(0.25))
    out = fused.TRITON.forward(call)
    assert out.mask is not None and out.mask.shape == (20, philox.row_bytes(64))
    saved = saved_of(call, out)
    other = saved._replace(seed=torch.tensor(1))
    grads = fused.TRITON.backward(other, t["dy"], ALL)
    assert_near(grads, reference.backward(saved, t["dy"], ALL))
