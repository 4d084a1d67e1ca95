"""The cut: fewer directions for each adapter, the best that its last probe knows of."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from loradrop.bank import Pair, bank_of
from loradrop.gram_sums import grams_of
from loradrop.injection import injection_of, plan_of, require_adapted
from loradrop.pairs import LoRABank
from loradrop.scores import Assignment, Grams
from loradrop.selection import check_choice
from loradrop.spectra import METRICS, Cores, cores, members_of, spectrum_of

_log = logging.getLogger(__name__)


@torch.no_grad()
def truncate(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    metric: str = "loss",
) -> None:
    """Cut every adapter to its rank: the best (A', B') of that rank by the last probe.

    ranks    name -> rank, as from `allocate`; targets that it leaves out keep theirs. At 0 a target
             has no adapter any more
    metric   what "best" means: see `spectra`; "weight" needs no probe

    s, the frozen weights and adapters that keep their rank stay as they are, and A' and B' of each
    direction have the same length. Parameters change, so an optimiser made before this does not fit
    any more. Raises ValueError for ranks that do not fit, targets that share an adapter and
    get different ones, a bank without pairs, and statistics that are not there.
    """
    bank, injection = bank_of(model), injection_of(model)
    check_choice("metric", metric, METRICS)
    if not isinstance(bank, LoRABank):
        raise ValueError(
            f"the method {injection.config.method.name!r} has no pair (A, B) for each target, so "
            "there is nothing to cut: use lora, lora_drop or spectral"
        )
    if injection.merged is not None:
        raise ValueError("the adapters are merged into the weights: call loradrop.remove(model)")
    require_adapted(model)
    wanted = _checked(bank, ranks)
    probed = None if injection.scores is None else injection.scores.grams
    grams = _grams(bank, probed, metric)
    values = spectrum_of(bank.targets, grams, metric)
    members, slots = members_of(bank.slots), dict[int, int]()
    pairs: list[Pair] = []
    for slot, of in members.items():
        pair, k = bank.factors(of[0]), wanted[of[0]]
        assert pair is not None
        if k == 0:
            continue
        slots[slot] = len(pairs)
        if k < pair[0].shape[0]:
            names = ", ".join(bank.targets[i].name for i in of)
            best = cores(grams, of, metric, names)
            pair = _cut(pair, best, k)
        pairs.append(pair)
    targets = tuple(
        target if slot is None or k == 0 else target._replace(r=k)
        for target, slot, k in zip(bank.targets, bank.slots, wanted, strict=True)
    )
    new_slots = tuple(None if slot is None else slots.get(slot) for slot in bank.slots)
    plan, full = plan_of(model), bank.trainable
    bank.assign(Assignment(targets, new_slots, bank.assignment.kept), pairs)
    injection.scores = None  # of the adapters that were there
    left = {t.name: 0 if s is None else t.r for t, s in zip(targets, new_slots, strict=True)}
    loss = values.loss(left) if metric == "loss" else None
    cut = {
        "metric": metric,
        "values": {name: list(values[name]) for name in values},
        "ranks": left,
        "full": plan.full_ranks,
        "loss": loss,
    }
    injection.plan = replace(plan, cut=cut)
    _log.info(
        "cut to %s of %s parameters%s", f"{bank.trainable:,}", f"{full:,}",
        "" if loss is None else f", predicted rise of the loss {loss:.2g}",
    )  # fmt: skip


def _checked(bank: LoRABank, ranks: Mapping[str, int]) -> list[int]:
    """The rank of each target, in their order."""
    names = [target.name for target in bank.targets]
    for name in ranks:
        if name not in names:
            raise ValueError(f"ranks has {name!r}, which is not a target: {', '.join(names)}")
    wanted = []
    for target, slot in zip(bank.targets, bank.slots, strict=True):
        most = 0 if slot is None else target.r
        rank = ranks.get(target.name, most)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= most:
            raise ValueError(
                f"ranks[{target.name!r}]={rank!r}: choose a whole number from 0 to {most}, the "
                "rank that it has"
            )
        wanted.append(rank)
    for members in members_of(bank.slots).values():
        if len({wanted[i] for i in members}) > 1:
            shown = ", ".join(f"{names[i]}: {wanted[i]}" for i in members)
            raise ValueError(f"these targets share one adapter, so one rank serves all: {shown}")
    return wanted


def _grams(bank: LoRABank, probed: Grams | None, metric: str) -> Grams:
    """Those of the factors as they are now, and of the passes as they were probed."""
    if probed is None:
        if metric == "weight":
            return grams_of(bank)
        raise ValueError(
            f"metric={metric!r} needs what a probe measures: call loradrop.probe(model, batches, "
            "gram=True) first, or take metric='weight'"
        )
    if probed.slots != bank.slots or any(
        gram is not None and len(gram) != target.r
        for target, gram in zip(bank.targets, probed.inputs, strict=True)
    ):
        raise ValueError("the adapters changed since they were probed: probe again")
    return grams_of(bank, probed.inputs, probed.outputs, probed.rows, probed.samples)


def _cut(pair: Pair, best: Cores, k: int) -> tuple[nn.Parameter, nn.Parameter]:
    """(A' (k, K), B' (N, k)), made in float64, in the dtypes of A and B."""
    A, B = pair
    left, right = (core.to(A.device) for core in (best.left[:, :k], best.right[:k]))
    new_A, new_B = right @ A.double(), B.double() @ left
    return nn.Parameter(new_A.to(A.dtype)), nn.Parameter(new_B.to(B.dtype))
