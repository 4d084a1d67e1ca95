"""How the fused backends are put together: the CUDA kernels' places taken by PyTorch."""

import pytest
import torch
from op_cases import INTERPRETED, S, Tensors, draw, kept
from torch import Tensor

from loradrop.op import philox, reference
from loradrop.testing import Shape, error

pytestmark = pytest.mark.interpreter
if not INTERPRETED:
    pytest.skip("Triton's interpreter has a process of its own", allow_module_level=True)
pytest.importorskip("triton")

from op_cases import SEED  # noqa: E402

from loradrop import fused  # noqa: E402


def gemm_ext(
    p: Tensor, q: Tensor, bias: Tensor | None, h: Tensor | None, l: Tensor | None, s: float
) -> Tensor:
    """What `cuda.gemm_ext` computes, with its demands: one dtype, rows of whole 16 bytes."""
    wide = p.float() @ q.float() + (0.0 if bias is None else bias.float())
    if h is not None and l is not None:
        for matrix in (p, q, h, l):
            assert matrix.dtype == p.dtype
            stored = matrix if matrix.stride(1) == 1 else matrix.T
            assert stored.stride(1) == 1 and stored.stride(0) % 8 == 0
        wide += s * (h.float() @ l.float())
    return wide.to(p.dtype)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("scaling", [2.0, S])
@pytest.mark.parametrize("r", [4, 8, 12])
def test_the_cuda_backend(
    r: int, scaling: float, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused.cuda, "gemm_ext", gemm_ext)
    monkeypatch.setattr(fused.cuda, "supports_decode", lambda *_: "not here")
    t = draw(Shape(40, 64, 48, r), torch.float16)
    q, seed = philox.quantize(p), SEED if p else None
    operands = (t["x"], t["weight"], t["bias"], None, t["A"], t["B"], scaling, q, seed)
    y, h, mask, norm = fused.CUDA.forward(*operands, None, True)
    want, h_want = reference.forward(*operands)
    assert error(h, h_want) < 1e-3 and error(y, want) < 1e-3
    assert norm is not None
    exact = float(reference.sqnorm(h, t["B"], scaling, None))
    assert float(norm) == pytest.approx(exact, rel=1e-5)
    rest = (scaling, q, seed, (True, True, True))
    grads = fused.CUDA.backward(t["dy"], t["x"], t["weight"], t["A"], t["B"], h, mask, *rest)
    wanted = reference.backward(t["dy"], t["x"], t["weight"], t["A"], t["B"], h, *rest)
    for grad, exact_grad in zip(grads, wanted, strict=True):
        assert grad is not None and exact_grad is not None
        assert error(grad, exact_grad) < 2e-3


def test_a_gradient_that_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.cuda, "gemm_ext", gemm_ext)
    t = draw(Shape(40, 64, 48, 8), torch.float16)
    _, h = reference.forward(t["x"], t["weight"], None, None, t["A"], t["B"], S, 0.0, None)
    dy = torch.ones((), dtype=torch.float16).expand(40, 48)
    rest = (S, 0.0, None, (True, True, True))
    grads = fused.CUDA.backward(dy, t["x"], t["weight"], t["A"], t["B"], h, None, *rest)
    wanted = reference.backward(dy, t["x"], t["weight"], t["A"], t["B"], h, *rest)
    for grad, exact in zip(grads, wanted, strict=True):
        assert grad is not None and exact is not None and error(grad, exact) < 2e-3


def test_few_rows_go_to_the_decode_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def decode(*args: object) -> tuple[str, str, str]:
        calls.append(args)
        return "y", "h", "norm"

    monkeypatch.setattr(fused.cuda, "supports_decode", lambda *_: None)
    monkeypatch.setattr(fused.cuda, "decode", decode)

    def forward(t: Tensors, p: float = 0.0) -> object:
        seed = SEED if p else None
        return fused.CUDA.forward(
            t["x"], t["weight"], None, None, t["A"], t["B"], S, p, seed, None, True
        )

    few = draw(Shape(32, 64, 48, 8), torch.float16)
    assert forward(few) == ("y", "h", None, "norm")
    x, _, bias, A, B, scaling, weights, norm = calls.pop()
    assert x is few["x"] and (bias, scaling, weights, norm) == (None, S, None, True)
    assert A.dtype == B.dtype == torch.float16
    monkeypatch.setattr(fused.cuda, "gemm_ext", gemm_ext)
    forward(draw(Shape(33, 64, 48, 8), torch.float16))
    forward(few, 0.25)
    assert calls == []


def test_t_does_not_overflow_float16_for_its_scale() -> None:
    """s·dyB is 120 000 here, beyond float16; dyB and all gradients are not."""
    one = torch.ones(2, 64, dtype=torch.float16)
    dy = torch.full((2, 32), 2.0, dtype=torch.float16)
    A, B = torch.full((4, 64), 2.0**-10), torch.full((32, 4), 50.0)
    weight, h = torch.zeros(32, 64, dtype=torch.float16), torch.ones(2, 4, dtype=torch.float16)
    rest = (37.5, 0.0, None, (True, True, True))
    for backend in (fused.THIN, fused.TRITON):
        dx, dA, _ = backend.backward(dy, one, weight, A, B, h, None, *rest)
        assert dx is not None and dA is not None
        torch.testing.assert_close(dx, torch.full_like(dx, 4 * 120000 * 2.0**-10))
        torch.testing.assert_close(dA, torch.full_like(dA, 240000.0))


def test_a_mask_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward reads the bits that the forward kept, not the seed."""
    t = draw(Shape(20, 64, 48, 8), torch.float16)
    q = philox.quantize(0.25)
    operands = (t["x"], t["weight"], None, None, t["A"], t["B"], S, q, SEED, None, False)
    _, h, mask, _ = fused.TRITON.forward(*operands)
    assert mask is not None and mask.shape == (20, philox.row_bytes(64))
    other = torch.tensor(1)
    rest = (S, q, other, (True, True, True))
    grads = fused.TRITON.backward(t["dy"], t["x"], t["weight"], t["A"], t["B"], h, mask, *rest)
    bits = kept(t, 0.25)
    assert bits is not None
    want = reference.backward(
        t["dy"], t["x"], t["weight"], t["A"], t["B"], h, S, q, SEED, (True, True, True)
    )
    for grad, exact in zip(grads, want, strict=True):
        assert grad is not None and exact is not None and error(grad, exact) < 2e-3
