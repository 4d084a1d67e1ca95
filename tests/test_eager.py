"""The calls that the eager backend makes."""

from typing import Any

import pytest
import torch
from op_cases import call_of, draw
from torch import Tensor

from loradrop.op import eager
from loradrop.op.call import Needs, Saved
from loradrop.testing import Shape, error


@pytest.mark.skipif(not eager._MM_WIDENS, reason="this PyTorch has no such product")
def test_a_thin_product_of_half_precision_is_one_call_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradients of float32 adapters: torch.mm with float32 sums, which a CPU has not."""
    mm, widened = torch.mm, list[torch.Size]()

    def on_a_gpu(a: Tensor, b: Tensor, **more: Any) -> Tensor:
        if not more:
            return mm(a, b)
        assert more == {"out_dtype": torch.float32} and a.dtype == b.dtype == torch.bfloat16
        widened.append(a.shape)
        return mm(a.float(), b.float())

    t = draw(Shape(1100, 64, 48, 8), torch.bfloat16)
    call = call_of(t)
    h = eager.forward(call).h
    saved = Saved(*call[:2], call.A, call.B, h, None, None, call.scaling, 0.0)
    want = eager.backward(saved, t["dy"], Needs(True, True, True))
    assert not widened
    monkeypatch.setattr(torch, "mm", on_a_gpu)
    monkeypatch.setattr(eager, "_widens", lambda p: True)
    found = eager.backward(saved, t["dy"], Needs(True, True, True))
    assert widened == [(8, 1100), (48, 1100)]
    for one, other in zip(found, want, strict=True):
        assert one.dtype == other.dtype and error(one, other) < 1e-5 and other.abs().max() > 0.1
