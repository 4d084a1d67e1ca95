"""Checking a PEFT export: the native adapter's logits, and its deltas by each engine's rule."""

import copy
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loradrop.adapters import Adapters, adapters_of
from loradrop.bank import bank_of
from loradrop.formats.engines import ENGINES, EngineVerdict, refusal, required, scale
from loradrop.formats.merged import holds_weights
from loradrop.formats.peft_conversion import why_lost
from loradrop.formats.peft_file import CONFIG, PeftFile, configuration_of, read
from loradrop.injection import injected, require_loaded
from loradrop.layers import as_weight
from loradrop.quantised import keep_unpacked
from loradrop.statistics.batches import call, evaluating, require_several
from loradrop.surgery import remove
from loradrop.wrapped import bare, modules_of, of_inner, tensors_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `verify` found.

    logits           max|logits_export − logits_native| over all batches
    relative         the same over the standard deviation of the native logits
    tolerance        of `relative`
    loader           what computed the export's logits: "peft", "replay" where it is not installed
                     or would not load the file, or "merged"
    rows             one verdict per engine; none for a merged model
    delta_tolerance  of every row's `error`
    differing        the targets of a merged model whose weight is not W + s·B·A, rounded
    required         the engines that have to take the file
    named            whether `verify` was given them: then no other engine counts
    """

    logits: float
    relative: float
    tolerance: float
    loader: str
    rows: tuple[EngineVerdict, ...] = ()
    delta_tolerance: float = 0.0
    differing: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    named: bool = False

    @property
    def ok(self) -> bool:
        """Equal logits and weights, the required engines take the file, and none computes other
        deltas from it; where engines were named, none of these.

        An engine that refuses a file says so when it loads it; one that scales it wrongly does not.
        """
        taken = all(row.ok for row in self.rows if row.engine in self.required)
        wrong = not self.named and any(map(self._wrong, self.rows))
        return self.relative <= self.tolerance and taken and not wrong and not self.differing

    def _wrong(self, row: EngineVerdict) -> bool:
        return row.error is not None and not row.error <= self.delta_tolerance  # also for NaN

    def table(self) -> str:
        """The rows as text, and the comparison of the logits below them."""
        lines = [f"{'engine':<10} {'verdict':<8} {'delta error':<12} reason"] if self.rows else []
        for row in self.rows:
            verdict = "ok" if row.ok else "WRONG" if self._wrong(row) else "refused"
            error = "-" if row.error is None else f"{row.error:.1e}"
            lines.append(f"{row.engine:<10} {verdict:<8} {error:<12} {row.reason}".rstrip())
        verdict = "ok" if self.relative <= self.tolerance else "DIFFER"
        lines.append(
            f"logits ({self.loader}): {verdict}, at most {self.logits:.1e} apart, "
            f"{self.relative:.1e} of their standard deviation"
        )
        if self.differing:
            more = f" and {len(self.differing) - 3} more" * (len(self.differing) > 3)
            some = ", ".join(self.differing[:3])
            lines.append(f"weights: DIFFER from W + s·B·A in {some}{more}")
        return "\n".join(lines)


@of_inner
@torch.no_grad()
def verify(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    engines: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> Report:
    """Load the PEFT file in `path` beside the native adapter of `model`, and compare them; a merged
    model in `path` likewise.

    batches    as for `probe`: the logits of both are compared on them
    engines    those that have to take the file for `Report.ok`, and the only ones that count for
               it; None is PEFT, and that no engine scales it wrongly. All are reported
    tolerance  of the logits over their standard deviation; None is 1e-4 in float32 and
               16 eps of a narrower dtype of the model or the file

    The file is loaded into a copy of the base model, by PEFT where it is installed and finds every
    adapter, and by its rule where not, or where the weights are offloaded without a device map. The
    model is as before afterwards. Raises ValueError for no batches and for a file that is damaged
    or of another model, or saves whole what is offloaded, FileNotFoundError for a missing one.
    """
    bank_of(model)
    with injected(model) as own:
        if (Path(path) / CONFIG).exists() and holds_weights(Path(path)):
            raise ValueError(
                f"{path} holds a model and an adapter, which would be loaded on top: export one of "
                "them into another folder"
            )
        if (Path(path) / "config.json").exists() and not (Path(path) / CONFIG).exists():
            if engines is not None or tolerance is not None:
                raise ValueError(f"{path} is a merged model: engines and tolerance are of PEFT's")
            return _verify_merged(own, path, batches)
        return _verify(own, path, batches, engines, tolerance)


def _verify(
    model: nn.Module, path: str | os.PathLike[str], batches: Iterable[Any],
    engines: Sequence[str] | None, tolerance: float | None,
) -> Report:  # fmt: skip
    """`verify` of an injected model."""
    adapters = adapters_of(model)
    file = read(path)._replace(base=configuration_of(model), model=model)
    must = required(file, engines)
    eps = [torch.finfo(t.dtype).eps for t in file.tensors.values() if t.is_floating_point()]
    delta_tolerance = max(1e-5, 4 * max(eps, default=0.0))
    rows = tuple(_compare(engine, adapters, file, delta_tolerance) for engine in ENGINES)
    loaded, loader = _loaded(model, path, file)
    logits, relative = _difference(model, loaded, batches)
    if tolerance is None:
        eps += [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
        tolerance = 1e-4 if max(eps) < 1e-6 else min(16 * max(eps), 0.25)
    return Report(
        logits=logits, relative=relative, tolerance=tolerance, loader=loader,
        rows=rows, delta_tolerance=delta_tolerance, required=must, named=bool(engines),
    )  # fmt: skip


def _compare(engine: str, adapters: Adapters, file: PeftFile, tolerance: float) -> EngineVerdict:
    """The engine's verdict on the file, and the error of the file's deltas under its scale rule."""
    verdict, modules, worst, where = refusal(engine, file), file.modules, 0.0, ""
    targets = {target.name: i for i, target in enumerate(adapters.plan.targets)}
    for name in dict.fromkeys((*targets, *modules)):
        delta = adapters.delta(targets[name]) if name in targets else None
        native = torch.zeros(()) if delta is None else delta.cpu()
        found = torch.zeros(())
        if name in modules:
            A, B = (factor.to(native.dtype) for factor in modules[name])
            found = scale(engine, file.config, name, B.shape[1]) * (B @ A)
        if native.ndim and found.ndim and native.shape != found.shape:
            raise ValueError(
                f"{name} is {tuple(found.shape)} in the file and {tuple(native.shape)} in the "
                "model: this is the export of another model"
            )
        size, gap = float(native.abs().max()), float((found - native).abs().max())
        error = gap / size if size else math.inf if gap else 0.0
        if not error <= worst:  # NaN counts as worse
            worst, where = error, name
    if worst <= tolerance:
        return EngineVerdict(engine, verdict.ok, verdict.reason, worst)
    wrong = f"its delta of {where} is {worst:.2g} of the native one away"
    return EngineVerdict(engine, False, "; ".join(filter(None, (wrong, verdict.reason))), worst)


def _loaded(
    model: nn.Module, path: str | os.PathLike[str], file: PeftFile
) -> tuple[nn.Module, str]:
    """A copy of the base model with the file in it, and what loaded it."""
    with bare(model):
        base = copy.deepcopy(model)
    remove(base)
    _read_alike(base, model)
    for name in file.modules:
        try:
            base.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"the file adapts {name}, which {type(model).__name__} does not have: this is the "
                "export of another model"
            ) from error
    try:
        from peft import PeftModel
    except ImportError:
        return _replay(base, file), "replay"
    layers = map(base.get_submodule, file.modules)
    offloaded = any(weight.is_meta for layer in layers for weight in layer.parameters())
    if offloaded and not getattr(base, "hf_device_map", None):  # PEFT would fill adapters on meta
        return _replay(base, file), "replay"
    if why_lost(file) is not None:  # an engine that does not load by PEFT may take it
        return _replay(base, file), "replay"
    try:
        with torch.random.fork_rng():  # PEFT draws initial values before it reads the file's
            return PeftModel.from_pretrained(base, os.fspath(path)), "peft"
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"PEFT cannot load {path} into {type(model).__name__}: {error}") from error


def _read_alike(other: nn.Module, model: nn.Module) -> None:
    """Let the targets of the other model read quantised weights as the adapted layers do, which are
    not packed for the CPU's own instructions: those round otherwise.
    """
    modules = modules_of(other)
    for target in bank_of(model).targets:
        keep_unpacked(modules.get(target.name))


def _replay(base: nn.Module, file: PeftFile) -> nn.Module:
    """PEFT's rule without PEFT: y + s·(x Aᵀ)Bᵀ by hooks, and what is saved whole in its place."""
    for name, (A, B) in file.modules.items():
        base.get_submodule(name).register_forward_hook(
            _Delta(A, B, scale("peft", file.config, name, A.shape[0]))
        )
    tensors = tensors_of(base, keep_vars=True)
    for name, tensor in file.others.items():
        if name in tensors:  # PEFT ignores one that is not
            require_loaded({name: tensors[name]})
            tensors[name].copy_(tensor)
    return base


