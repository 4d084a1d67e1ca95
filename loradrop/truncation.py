"""The cut: fewer directions for each adapter, the best that its last probe knows of."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from loradrop.bank import bank_of
from loradrop.injection import injection_of, plan_of, require_adapted, require_own, require_unmerged
from loradrop.optimizers import MOMENTS, follow, groups_of, unprojectable, unwrapped
from loradrop.options import check_choice
from loradrop.pairs import LoRABank
from loradrop.spectral.cuts import decide
from loradrop.spectral.spectra import METRICS
from loradrop.wrapped import of_inner

_log = logging.getLogger(__name__)


@of_inner
def truncate(
    model: nn.Module,
    ranks: Mapping[str, int],
    *,
    metric: str = "loss",
    compensate: bool = True,
    optimizer: Any = None,
    moments: str = "projected",
) -> None:
    """Cut every adapter to its rank: the best (A', B') of that rank by the last probe.

    ranks    name -> rank, as from `allocate`; targets that it leaves out keep theirs. At 0 a target
             has no adapter any more
    metric   what "best" means: see `spectra`; "weight" needs no probe
    compensate   what is left makes up for what goes, in all adapters, as far as the probe's batches
             say how: see `compensation`. With metric="loss" after `probe(..., gram=True)`; the more
             batches the better, so small ones
    optimizer   that of torch which trains the model: it goes on with the parameters that are there
    moments  what it knows of cut adapters is "projected" with them, or all it knows is "reset"

    s and the frozen weights stay as they are, and so do adapters that keep their rank where nothing
    is made up for. A' and B' of each direction that is left of a cut adapter have the same length.
    Parameters change, so an optimiser made before this that is not given does not fit any more.
    Raises ValueError for ranks that do not fit, targets that share an adapter and get different
    ones, a bank without pairs, statistics that are not there, and moments that cannot be projected.
    """
    require_own(model, "loradrop.save it, loradrop.load the folder into the base model, and cut")
    bank, injection = require_pairs(model), injection_of(model)
    check_choice("metric", metric, METRICS)
    check_choice("moments", moments, MOMENTS)
    require_unmerged(model)
    require_adapted(model)
    grams = None if injection.scores is None else injection.scores.grams
    plan, full = plan_of(model), bank.trainable
    groups = None if optimizer is None else groups_of(model, optimizer)
    projected = optimizer is not None and moments == "projected"
    if projected and (name := unprojectable(model, optimizer)) is not None:
        raise ValueError(
            f"{type(unwrapped(optimizer)).__name__} keeps {name!r} of each parameter, which cannot "
            "be projected: pass moments='reset', which begins its state anew"
        )
    cut = decide(bank.targets, bank.grams(grams, metric), ranks, metric, compensate)
    made = bank.cut(cut)
    if groups is not None:
        follow(model, optimizer, groups, made if moments == "projected" else None)
    injection.plan = plan.after_cut(made.record)
    injection.scores = None  # of the adapters that were there
    found = cut.record["loss"] if cut.record["compensated"] is None else cut.record["compensated"]
    loss = "" if found is None else f", predicted rise of the loss {found:.2g}"
    _log.info("cut from %s to %s parameters%s", f"{full:,}", f"{bank.trainable:,}", loss)


def require_pairs(model: nn.Module) -> LoRABank:
    """The bank. Raises ValueError for a method whose bank has no pairs, which cannot be cut."""
    bank = bank_of(model)
    if not isinstance(bank, LoRABank):
        raise ValueError(
            f"the method {injection_of(model).config.method.name!r} has no pair (A, B) for each "
            "target to cut: export the adapter (loradrop export), which makes pairs, and cut that"
        )
    return bank
