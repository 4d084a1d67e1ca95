"""What a cut leaves of each adapter: a decision on plain data, which `LoRABank.cut` carries out."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from loradrop.scores import Grams, Target, members_of
from loradrop.spectral.spectra import decompose, narrowed


class Cut(NamedTuple):
    """ranks    slot -> what is left, 0 for no adapter
    maps     slot -> P (k, r) and Q (r, k) of A' = P A and B' = B Q, where its factors change
    record   what the plan says of it: metric, values, slots, ranks, loss, compensated
    """

    ranks: dict[int, int]
    maps: dict[int, tuple[Tensor, Tensor]]
    record: dict[str, Any]


def decide(
    targets: Sequence[Target],
    grams: Grams,
    ranks: Mapping[str, int],
    metric: str,
    compensate: bool = True,
) -> Cut:
    """The cut to these ranks, by name; targets that are not in there keep theirs.

    Raises ValueError for ranks that do not fit, and statistics that are not there or not finite.
    """
    members = members_of(grams.slots)
    wanted = _wanted(targets, grams.slots, ranks)
    by_name = {target.name: k for target, k in zip(targets, wanted, strict=True)}
    values, of_slot = decompose(targets, grams, metric)
    left = {slot: wanted[of[0]] for slot, of in members.items()}
    made_up = values.made_up(by_name) if compensate else None
    rows: dict[int, Tensor] = {}
    if made_up is not None and made_up.ridge is not None:
        rows = dict(zip(left, made_up.rows, strict=True))
    maps = {}
    for slot, k in left.items():
        first = members[slot][0]
        if k and (k < targets[first].r or slot in rows):
            factors = grams.A[first], grams.B[first]
            maps[slot] = narrowed(of_slot[slot], k, rows.get(slot), factors)
    record = {
        "metric": metric,
        "values": {name: list(values[name]) for name in values},
        "slots": list(grams.slots),
        "ranks": by_name,
        "loss": values.loss(by_name) if metric == "loss" else None,
        "compensated": None if made_up is None else made_up.rise,
    }
    return Cut(left, maps, record)


def _wanted(
    targets: Sequence[Target], slots: Sequence[int | None], ranks: Mapping[str, int]
) -> list[int]:
    """The rank of each target, in their order."""
    names = [target.name for target in targets]
    for name in ranks:
        if name not in names:
            raise ValueError(f"ranks has {name!r}, which is not a target: {', '.join(names)}")
    wanted = []
    for target, slot in zip(targets, slots, strict=True):
        most = 0 if slot is None else target.r
        rank = ranks.get(target.name, most)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= most:
            raise ValueError(
                f"ranks[{target.name!r}]={rank!r}: choose a whole number from 0 to {most}, the "
                "rank that it has"
            )
        wanted.append(rank)
    for members in members_of(slots).values():
        if len({wanted[i] for i in members}) > 1:
            shown = ", ".join(f"{names[i]}: {wanted[i]}" for i in members)
            raise ValueError(f"these targets share an adapter, so one rank serves all: {shown}")
    return wanted