@dataclass(frozen=True)
class _Delta:
    """A forward hook that adds s·(x Aᵀ)Bᵀ in float32: x (..., K), A (r, K), B (N, r)."""

    A: Tensor
    B: Tensor
    s: float

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = args[0].float()
        return torch.add(y, x @ self.A.to(x).T @ self.B.to(x).T, alpha=self.s).to(y.dtype)


def _difference(model: nn.Module, other: nn.Module, batches: Iterable[Any]) -> tuple[float, float]:
    """The largest difference of their logits in eval mode, and it over the model's deviation."""
    require_several(batches)
    pairs, first = [], None
    other.eval()
    with evaluating(model):
        for batch in batches:
            first = batch if first is None else first
            pairs.append((_logits(call(model, batch)), _logits(call(other, batch))))
    if not pairs:
        raise ValueError("batches is empty: give at least one batch to compare on")
    assert first is not None
    _tell_of_nothing(model, first, pairs[0][0])
    native, others = (torch.cat(side) for side in zip(*pairs, strict=True))
    difference = float((native - others).abs().max())
    return difference, difference / (float(native.std(correction=0)) or 1.0)


def _tell_of_nothing(model: nn.Module, batch: Any, adapted: Tensor) -> None:
    """One line where the adapter changes nothing on the batch, so that any base would agree."""
    bank = bank_of(model)
    if not bank.enabled:  # merged for now
        return
    bank.enabled = False
    try:
        with evaluating(model):
            base = _logits(call(model, batch))
    finally:
        bank.enabled = True
    if torch.equal(base, adapted):
        _log.warning(
            "the adapter changes no logit of the first batch, so that equal ones say little: is it "
            "trained, and does the tokenizer know the text?"
        )


