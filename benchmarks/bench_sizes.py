"""Which quality does a model reach at which number of trained parameters?

LoRA of falling rank, LoRA-drop and spectral LoRA-drop, on every linear layer, at equal steps. For
every arm, and every α of an arm, the learning rate is searched on one grid, by the loss on a part
of train that no run trains on; the whole curve is kept. At the rate that won, every seed trains
once, and dev is looked at once, at the end, beside the rows held out, which are like those of
training where dev is not (of stdlib it has other modules, but for "same modules"). Cells are
written as they finish, and a run again does the rest.

    python benchmarks/bench_sizes.py --data DIR [--models DIR]    DIR/sst2 ... hold train and dev
    python benchmarks/bench_sizes.py --picture                    docs/sizes.png from the cells
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from lib import RESULTS, ROOT
from lib.size_picture import draw
from lib.study import ALPHA, Arm, Cell, Study
from lib.tasks import SETTINGS, Prepared, Tasks
from loradrop.allocation import allocate
from loradrop.injection import injection_of
from loradrop.loading import load
from loradrop.methods import LoRA, LoRADrop, Method, Spectral
from loradrop.native import save
from loradrop.pairs import LoRABank
from loradrop.probing import probe
from loradrop.scores import Assignment
from loradrop.spectra import spectrum
from loradrop.text.tokens import TokenizedDataset
from loradrop.truncation import truncate

RESULT = RESULTS / "cpu" / "bench_sizes.json"
RANK = 8  # of what all sizes are a part of
HEAD_RATE = 0.128  # at which the head alone is best (stdlib, "head only")


def lora(rank: int, alpha: float = ALPHA) -> Arm:
    """LoRA of this rank; s = α/r."""
    return Arm(rank, LoRA(), s=alpha / rank)


def spectral(part: int, alpha: float = ALPHA, **options: Any) -> Arm:
    """Spectral LoRA-drop at 1/part of LoRA's parameters; k directions have s = α/k."""
    budget = 1 / part
    return Arm(RANK, Spectral(budget=budget, **options), s=alpha / (budget * RANK))


def drop(**options: Any) -> Arm:
    """LoRA-drop with a fifth of its steps for the warm-up."""
    method = LoRADrop(probe_steps=0.2, **options)
    return Arm(RANK, method, s=ALPHA / RANK)


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """No adapter at all: what the head learns from frozen features."""

    name: ClassVar[str] = "head_only"

    def bank(self, *given: Any) -> LoRABank:
        bank = super().bank(*given)
        bank.assign(Assignment(bank.targets, (None,) * len(bank.targets)), [])
        return bank


ARMS = {
    "LoRA r=8": lora(8),
    "LoRA r=1": lora(1),
    "spectral, 1/8": spectral(8),
    "spectral, 1/16": spectral(16),
    "LoRA r=2": lora(2),
    "spectral, 1/4": spectral(4),
    "LoRA-drop, 1/2": drop(budget=0.5),
    "LoRA-drop, 1/2, kept adapters continue": drop(budget=0.5, after_select="continue"),
    "LoRA r=4": lora(4),
    "spectral, 1/2": spectral(2),
    "LoRA-drop, 1/2, random layers": drop(budget=0.5, selection="random"),
    "LoRA-drop, 1/2, least important layers": drop(budget=0.5, selection="inverse"),
    "LoRA-drop, 1/2, no sharing": drop(budget=0.5, share="none"),
    "one shared LoRA": drop(threshold=0.0),
    "LoRA-drop, T=0.9": drop(threshold=0.9),
    "head only": Arm(RANK, HeadOnly(), s=ALPHA / RANK),
    "LoRA r=8, own rate of the head": lora(8)._replace(head=HEAD_RATE),
    "LoRA r=1, own rate of the head": lora(1)._replace(head=HEAD_RATE),
    "LoRA r=8, α=8, own rate of the head": lora(8, 8)._replace(head=HEAD_RATE, first=4e-3),
    "spectral, 1/8, own rate of the head": spectral(8)._replace(head=HEAD_RATE),
    "LoRA r=16": lora(16),
    "LoRA r=8, α=1/2": lora(8, 0.5),
    "LoRA r=1, α=1/2": lora(1, 0.5),
    "spectral, 1/8, α=1/2": spectral(8, 0.5),
    "LoRA r=8, α=1/32": lora(8, 0.03125),
    "LoRA r=1, α=1/32": lora(1, 0.03125),
    "spectral, 1/8, α=1/32": spectral(8, 0.03125),
    "LoRA r=8, α=2": lora(8, 2),
    "LoRA r=1, α=2": lora(1, 2),
    "spectral, 1/8, α=2": spectral(8, 2),
    "LoRA r=8, α=16": lora(8, 16),
    "spectral, step time 0.75, 1/8": spectral(8, budget_time=0.75),
    "spectral, s fixed, 1/8": Arm(RANK, Spectral(budget=0.125, scale="fixed"), s=2.0),
    "spectral from r, 1/8": spectral(8, r_start=RANK),
    "spectral from r, late, 1/8, α=2": spectral(8, 2, r_start=RANK, cut_at=0.85),
    "spectral late, 1/8, α=2": spectral(8, 2, cut_at=0.85),
    "spectral by weights, 1/8": spectral(8, metric="weight"),
    "spectral online, 1/8": spectral(8, source="online"),
}
# What these arms come to when they are cut at their end, as `loradrop compress` does.
CUT = ("LoRA r=8", "LoRA r=8, α=1/2", "LoRA r=8, α=2", "LoRA r=8, α=16")
PARTS = (2, 4, 8, 16)


def cuts(
    name: str, arm: str, given: Prepared, judge: Callable[[], Cell]
) -> Iterator[tuple[str, Cell]]:
    """Of the arms in `CUT` what they come to at every budget, without training."""
    if arm not in CUT:
        return
    setting = SETTINGS[name]
    rows = TokenizedDataset(given.train.rows[: setting.measured])
    model, batches = given.model, given.batches(rows, setting.measured_batch)
    scores = probe(model, batches, gram=True)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        for part in PARTS:
            load(model, folder)
            injection_of(model).scores = scores
            truncate(model, allocate(spectrum(scores), budget=1 / part))
            yield f"{arm}, cut to 1/{part}", judge()


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--data", type=Path, help="has sst2/ ...; default: stdlib alone")
    parser.add_argument("--models", type=Path, help="has mpnet/, smollm2/")
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=["stdlib", "sst2"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no run starts")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--picture", action="store_true", help="only draw what is there")
    args = parser.parse_args()
    if args.picture:
        draw(RESULTS, ROOT / "docs" / "sizes.png")
        return
    torch.set_num_threads(1)
    tasks = Tasks(args.data, args.models)
    study = Study(tasks, args.out, args.minutes, ARMS, {"rank": RANK, "alpha": ALPHA}, cuts)
    study.run([(t, arm) for arm in args.arms for t in args.tasks if tasks.has(t)], args.seeds)


if __name__ == "__main__":
    main()
