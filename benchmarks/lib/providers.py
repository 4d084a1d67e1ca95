"""What is compared: the rivals, and the op with the backend that a user or the dispatcher picks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from lib import package
from lib.markdown import SHORT
from lib.results import FROZEN, Cell
from lib.rivals import addmm, frozen, peft, peft_compiled, peft_hook, peft_hook_b
from loradrop.measuring.cases import MASKED, Case, Output, ours
from loradrop.op.points import BACKWARD

Make = Callable[[Case], Callable[[], Output]]
# M, K, N and r of the grid `compiled`, where alone PEFT is compiled, for half a minute a cell.
COMPILED = (4096, 4096, 14336, 16)


@dataclass(frozen=True)
class Provider:
    """One way to compute the layer.

    norm     it gives the squared norm
    wide     float32 adapters beside an x of half precision
    masks    its dropout is the reference's, bit for bit
    bare     the frozen product alone
    formula  of a kernel by itself: what it computes of a case, in any dtype
    silent   the same without the norm, whose y must have the same bits
    backend  whose kernels it runs; it is asked whether it can serve
    rule     cell -> why the provider is left out, or None
    """

    name: str
    make: Make
    norm: bool = False
    wide: bool = False
    masks: bool = False
    bare: bool = False
    silent: Make | None = None
    formula: Callable[[Case], Tensor] | None = None
    backend: str | None = None
    rule: Callable[[Cell], str | None] = lambda _: None

    @property
    def key(self) -> str:
        """Its name, and whether it gives the norm."""
        return f"{self.name}+norm" if self.norm else self.name

    def refuses(self, cell: Cell, case: Case) -> str | None:
        """Why it cannot serve or is left out, or None."""
        if self.name.startswith("peft") and find_spec("peft") is None:
            return "PEFT is not installed"
        reason = self.rule(cell)
        if reason is None and self.backend is not None:
            reason = package.refusal(self.backend, case)
        return reason


def named(backend: str, norm: bool = False) -> Provider:
    """The op with that backend."""
    make = partial(ours, backend=backend)
    return Provider(
        f"loradrop_{backend}",
        partial(make, norm=True) if norm else make,
        norm=norm,
        masks=True,
        silent=make if norm else None,
        backend=backend,
        rule=_no_mask_by_calls if backend == "eager" else lambda _: None,
    )


def _grams(case: Case) -> Callable[[], Output]:
    """The op with all that the spectrum needs: the squared norm and both r × r matrices."""
    r, kind = case.A.shape[0], {"dtype": torch.float64, "device": case.x.device}
    shapes = {"sqnorm_sink": (), "gram_in_sink": (r, r), "core_sink": (r, r)}
    sinks = {name: torch.zeros(shape, **kind) for name, shape in shapes.items()}
    return ours(case, **{name: sink.requires_grad_() for name, sink in sinks.items()})


def _has_backward(cell: Cell) -> str | None:
    return None if cell.direction == BACKWARD else "statistics come with the backward pass"


def _no_mask_by_calls(cell: Cell) -> str | None:
    few = cell.dropout == 0.0 or cell.M * cell.K < MASKED
    return None if few else "its mask takes thousands of launches, too long to be timed"


def _compiles(cell: Cell) -> str | None:
    if (cell.M, cell.K, cell.N, cell.r) == COMPILED:
        return None
    return "compiling takes long: it is compared at {} tokens, {}→{}, r = {} only".format(*COMPILED)


_NORM = Provider("loradrop", partial(ours, norm=True), norm=True, masks=True, silent=ours)


def providers(dtype: str, device: str) -> list[Provider]:
    """Those of `bench_lora_linear`; the frozen product first."""
    base = [Provider(FROZEN, frozen, bare=True), Provider(f"peft_{SHORT[dtype]}", peft)]
    own = [Provider("loradrop", ours, masks=True), _NORM]
    if device == "cpu":
        hook = Provider("peft_hook", peft_hook, norm=True)
        grams = Provider("loradrop_grams", _grams, masks=True, rule=_has_backward)
        return [*base, hook, Provider("addmm", addmm), *own, grams]
    return [
        *base,
        *([Provider("peft_fp32", peft, wide=True)] if dtype != "float32" else []),
        Provider("addmm", addmm),
        *own,
        *map(named, package.BACKENDS),
        Provider("peft_compiled", peft_compiled, rule=_compiles),
    ]


def probing(dtype: str, device: str) -> list[Provider]:
    """Those of `bench_probe`: the norm on and off, and hooks as people write them."""
    backends = package.BACKENDS if device == "cuda" else ()
    return [
        Provider(FROZEN, frozen, bare=True),
        Provider(f"peft_{SHORT[dtype]}", peft),
        Provider("peft_hook", peft_hook, norm=True),
        Provider("peft_hook_b", peft_hook_b, norm=True),
        Provider("loradrop", ours, masks=True),
        _NORM,
        *(named(backend, norm) for backend in backends for norm in (False, True)),
    ]
