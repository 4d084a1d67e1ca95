"""What each budget would leave of an adapter, for a terminal."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from loradrop.config import DTYPES
from loradrop.formats.peft_file import elements_of
from loradrop.report.look import as_percent
from loradrop.report.terminal import aligned
from loradrop.scores import spread
from loradrop.spectral.allocation import allocate
from loradrop.spectral.spectra import Spectrum

BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0625)


def budget_table(
    found: Spectrum,
    asked: Mapping[str, Mapping[str, int]],
    *,
    padded: bool,
    dtype: str = "float32",
    **how: Any,
) -> str:
    """A row for each of `BUDGETS`, with the options `how` of `allocate`, then one for each ranks
    that were `asked` for, by its name.

    parameters   each adapter once;  in file: as a PEFT file holds them, `padded` or not, and how
    many bytes that is in this `dtype`
    """
    by_loss = found.metric == "loss"
    costs = ["predicted rise of the loss" if by_loss else f"kept by {found.metric}"]
    costs += ["as made up for"] * bool(found.gradients)
    sizes = ["parameters", "in file", f"{dtype} bytes"]
    row = partial(_row, found, padded=padded, width=DTYPES[dtype].itemsize)
    rows = [["budget", *sizes, *costs, "ranks", "without an adapter"]]
    for budget in BUDGETS:
        try:
            ranks = allocate(found, budget=budget, **how)
        except ValueError:  # below one direction
            continue
        rows.append([f"{budget:g}", *row(ranks)])
    rows += [[name, *row(ranks)] for name, ranks in asked.items()]
    return "\n".join(aligned(rows))


def _row(found: Spectrum, ranks: Mapping[str, int], padded: bool, width: int) -> list[str]:
    held = elements_of(found.targets, ranks, padded)
    sizes = [f"{size:,}" for size in (found.parameters(ranks), held, width * held)]
    by_loss = found.metric == "loss"
    cost = [f"{found.loss(ranks):.2g}" if by_loss else f"{as_percent(found.kept(ranks))} %"]
    if (made_up := found.made_up(ranks)) is not None:
        cost.append(f"{made_up.rise:.2g}")
    used = [rank for rank in ranks.values() if rank]
    return [*sizes, *cost, spread(used), str(len(ranks) - len(used))]
