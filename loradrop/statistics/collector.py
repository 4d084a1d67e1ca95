"""Collecting what methods ask for per target, while the model runs or trains.

    sqnorm    Σ_t w_t ‖s·B·h_t‖²     moment     Σ_t w_t x_tk², (K,)
    gram_in   Σ_t w_t h_t h_tᵀ       core       Σ_t u_t h_tᵀ, u = Bᵀ ∂ℓ/∂y, (r, r)

Online, every target has a leaf for each: a float64 tensor outside the model whose gradient the op's
backward supplies as the statistic. Autograd then counts each backward pass once, under activation
checkpointing, accumulation and compilation alike, and `close_row` reads the leaves without waiting
for the device.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from loradrop.bank import AdapterBank
from loradrop.machine import is_distributed, is_first_rank
from loradrop.ranks import reduced
from loradrop.scores import Scores, Target
from loradrop.statistics.gram_sums import GramSums
from loradrop.statistics.losses import samples_of
from loradrop.statistics.masks import MASKED, Masking, TokenMasks
from loradrop.statistics.watched import SHAPES, Watched, start

GRAMS = ("gram_in", "core")
_log = logging.getLogger(__name__)


class Collector:
    """Statistics of one run; `bank.collector` while it is attached. One that is attached before
    another has ended, as for a probe in the middle of training, collects alone meanwhile.

    statistics  names of what is collected: "sqnorm", "moment", "gram_in", "core"
    online      True: of the backward passes; False: sqnorm alone, of the forward passes
    source      what the scores say of themselves: "online" or "offline"
    masking     which tokens count
    """

    def __init__(
        self,
        model: nn.Module,
        bank: AdapterBank,
        *,
        online: bool,
        statistics: Sequence[str] = ("sqnorm",),
        source: str | None = None,
        masking: Masking = MASKED,
    ) -> None:
        for name in statistics:
            if name not in SHAPES:
                raise ValueError(f"statistics has {name!r}: choose among {', '.join(SHAPES)}")
        self.bank, self.online, self._statistics = bank, online, tuple(statistics)
        self.source = source or ("online" if online else "offline")
        self.masks = TokenMasks(model, bank.targets, masking)
        self.rows: list[Tensor] = []
        self.inputs: Mapping[str, Any] = {}  # of the last forward pass, by name
        self.called = [False] * len(bank.targets)
        self._tokens = torch.zeros((), dtype=torch.int64)
        self._open = torch.zeros((), dtype=torch.int64)  # tokens of the open row
        self.loss_scale = 1.0  # of the losses whose gradients come now, as a loss scaler sets it
        self._means = 1.0  # what a row's loss is in means of its losses: their number for a sum
        self._samples = torch.zeros((), dtype=torch.float64)  # of the open row
        self._keeps = self.source == "offline" and "core" in statistics
        self._sums = GramSums(bank, self._keeps) if set(GRAMS) & set(statistics) else None
        self._inside = self._recomputed = self._traced = False
        self._pending = 0  # forward passes whose backward may still come
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        self._before: Collector | None = bank.collector  # it goes on afterwards
        used = list(zip(bank.targets, map(bank.factors, range(len(bank.targets))), strict=True))
        self._watched = [
            Watched(self, mask, {name: start(name, *of, online) for name in statistics})
            for of, mask in zip(used, self.masks.of_targets, strict=True)
        ]
        for link, watched in zip(bank.links, self._watched, strict=True):
            link.observer = watched
        bank.collector = self

    def detach(self) -> None:
        """Stop collecting; the rows stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.masks.detach()
        if self.bank.collector is not self:
            return
        before = self._before if self._before is not None and self._before._handles else None
        self.bank.collector, self._before = before, None
        for i, link in enumerate(self.bank.links):
            link.observer = None if before is None else before._watched[i]

    def set_samples(self, count: int) -> None:
        """The gradients of this step are of the sum of `count` losses, not of their mean."""
        self._samples = torch.tensor(float(count), dtype=torch.float64)
        self._means = float(max(count, 1))

    def close_row(self) -> dict[str, list[Tensor | None]]:
        """Ends a batch (offline) or an optimiser step (online).

        Returns name -> what it collected for each target, moments summed over ranks; None where a
        target has no adapter or was not called, which counts as zero.
        """
        closed = {
            name: [watched.found(name) for watched in self._watched] for name in self._statistics
        }
        for values in closed.values():
            self.called = [c or v is not None for c, v in zip(self.called, values, strict=True)]
        self._tokens = self._tokens.to(self._open.device) + self._open
        self._open = torch.zeros_like(self._open)
        if "sqnorm" in closed:
            self.rows.append(_row(closed["sqnorm"]))
        if self._sums is not None:
            self._sums.add(closed, self._samples, self.loss_scale * self._means)
            self._samples = torch.zeros_like(self._samples)
        if "moment" in closed and is_distributed():
            closed["moment"] = self._summed(closed["moment"])
        self._pending, self.inputs = 0, {}
        self.masks.forget()
        for watched in self._watched:
            watched.begin()
        return closed

    def _summed(self, moments: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The moments summed over ranks; one that was called on another rank alone is zero here."""
        leaves = [watched.values["moment"] for watched in self._watched]
        here = [
            torch.zeros_like(leaf) if leaf is not None and value is None else value
            for leaf, value in zip(leaves, moments, strict=True)
        ]
        _sum_moments([value for value in here if value is not None])
        return here

    def forget(self) -> None:
        """Begin anew: what was collected so far does not count."""
        self.rows, self._tokens = [], torch.zeros_like(self._tokens)
        if self._sums is not None:
            self._sums = GramSums(self.bank, self._keeps)

    def silent(self) -> list[str]:
        """The targets with an adapter whose forward was called in no row so far, on no rank."""
        called = torch.tensor(self.called)
        if is_distributed():
            called = reduced(called.int(), distributed.ReduceOp.MAX)
        found = zip(self.bank.targets, self.bank.slots, called.tolist(), strict=True)
        return [target.name for target, slot, was in found if slot is not None and not was]

    def require_called(self, strict: bool = True) -> None:
        """Raises RuntimeError naming the targets that are `silent`; not strict, it warns."""
        if not (silent := self.silent()):
            return
        if strict:
            raise RuntimeError(
                f"the forward of {', '.join(silent)} was never called: its module reads the weight "
                "directly (as nn.MultiheadAttention does with out_proj, and fused inference paths "
                "do), no input so far reached it, or no gradient came back from it, as where the "
                "loss does not depend on it. Name it in exclude_modules, pass strict=False (the "
                "command: lora.strict=false) if it is reached later, or give rows that reach it"
            )
        _log.warning("the forward of %s was never called so far", ", ".join(silent))

    def state_dict(self) -> dict[str, Tensor]:
        """The rows and the token count so far, summed over ranks, for a checkpoint."""
        rows, tokens = self._summed_rows()
        facts = {"tokens": torch.tensor(tokens), "called": torch.tensor(self.called)}
        return {"rows": rows, **facts, **({} if self._sums is None else self._sums.state_dict())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave; the sums count on the first rank alone."""
        first = is_first_rank()
        self.rows = [row if first else torch.zeros_like(row) for row in state["rows"]]
        self._tokens = state["tokens"].clone() if first else torch.zeros_like(state["tokens"])
        self.called = state["called"].tolist()
        if self._sums is not None:
            self._sums.load_state_dict(state, first)

    def scores(self) -> Scores:
        """The rows so far, summed over the ranks of `torch.distributed` where it runs."""
        rows, tokens = self._summed_rows()
        grams = None if self._sums is None else self._sums.grams()
        return Scores(self.bank.targets, rows, tokens, self.source, grams)

    def _summed_rows(self) -> tuple[Tensor, int]:
        """(rows, targets) and the tokens, over all ranks."""
        rows = torch.zeros(0, len(self.bank.targets), dtype=torch.float64)
        if self.rows:
            rows = torch.stack([row.cpu() for row in self.rows])
        tokens = int(self._tokens)
        if is_distributed():
            rows, tokens = _sum_over_ranks(rows, tokens)
        return rows, tokens

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if (self.online and not torch.is_grad_enabled()) or self.bank.collector is not self:
            return
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel runs the layers of its replicas in threads, which would mix their "
                "statistics: start one process per GPU with torchrun instead"
            )
        given = self.masks.enter(args, kwargs)
        self._traced = torch.compiler.is_compiling()
        if not self._traced:
            self._inside, self._pending = True, 1 if self._recomputed else self._pending + 1
            self._recomputed = False
        self._count(given)
        if self._sums is not None:
            self.inputs = given
            count = samples_of(model, given)
            on = count.device if isinstance(count, Tensor) else self._samples.device
            self._samples = self._samples.to(on) + count

    def _leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._inside = False

    def _count(self, given: Mapping[str, Any]) -> None:
        if (mask := self.masks.current) is not None:
            count = (mask > 0).sum()
            self._open = self._open.to(count.device) + count
            return
        first = next((v for v in given.values() if isinstance(v, Tensor)), None)
        if first is not None:  # ids (B, S), embeddings (B, S, K); else, as of images, samples
            rows = 2 if first.ndim == 3 else 1
            shape = first.shape[:rows] if first.is_floating_point() else first.shape
            self._open = self._open + shape.numel()

    def layer_runs(self, target: Target) -> None:
        """Notes that the layer of `target` runs; where it is in no pass that began at the model, no
        mask counts. Raises RuntimeError where it may be of another forward pass than the mask that
        is at hand, as it is recomputed.
        """
        masks = self.masks
        of_model = masks.mask is None or self._inside or self._traced  # or an eager part of a graph
        masks.known = of_model or torch._C._current_graph_task_id() != -1  # or recomputed
        if not masks.known:
            masks.say_unknown(target)
            self._pending += self.online
            return
        if masks.current is None or self._inside:
            return
        if self._pending > 1:
            raise RuntimeError(
                "activations are recomputed after several forward passes, so loradrop cannot "
                f"tell whose {self.masks.mask!r} belongs to {target.name}: pass mask=None, or run "
                "backward after each"
            )
        self._recomputed = True


def _row(values: Sequence[Tensor | None]) -> Tensor:
    """The squared norms of all targets, zero where there is none, on the device of the first."""
    device = next((v.device for v in values if v is not None), torch.device("cpu"))
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([zero if v is None else v.detach().to(device) for v in values])


def _sum_moments(values: Sequence[Tensor]) -> None:
    """Sums each moment over ranks, in place and in one call for each device."""
    for device in {value.device for value in values}:
        here = [value for value in values if value.device == device]
        flat = torch.cat(here)
        distributed.all_reduce(flat)
        for value, part in zip(here, torch.split(flat, [len(v) for v in here]), strict=True):
            value.copy_(part)


def _sum_over_ranks(rows: Tensor, tokens: int) -> tuple[Tensor, int]:
    longest = reduced(torch.tensor(len(rows)), distributed.ReduceOp.MAX)
    padded = torch.zeros(int(longest), rows.shape[1], dtype=torch.float64)
    padded[: len(rows)] = rows
    total = distributed.ReduceOp.SUM
    return reduced(padded, total), int(reduced(torch.tensor(tokens), total))
