"""The op's one autograd Function, and the statistics that its backward pass gives to sinks.

Under `torch.compile` the same forward and backward are custom ops (`compiled.py`).

A sink is a float64 leaf whose gradient is a statistic of the call: autograd adds it once for each
backward pass, under activation checkpointing, accumulation and compilation alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from loradrop.op.call import NO_SINKS, Backend, Call, Grads, Needs, Output, Saved, Sinks
from loradrop.op.reference import REFERENCE, backward_with_graph, core, moment, up

Backward = Callable[[Saved, Tensor, Needs], Grads]


_MOMENT = Sinks._fields.index("moment")


def _moment(saved: Saved, _: Tensor | None, grads: Grads) -> Tensor:
    """The backend's, or the specification's where no backend was asked: y had no gradient."""
    if grads.moment is not None:
        return grads.moment
    assert saved.x is not None
    return moment(saved.x, saved.token_weights)


# In the order of `Sinks`. Never a saved tensor itself: autograd adds to what it was given first.
STATISTICS: Sequence[Callable[[Saved, Tensor | None, Grads], Tensor]] = (
    lambda saved, *_: saved.sqnorm.clone(),
    _moment,
    lambda saved, *_: saved.gram.clone(),
    lambda saved, dy, grads: core(saved, dy, grads.B),
)


def autocasting(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def reads_x(call: Call, sinks: Sinks) -> bool:
    """Whether the backward pass reads x: for the gradient of A, or a moment. h serves all else."""
    return call.A.requires_grad or sinks.moment is not None


def saved_tensors(call: Call, sinks: Sinks, out: Output) -> tuple[Tensor | None, ...]:
    """What the backward pass reads, in the order in which `saved_of` takes it."""
    x = call.x if reads_x(call, sinks) else None
    weights = call.token_weights if sinks.moment is not None else None
    a = out.a if call.x.requires_grad else None
    b = out.b if call.x.requires_grad or call.A.requires_grad else None
    kept = weights, out.sqnorm, out.gram, a, b
    return x, call.weight, call.A, call.B, out.h, out.mask, call.seed, *kept


def saved_of(tensors: Sequence[Any], scaling: float, dropout: float) -> Saved:
    """What `saved_tensors` kept, as one record."""
    x, weight, A, B, h, mask, seed, *of_statistics = tensors
    return Saved(x, weight, A, B, h, mask, seed, scaling, dropout, *of_statistics)


def gradients(
    backward: Backward, saved: Saved, dy: Tensor | None, needs: Needs, sinks: Sequence[bool]
) -> tuple[Grads, tuple[Tensor | None, ...]]:
    """The gradients of x, A and B that `needs` asks for, and those of the sinks that want one.

    The op chooses its own dtypes, also where autocast is on around `backward`.
    """
    device = "cpu" if saved.h.is_cpu else saved.h.device.type
    if autocasting(device):
        with torch.autocast(device, enabled=False):
            return gradients(backward, saved, dy, needs, sinks)
    if sinks:
        needs = needs._replace(moment=sinks[_MOMENT])
    grads = Grads(None, None, None) if dy is None else backward(saved, dy, needs)
    wanted = zip(STATISTICS, sinks, strict=True) if sinks else ()
    return grads, tuple(of(saved, dy, grads).detach() if wants else None for of, wants in wanted)


class LoRAFunction(torch.autograd.Function):
    """The op with its gradients. W and b are frozen; sqnorm is not differentiable.

    apply(backend, call, sinks, x, y0, A, B, *sinks) -> y, or (y, sqnorm or None, h or None)

    autograd must see the leaves one by one; a call without sinks leaves them out, for its host's
    time. h is a result where x is not kept: only so has it a graph, for gradients of gradients.
    """

    @staticmethod
    def forward(ctx: Any, backend: Backend, call: Call, sinks: Sinks, *_: Tensor | None) -> Any:
        # Not a separate setup_context: torch would inspect the signature in every call, for 40 µs.
        out = backend.forward(call)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved_tensors(call, sinks, out))
        ctx.backend, ctx.scaling, ctx.dropout = backend, call.scaling, call.dropout
        if call.A.requires_grad and not call.sqnorm:
            return out.y
        if call.sqnorm:
            ctx.mark_non_differentiable(out.sqnorm)
        return out.y, out.sqnorm, None if reads_x(call, sinks) else out.h

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, _: None = None, dh: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        _, _, _, x, y0, A, B, *sinks = ctx.needs_input_grad
        saved = saved_of(ctx.saved_tensors, ctx.scaling, ctx.dropout)
        # Grad mode is on here with create_graph=True: somebody will differentiate the gradients.
        backward = backward_with_graph if torch.is_grad_enabled() else ctx.backend.backward
        grads, of_sinks = gradients(backward, saved, dy, Needs(x, A, B), sinks)
        dx = grads.x
        if dh is not None and x:  # a gradient was differentiated
            through_h = up(saved, dh).to(dh.dtype)
            dx = through_h if dx is None else dx + through_h
        return None, None, None, dx, dy if y0 else None, grads.A, grads.B, *of_sinks


# Below what torch.autograd.Function does in Python, in every call, for transforms of torch.func.
_apply: Any = super(torch.autograd.Function, LoRAFunction).apply


def transformed() -> bool:
    """Whether more is asked of the op than `LoRAFunction` knows: by a transform of torch.func,
    forward-mode differentiation or torch.jit.trace.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def run_transformed(
    call: Call, sinks: Sinks, backend: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """`run` as plain operations of PyTorch, which all of those know."""
    if backend not in (None, REFERENCE.name):
        raise ValueError(
            f"backend={backend!r}: under torch.func, forward-mode differentiation or "
            "torch.jit.trace only 'reference' serves. Leave the backend out"
        )
    if sinks is not NO_SINKS:
        raise RuntimeError(
            "statistics cannot be collected under torch.func, forward-mode differentiation or "
            "torch.jit.trace: detach the collector first"
        )
    if call.seed is not None and torch._C._is_tracing():
        raise RuntimeError("torch.jit.trace does not know dropout's masks: trace in eval mode")
    try:
        out = REFERENCE.forward(call)
    except RuntimeError as error:
        if call.seed is None:
            raise
        raise RuntimeError(
            "dropout draws one mask for all samples of a vmap: use randomness='same', or eval mode"
        ) from error
    return out.y, out.sqnorm


def run(backend: Backend, call: Call, sinks: Sinks, grad: bool) -> tuple[Tensor, Tensor | None]:
    """y and sqnorm, None unless asked for; `grad`: with a graph for the backward pass."""
    if not grad:
        out = backend.forward(call)
        return out.y, out.sqnorm
    leaves = () if sinks is NO_SINKS else sinks
    done = _apply(backend, call, sinks, call.x, call.y0, call.A, call.B, *leaves)
    return done[:2] if type(done) is tuple else (done, None)
