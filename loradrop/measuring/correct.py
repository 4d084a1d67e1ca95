"""The check of a layer against float64, before it is timed: y, dx, dA, dB and the squared norm."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from loradrop.measuring.cases import Case, Output, ours
from loradrop.op.philox import keep_mask, quantize
from loradrop.testing import assert_within, torch_delta

NORM_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
Results = dict[str, Tensor | None]


def results(case: Case, run: Callable[[], Output], backward: bool) -> Results:
    """What a call gives by name: y and sqnorm; dx, dA and dB of a backward pass."""
    torch.manual_seed(0)  # the same seed of the mask
    if not backward:
        with torch.no_grad():
            y, sqnorm = run()
        return {"y": y, "sqnorm": sqnorm}
    y, sqnorm = run()
    y.backward(case.dy)  # type: ignore[no-untyped-call]
    found = {"y": y.detach(), "dx": case.x.grad, "dA": case.A.grad, "dB": case.B.grad}
    case.x.grad = case.A.grad = case.B.grad = None
    return found | {"sqnorm": sqnorm}


def doubled(case: Case) -> Case:
    """The case in float64."""
    tensors = {name: t for name, t in vars(case).items() if isinstance(t, Tensor)}
    wide = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    return replace(case, **wide)  # type: ignore[arg-type]


@lru_cache(maxsize=4)
def _truth(case: Case, bare: bool, backward: bool) -> tuple[Results, Results]:
    """What PyTorch's own path gives, and float64; `bare` is without the adapter."""
    p, kept = 0.0, None
    if case.dropout:
        torch.manual_seed(0)
        seed = torch.randint(0, 1 << 62, (), device=case.x.device)
        p = quantize(case.dropout)
        rows, columns = case.x.shape
        kept = keep_mask(seed, rows, columns, p)
    A, B = (t.detach().to(case.x.dtype).requires_grad_() for t in (case.A, case.B))
    if bare:
        B = torch.zeros_like(B, requires_grad=True)
    case = replace(case, A=A, B=B)

    def plain() -> Output:
        delta = torch_delta(case.x, A, B, case.scaling, kept, p)
        return linear(case.x, case.weight, case.bias) + delta, None

    wide = doubled(case)
    exact = ours(wide, norm=True, backend="reference")
    return results(case, plain, backward), results(wide, exact, backward)


def prepare(case: Case, backward: bool) -> None:
    """Computes what `compare` holds the results of a case against, which is kept until `forget`."""
    _truth(case, False, backward)


def compare(actual: Results, case: Case, *, norm: bool, bare: bool = False) -> None:
    """What `results` gave, within twice the error of PyTorch's own path, both against float64.

    norm: whether there must be a squared norm   bare: it is the layer without its adapter

    Raises AssertionError naming the result that is missing or off, under `python -O` too.
    """
    torch_path, exact = _truth(case, bare, "dx" in actual)
    for name, value in exact.items():
        if name == "sqnorm" or (bare and name in ("dA", "dB")):
            continue
        given, plain = actual[name], torch_path[name]
        if given is None or plain is None or value is None:
            raise AssertionError(f"{name} is missing")
        try:
            assert_within(given, plain, value, factor=2.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    sqnorm, truth = actual["sqnorm"], exact["sqnorm"]
    if (sqnorm is not None) != norm:
        raise AssertionError("a norm nobody asked for, or none")
    if sqnorm is not None and truth is not None:
        off = abs(float(sqnorm) / float(truth) - 1.0)
        if not off <= NORM_ERROR[case.x.dtype]:
            raise AssertionError(f"sqnorm: relative error {off:.3g}")


def check_backend(case: Case, backend: str, backward: bool) -> None:
    """One backend, with the norm and without. Raises AssertionError as `compare`."""
    for norm in (True, False):
        compare(results(case, ours(case, norm, backend), backward), case, norm=norm)


def forget() -> None:
    """Drops what is kept of the last cases: large arrays."""
    _truth.cache_clear()
