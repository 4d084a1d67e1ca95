"""The calls that the eager backend makes."""

from functools import partial
from typing import Any

import pytest
import torch
from op_cases import call_of, draw
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import loradrop
from loradrop.op import eager, reference
from loradrop.op.call import Needs, Saved
from loradrop.testing import Shape, error


class Products(TorchDispatchMode):
    """The shapes of what matrix products give, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.append(tuple(found.shape))
        return found


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
    monkeypatch.setattr(eager, "_turns", lambda rows, dtype: False)
    found = eager.backward(saved, t["dy"], Needs(True, True, True))
    assert widened == [(8, 1100), (48, 1100)]
    for one, other in zip(found[:3], want[:3], strict=True):
        assert one.dtype == other.dtype and error(one, other) < 1e-5 and other.abs().max() > 0.1


def _turned(r: int, rows: int, dtype: torch.dtype) -> list[bool]:
    """Whether dh and dB are made as their transposes."""
    t = draw(Shape(rows, 40, 48, r), dtype)
    call = call_of(t)
    saved = Saved(*call[:2], call.A, call.B, eager.forward(call).h, None, None, call.scaling, 0.0)
    with Products() as made:
        found = eager.backward(saved, t["dy"], Needs(True, True, True))
    wanted = reference.backward(saved, t["dy"], Needs(True, True, True))
    for one, other in zip(found[:3], wanted[:3], strict=True):
        assert one.is_contiguous() and one.dtype == other.dtype and error(one, other) < 1e-5
    return [(r, rows) in made.shapes, (r, 48) in made.shapes]


def test_a_cpu_makes_thin_products_the_long_way() -> None:
    for dtype in (torch.float32, torch.float64):
        assert _turned(8, 64, dtype) == [True, True]
        assert _turned(8, 63, dtype) == [False, False]  # few rows: a copy would cost more
        assert _turned(16, 64, dtype) == [False, True]
        assert _turned(1, 64, dtype) == [False, False]
    assert _turned(64, 80, torch.float32) == [False, False]  # N = 48 is the short side


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("mutation", [False, True])
def test_selective_checkpointing_of_products(mutation: bool, p: float) -> None:
    """It keeps the products for the recomputation, which must find them as they were."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    config = loradrop.LoRAConfig(r=2, lora_dropout=p, target_modules=["0", "2"])
    bank = loradrop.inject(model, config)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    x, kept = torch.randn(5, 16), [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    torch.manual_seed(1)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in bank.parameters() if p.grad is not None]
    bank.zero_grad()
    contexts = partial(
        create_selective_checkpoint_contexts, kept, allow_cache_entry_mutation=mutation
    )
    torch.manual_seed(1)
    checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    found = [p.grad for p in bank.parameters() if p.grad is not None]
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
