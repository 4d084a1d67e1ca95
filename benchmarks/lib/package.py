"""What the benchmarks take from inside loradrop, all of it, so that a change there is one here.

Importing this does not import torch.
"""

from typing import TYPE_CHECKING

from loradrop.op.points import SERVING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor

    from loradrop.kernels.tiles import OuterTiles
    from loradrop.measuring.cases import Case
    from loradrop.op.call import Problem

BACKENDS = SERVING  # those a GPU may be served by
_REFUSES = " cannot serve this call: "


def refusal(backend: str, case: "Case") -> str | None:
    """Why a backend cannot serve the case, or None: asked by a call without gradients."""
    import torch

    from loradrop.measuring.cases import ours
    from loradrop.op.dispatch import RefusedError

    try:
        with torch.no_grad():
            ours(case, backend=backend)()
    except RefusedError as refused:
        return str(refused).split(_REFUSES, 1)[1].split(". Pass ")[0]
    return None


def chosen(case: "Case", grad: bool) -> str:
    """The backend that the dispatcher picks for the call that the case makes."""
    from loradrop.op import dispatch
    from loradrop.op.call import Call, problem_of

    operands = (case.x, case.weight, case.bias, None, case.A, case.B)
    return dispatch.choose(problem_of(Call(*operands, case.scaling, case.dropout), grad))


def leave_out(names: "Iterable[str]") -> None:
    """From here on the dispatcher of this process does without these backends."""
    from dataclasses import replace

    from loradrop.op import dispatch

    for name in names:
        backend = dispatch.BACKENDS[name]
        dispatch.BACKENDS[name] = replace(backend, why_not=lambda _: "it is left out, as asked")
    dispatch.forget()


def in_training(
    layers: "Iterable[tuple[int, int]]", r: int, tokens: int, dtype: "torch.dtype", device: str
) -> "dict[str, Problem]":
    """KxN -> what the dispatcher is asked about the layer in a training step here."""
    import torch

    from loradrop.kernels.tiles import machine_of
    from loradrop.op.call import problem_on

    machine = machine_of(torch.device(device))
    return {f"{k}x{n}": problem_on(machine, device, dtype, tokens, k, n, r) for k, n in layers}


def choice(layer: "Problem") -> str:
    """Which backend serves, and by which measurement, if any: of `loradrop tune`, or shipped."""
    from loradrop.op import dispatch

    return dispatch.explain(layer)


def measured(layer: "Problem") -> bool:
    """Whether either has measured such a layer on this device; its file is read anew."""
    from loradrop.op import costs, dispatch

    dispatch.forget()
    return costs.choose_measured(layer) is not None


def gemm_triton(
    p: "Tensor", q: "Tensor", h: "Tensor | None" = None, l: "Tensor | None" = None
) -> "Tensor":
    """p·q + h·l by the Triton product in the tiles of the layer; p·q alone without h and l."""
    from loradrop.kernels import tiles
    from loradrop.kernels.gemm_ext import gemm_ext

    machine = tiles.machine_of(p.device)
    cut = tiles.gemm_ext(machine, p.dtype, p.shape[0], q.shape[1])
    return gemm_ext(p, q, None, h, l, 1.0, cut, machine.sms * cut.per_sm)


def gemm_cuda(p: "Tensor", q: "Tensor") -> "Tensor":
    """p·q by the CUDA kernel."""
    from loradrop.op import cuda

    return cuda.gemm_ext(p, q, None, None, None, 1.0)


def shrink(p: "Tensor", a: "Tensor") -> "Tensor":
    """p·aᵀ, thin, by the Triton kernel."""
    from loradrop.kernels import shrink, tiles

    cut = tiles.shrink(tiles.machine_of(p.device), p.dtype, *p.shape, a.shape[0])
    return shrink.shrink(p, a, 1.0, cut).h


def once(m: int, n: int, r: int) -> "OuterTiles | None":
    """How one read of a bfloat16 dy (m, n) is cut into tiles here; None where two move as much."""
    import torch

    from loradrop.kernels import tiles

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return tiles.backward(tiles.machine_of(device), torch.bfloat16, m, n, r)


def t_and_db(dy: "Tensor", B: "Tensor", h: "Tensor") -> "tuple[Tensor, Tensor]":
    """dy·B and dyᵀ·h from one read of dy, by the Triton kernel, where `once` has tiles."""
    from loradrop.kernels.backward import t_and_db

    cut = once(*dy.shape, B.shape[1])
    assert cut is not None
    return t_and_db(dy, B, h, 1.0, 1.0, dy.dtype, cut)


def outer(p: "Tensor", q: "Tensor") -> "Tensor":
    """pᵀ·q, thin, by the Triton kernel."""
    from loradrop.kernels import outer, tiles

    cut = tiles.outer(tiles.machine_of(p.device), p.dtype, *p.shape, q.shape[1])
    return outer.outer(p, q, 1.0, p.dtype, cut).out