def _logits(output: Any) -> Tensor:
    """The logits where the output names any, else all its tensors but the loss, flat in float64."""
    if isinstance(output, Mapping):
        named = {k: v for k, v in output.items() if k != "loss"}
        output = [named["logits"]] if "logits" in named else list(named.values())
    values = [output] if isinstance(output, Tensor) else output
    return torch.cat([v.double().flatten().cpu() for v in values if isinstance(v, Tensor)])


def _verify_merged(model: Any, path: str | os.PathLike[str], batches: Iterable[Any]) -> Report:
    """Load the merged model of transformers in `path`, and compare its logits with `model`'s, and
    its targets' weights with W + s·B·A: narrow dtypes round logits by more than many an adapter
    moves them.

    `model` is of transformers, with the native adapter, and as before afterwards. Raises ValueError
    for no batches, OSError where `path` holds no model.
    """
    merged = type(model).from_pretrained(path, dtype="auto")
    _read_alike(merged, model)
    logits, relative = _difference(model, merged, batches)
    tolerance = max(1e-4, 16 * torch.finfo(merged.dtype).eps)
    return Report(
        logits=logits, relative=relative, tolerance=tolerance, loader="merged",
        differing=tuple(_differing(model, merged)),
    )  # fmt: skip


def _differing(model: nn.Module, merged: nn.Module) -> Iterator[str]:
    """The targets with plain weights in both models whose merged one is not W + s·B·A."""
    bank, here, there = bank_of(model), modules_of(model), modules_of(merged)
    for i, target in enumerate(bank.targets):
        name = target.name
        old, new = (getattr(of.get(name), "weight", None) for of in (here, there))
        if not isinstance(old, Tensor) or not isinstance(new, Tensor):
            continue
        plain = all(type(w) is nn.Parameter and w.is_floating_point() for w in (old, new))
        if not plain or old.is_meta or old.shape != new.shape or old.dtype.itemsize == 1:
            continue
        base, delta = old.double().cpu(), bank.delta(i)
        change = torch.zeros_like(base)
        if delta is not None and bank.enabled:  # else the weight holds it, merged for now
            change = as_weight(here[name], delta).double().cpu()
        wanted, info, single = base + change, torch.finfo(new.dtype), torch.finfo(torch.float32)
        bound = info.eps * (base.abs() + wanted.abs()) + info.tiny  # the base was rounded, too
        bound += 16 * single.eps * change.abs().max()
        if not ((new.double().cpu() - wanted).abs() <= bound).all():  # also for NaN
            yield name
