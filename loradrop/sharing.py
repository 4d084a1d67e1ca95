"""Sharing: the kept targets keep an adapter of their own, all others of a group point to one."""

from collections.abc import Sequence

from torch import nn

from loradrop.bank import bank_of
from loradrop.injection import injection_of
from loradrop.pairs import LoRABank


def share(
    model: nn.Module,
    kept: Sequence[str] | None = None,
    *,
    share: str = "group",
    init: str = "fresh",
    after_select: str = "reinit",
) -> None:
    """Point all targets but `kept` to one adapter per (module type, K, N, r).

    kept           names, as from `select`; None selects by the last probe with the method's own
                   options
    share          "group", or "none": the others lose their adapter
    init           where a shared adapter starts: "fresh" (A Kaiming, B zero), "mean" of its
                   members, or "top", the member with the largest score
    after_select   "reinit": kept adapters start fresh; "continue": they keep what they learnt

    The parameters change, so an optimiser made before this does not fit any more. Raises ValueError
    for a name that is not a target, for unknown options, for a bank without pairs, and where `kept`
    is None and nothing was probed.
    """
    bank, injection = bank_of(model), injection_of(model)
    if kept is None:
        injection.config.method.update(bank, injection.scores)
        return
    if not isinstance(bank, LoRABank):
        raise ValueError(
            f"the method {injection.config.method.name!r} has no pair (A, B) for each target, so "
            "its targets cannot be pointed to shared pairs: use the method lora or lora_drop"
        )
    bank.share(kept, injection.scores, share=share, init=init, after_select=after_select)
