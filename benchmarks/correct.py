"""The check that a provider computes the layer: against float64, before it is timed."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from cases import Case, Output
from providers import Provider
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from loradrop.op import reference
from loradrop.op.call import Call, Needs, Saved
from loradrop.op.philox import keep_mask, quantize
from loradrop.testing import assert_within, torch_delta

NORM_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}


def _outputs(case: Case, run: Callable[[], Output], backward: bool) -> dict[str, Tensor | None]:
    if not backward:
        with torch.no_grad():
            y, sqnorm = run()
        return {"y": y, "sqnorm": sqnorm}
    y, sqnorm = run()
    y.backward(case.dy)
    found = {"y": y.detach(), "dx": case.x.grad, "dA": case.A.grad, "dB": case.B.grad}
    case.x.grad = case.A.grad = case.B.grad = None
    return found | {"sqnorm": sqnorm}


@lru_cache(maxsize=4)
def _truth(case: Case, bare: bool, backward: bool) -> tuple[dict[str, Tensor | None], ...]:
    """What PyTorch's own path gives, and float64; `bare` is without the adapter."""
    p, seed, kept = quantize(case.dropout), None, None
    if p:
        torch.manual_seed(0)
        seed = torch.randint(0, 1 << 62, (), device=case.x.device)
        kept = keep_mask(seed, *case.x.shape, p)
    A, B = (t.detach().to(case.x.dtype).requires_grad_() for t in (case.A, case.B))
    if bare:
        B = torch.zeros_like(B, requires_grad=True)

    def plain() -> Output:
        delta = torch_delta(case.x, A, B, case.scaling, kept, p)
        return F.linear(case.x, case.weight, case.bias) + delta, None

    x, weight, a, b, dy = (t.detach().double() for t in (case.x, case.weight, A, B, case.dy))
    bias = None if case.bias is None else case.bias.double()
    call = Call(x, weight, bias, None, a, b, case.scaling, p, seed, sqnorm=True)
    out = reference.forward(call)
    exact = {"y": out.y, "sqnorm": out.sqnorm}
    if backward:
        saved = Saved(x, weight, a, b, out.h, None, seed, case.scaling, p)
        grads = reference.backward(saved, dy, Needs(True, True, True))
        exact |= dict(zip(("dx", "dA", "dB"), grads, strict=True))
    return _outputs(replace(case, A=A, B=B), plain, backward), exact


def check(provider: Provider, case: Case, backward: bool) -> None:
    """Values, gradients and norm against float64, within twice the error of PyTorch's own path.

    A provider whose dropout mask is not ours is checked without dropout. Raises AssertionError.
    """
    case = case if provider.masks else replace(case, dropout=0.0)
    torch_path, exact = _truth(case, provider.bare, backward)
    torch.manual_seed(0)  # the same seed of the mask
    actual = _outputs(case, provider.make(case), backward)
    for name in exact:
        if name == "sqnorm" or (provider.bare and name in ("dA", "dB")):
            continue
        assert actual[name] is not None, f"{name} is missing"
        try:
            assert_within(actual[name], torch_path[name], exact[name], factor=2.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    assert (actual["sqnorm"] is not None) == provider.norm, "a norm nobody asked for, or none"
    if provider.norm:
        off = abs(float(actual["sqnorm"]) / float(exact["sqnorm"]) - 1.0)
        assert off <= NORM_ERROR[case.x.dtype], f"sqnorm: relative error {off:.3g}"
    if provider.silent is not None:
        torch.manual_seed(0)
        y = _outputs(case, provider.silent(case), backward)["y"]
        assert torch.equal(y, actual["y"]), "y: other bits than without the norm"


def forget() -> None:
    """Drops what `check` keeps of the last cases: large arrays."""
    _truth.cache_clear()
