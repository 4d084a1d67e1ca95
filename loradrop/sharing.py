"""Sharing: the kept targets keep an adapter of their own, all others of a group point to one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loradrop.bank import AdapterBank, Target, bank_of, fresh
from loradrop.selection import Scores, assign, check_choice

INITS = ("fresh", "mean", "top")
AFTER = ("reinit", "continue")


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

    The parameters change, so an optimiser made before this no longer fits. Raises ValueError for a
    name that is no target, for unknown options, and where `kept` is None and nothing was probed.
    """
    bank = bank_of(model)
    if kept is None:
        kept = bank.config.method.update(bank, bank.scores)
        if kept is None:
            raise ValueError(
                f"the method {bank.config.method.name!r} selects nothing: "
                "pass kept, or use LoRADrop()"
            )
        return
    apply(bank, kept, bank.scores, share=share, init=init, after_select=after_select)


def apply(
    bank: AdapterBank,
    kept: Sequence[str],
    scores: Scores | None,
    *,
    share: str,
    init: str,
    after_select: str,
) -> None:
    """`share` on the bank itself."""
    check_choice("init", init, INITS)
    check_choice("after_select", after_select, AFTER)
    if init == "top" and scores is None:
        raise ValueError("init='top' needs scores: call loradrop.probe(model, batches) first")
    slots = assign(bank.targets, kept, share)
    members: dict[int, list[int]] = {}
    for i, slot in enumerate(slots):
        if slot is not None:
            members.setdefault(slot, []).append(i)
    own = set(kept)
    pairs = []
    for slot in range(len(members)):
        indices = members[slot]
        start = after_select if bank.targets[indices[0]].name in own else init
        pairs.append(_pair(bank, indices, start, scores))
    bank.assign(slots, pairs)


@torch.no_grad()
def _pair(
    bank: AdapterBank, members: list[int], start: str, scores: Scores | None
) -> tuple[Tensor, Tensor]:
    """(A (r, K), B (N, r)) of the adapter that `members` will use."""
    first: Target = bank.targets[members[0]]
    pairs = [pair for i in members if (pair := bank.factors(i)) is not None]
    if start in ("reinit", "fresh") or not pairs:
        return fresh(first, bank.like.device, bank.like.dtype)
    chosen = pairs
    if start == "continue":
        chosen = pairs[:1]
    elif start == "top":
        assert scores is not None
        values = scores.values_by_target
        best = bank.factors(max(members, key=lambda i: values[i]))
        chosen = pairs[:1] if best is None else [best]
    # The mean is also the copy: what continues from one adapter never shares its storage.
    A, B = (torch.stack(factors).mean(0) for factors in zip(*chosen, strict=True))
    return A, B
