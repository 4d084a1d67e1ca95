"""The ways of others to compute a linear layer with LoRA, and the layer without it.

Each is one function: from a `Case` to a call without arguments that gives y and, where it has one,
the squared norm of the delta.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from loradrop.measuring.cases import Case, Output


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
    sizes = {"r": r, "lora_alpha": int(case.scaling * r)}
    config = LoraConfig(**sizes, lora_dropout=case.dropout, target_modules=["linear"])
    layer = inject_adapter_in_model(config, nn.ModuleDict({"linear": base}))["linear"]
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = case.A, case.B
    return layer


def peft(case: Case) -> Callable[[], Output]:
    """PEFT's own layer."""
    layer = _peft_layer(case)
    return lambda: (layer(case.x), None)


def peft_compiled(case: Case, compiler: str = "inductor") -> Callable[[], Output]:
    """PEFT's own layer under `torch.compile`, for these sizes alone."""
    layer = torch.compile(_peft_layer(case), dynamic=False, backend=compiler)
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


def peft_hook_b(case: Case) -> Callable[[], Output]:
    """PEFT's layer with a forward hook on `lora_B`, which finds the delta there."""
    layer, norms = _peft_layer(case), []

    def hook(_: Any, __: tuple[Tensor], output: Tensor) -> None:
        norms.append((output.detach() * layer.scaling["default"]).float().pow(2).sum())

    layer.lora_B["default"].register_forward_hook(hook)
    return lambda: (layer(case.x), norms.pop())


class Addmm(torch.autograd.Function):
    """Unsloth's scheme (LoRA_W): `addmm_` in place on the frozen product; h is recomputed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, W: Tensor, b: Tensor | None, A: Tensor,
        B: Tensor, s: float,
    ) -> Tensor:  # fmt: skip
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
