"""The check that a provider computes the layer: against float64, before it is timed."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lib import package
from lib.cases import Case, Output
from lib.providers import Provider
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


def _doubled(case: Case) -> Case:
    tensors = {name: t for name, t in vars(case).items() if isinstance(t, Tensor)}
    return replace(
        case, **{n: t.detach().double().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    )


@lru_cache(maxsize=4)
def _truth(case: Case, bare: bool, backward: bool) -> tuple[dict[str, Tensor | None], ...]:
    """What PyTorch's own path gives, and float64; `bare` is without the adapter."""
    p, seed, kept = 0.0, None, None
    if case.dropout:
        torch.manual_seed(0)
        seed = torch.randint(0, 1 << 62, (), device=case.x.device)
        kept, p = package.mask(seed, *case.x.shape, case.dropout)
    A, B = (t.detach().to(case.x.dtype).requires_grad_() for t in (case.A, case.B))
    if bare:
        B = torch.zeros_like(B, requires_grad=True)
    case = replace(case, A=A, B=B)

    def plain() -> Output:
        delta = torch_delta(case.x, A, B, case.scaling, kept, p)
        return F.linear(case.x, case.weight, case.bias) + delta, None

    wide = _doubled(case)
    exact = partial(package.lora_linear, wide, norm=True, backend="reference", seed=seed)
    return _outputs(case, plain, backward), _outputs(wide, exact, backward)


def check(provider: Provider, case: Case, backward: bool) -> None:
    """Values, gradients and norm against float64, within twice the error of PyTorch's own path.

    A provider whose dropout mask is not ours is checked without dropout. Raises AssertionError.
    """
    if provider.formula is not None:
        exact, plain = provider.formula(_doubled(case)), provider.formula(case)
        assert_within(provider.make(case)()[0], plain, exact, factor=2.0)
        return
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
