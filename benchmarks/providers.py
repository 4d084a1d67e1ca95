"""The ways to compute a linear layer with LoRA that are compared, and the check that each is right.

A provider is one function: from a `Case` to a call without arguments that gives y and, where it has
one, the squared norm of the delta. All share x, W, A and B.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from timing import Cell
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from loradrop import reference
from loradrop.ops import lora_linear
from loradrop.philox import keep_mask, quantize
from loradrop.testing import assert_within, torch_delta

NORM_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}

Output = tuple[Tensor, Tensor | None]  # y, and the squared norm where it is asked for


@dataclass(frozen=True)
class Case:
    """The operands of one cell: x (M, K), weight (N, K), A (r, K), B (N, r), dy (M, N)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    dy: Tensor
    scaling: float
    dropout: float


def make_case(cell: Cell, device: str) -> Case:
    """Random operands whose delta is about as large as the base's output."""
    draw = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, cell.dtype)

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, device=device, generator=draw).mul_(scale).to(dtype)

    return Case(
        x=normal(cell.M, cell.K).requires_grad_(),
        weight=normal(cell.N, cell.K, cell.K**-0.5),
        bias=normal(1, cell.N)[0] if device == "cpu" else None,
        A=nn.Parameter(normal(cell.r, cell.K, cell.K**-0.5)),
        B=nn.Parameter(normal(cell.N, cell.r, cell.r**-0.5)),
        dy=normal(cell.M, cell.N),
        scaling=2.0,
        dropout=cell.dropout,
    )


def frozen(case: Case) -> Callable[[], Output]:
    """The linear map without an adapter."""
    return lambda: (F.linear(case.x, case.weight, case.bias), None)


def _peft_layer(case: Case) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    (n, k), r = case.weight.shape, case.A.shape[0]
    base = nn.Linear(k, n, bias=case.bias is not None, device="meta")
    base.weight = nn.Parameter(case.weight, requires_grad=False)
    if case.bias is not None:
        base.bias = nn.Parameter(case.bias, requires_grad=False)
    config = LoraConfig(
        r=r,
        lora_alpha=int(case.scaling * r),
        lora_dropout=case.dropout,
        target_modules=["linear"],
    )
    layer = inject_adapter_in_model(config, nn.ModuleDict({"linear": base}))["linear"]
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = case.A, case.B
    return layer


def peft(case: Case) -> Callable[[], Output]:
    """PEFT's own layer."""
    layer = _peft_layer(case)
    return lambda: (layer(case.x), None)


def peft_hook(case: Case) -> Callable[[], Output]:
    """PEFT's layer with a forward hook that computes the delta once more, for its squared norm."""
    layer, norms = _peft_layer(case), []

    def hook(module: Any, inputs: tuple[Tensor], _: Tensor) -> None:
        with torch.no_grad():
            delta = module.lora_B["default"](module.lora_A["default"](inputs[0]))
            norms.append((delta * module.scaling["default"]).float().pow(2).sum())

    layer.register_forward_hook(hook)
    return lambda: (layer(case.x), norms.pop())


class Addmm(torch.autograd.Function):
    """Unsloth's scheme (LoRA_W): `addmm_` in place on the frozen product; h is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        s: float,
    ) -> Tensor:
        ctx.save_for_backward(x, dropped, W, A, B)
        ctx.scaling = s
        h = (x if dropped is None else dropped) @ A.T
        return F.linear(x, W, b).addmm_(h, B.T, alpha=s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, W, A, B = ctx.saved_tensors
        tokens, dh, dx, delta = x if dropped is None else dropped, dy @ B, dy @ W, None
        if dropped is None:
            dx.addmm_(dh, A, alpha=ctx.scaling)
        else:
            delta = (dh @ A).mul_(ctx.scaling)
        dA = (dh.T @ tokens).mul_(ctx.scaling)
        dB = (dy.T @ (tokens @ A.T)).mul_(ctx.scaling)
        return dx, delta, None, None, dA, dB, None


def addmm(case: Case) -> Callable[[], Output]:
    """`Addmm`, on a masked copy of x where there is dropout."""

    def run() -> Output:
        dropped = F.dropout(case.x, case.dropout) if case.dropout else None
        operands = (case.x, dropped, case.weight, case.bias, case.A, case.B, case.scaling)
        return Addmm.apply(*operands), None

    return run


def ours(case: Case, norm: bool = False) -> Callable[[], Output]:
    """The op, with the backend that the dispatcher picks; its seed is drawn as the layer does."""

    def run() -> Output:
        p = case.dropout
        seed = torch.randint(0, 1 << 62, (), device=case.x.device) if p else None
        operands = (case.x, case.weight, case.bias, case.A, case.B, case.scaling)
        result = lora_linear(*operands, dropout=p, seed=seed, return_sqnorm=norm)
        return result if norm else (result, None)

    return run


@dataclass(frozen=True)
class Provider:
    """One way to compute the layer. `masks`: its dropout is the reference's, bit for bit."""

    name: str
    make: Callable[[Case], Callable[[], Output]]
    norm: bool = False
    wide: bool = False  # float32 adapters beside an x of half precision
    masks: bool = False


def providers(dtype: str, device: str) -> list[Provider]:
    """Those to compare; the frozen product first."""
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    return [
        Provider("frozen", frozen),
        Provider(f"peft_{short}", peft),
        *([Provider("peft_fp32", peft, wide=True)] if device == "cuda" and short != "fp32" else []),
        Provider("peft_hook", peft_hook, norm=True),
        Provider("addmm", addmm),
        Provider("loradrop", ours, masks=True),
        Provider("loradrop", lambda case: ours(case, norm=True), norm=True, masks=True),
    ]


def _outputs(case: Case, run: Callable[[], Output], backward: bool) -> dict[str, Tensor | None]:
    y, sqnorm = run()
    if backward:
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
    y, h = reference.forward(x, weight, bias, None, a, b, case.scaling, p, seed)
    exact = {"y": y, "sqnorm": reference.sqnorm(h, b, case.scaling, None)}
    if backward:
        needs = (True, True, True)
        grads = reference.backward(dy, x, weight, a, b, h, case.scaling, p, seed, needs)
        exact |= dict(zip(("dx", "dA", "dB"), grads, strict=True))
    return _outputs(replace(case, A=A, B=B), plain, backward), exact


def check(provider: Provider, case: Case, backward: bool) -> None:
    """Values, gradients and norm against float64, within twice the error of PyTorch's own path.

    A provider whose dropout mask is not ours is checked without dropout. Raises AssertionError.
    """
    case = case if provider.masks else replace(case, dropout=0.0)
    bare = provider.make is frozen
    torch_path, exact = _truth(case, bare, backward)
    torch.manual_seed(0)  # the same seed of the mask
    actual = _outputs(case, provider.make(case), backward)
    for name in exact:
        if name == "sqnorm" or (bare and name in ("dA", "dB")):
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


def forget() -> None:
    """Drops what `check` keeps of the last cases: large arrays."""
    _truth.cache_clear()
