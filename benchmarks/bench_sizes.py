"""Which quality does a model reach at which number of trained parameters?

LoRA of falling rank, LoRA-drop and spectral LoRA-drop, on every linear layer, at equal steps. For
every arm the learning rate is searched on one grid, by the loss on a part of train that no run
trains on; the whole curve is kept. At the rate that won, every seed trains once, and dev is looked
at once, at the end, beside the rows held out, which are like those of training where dev is not (of
stdlib it has other modules). Cells are written as they finish, and a run again does the rest.

    python benchmarks/bench_sizes.py --data DIR [--models DIR]    DIR/sst2 ... hold train and dev
    python benchmarks/bench_sizes.py --picture                    docs/sizes.png from the cells
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lib import RESULTS, ROOT
from lib.size_picture import draw
from lib.study import Arm, Cell, Study
from lib.tasks import SETTINGS, Prepared, Tasks
from loradrop.allocation import allocate
from loradrop.injection import injection_of
from loradrop.loading import load
from loradrop.methods import LoRA, LoRADrop, Spectral
from loradrop.native import save
from loradrop.probing import probe
from loradrop.spectra import spectrum
from loradrop.text.tokens import TokenizedDataset
from loradrop.truncation import truncate

RESULT = RESULTS / "cpu" / "bench_sizes.json"
RANK = 8  # of what all sizes are a part of
ARMS = {
    "LoRA r=8": Arm(8, LoRA()),
    "LoRA r=1": Arm(1, LoRA()),
    "spectral, 1/8": Arm(8, Spectral(budget=0.125)),
    "spectral, 1/16": Arm(8, Spectral(budget=0.0625)),
    "LoRA r=2": Arm(2, LoRA()),
    "spectral, 1/4": Arm(8, Spectral(budget=0.25)),
    "LoRA-drop, 1/2": Arm(8, LoRADrop(budget=0.5, probe_steps=0.2)),
    "LoRA r=4": Arm(4, LoRA()),
    "spectral, 1/2": Arm(8, Spectral(budget=0.5)),
    "LoRA r=16": Arm(16, LoRA()),
    "LoRA r=8, s=1/4": Arm(8, LoRA(), s=0.25),
    "spectral, step time 0.75, 1/8": Arm(8, Spectral(budget=0.125, budget_time=0.75)),
    "spectral, s fixed, 1/8": Arm(8, Spectral(budget=0.125, scale="fixed")),
    "spectral from r, 1/8": Arm(8, Spectral(budget=0.125, r_start=8)),
    "spectral from r, late, 1/8": Arm(8, Spectral(budget=0.125, r_start=8, cut_at=0.85)),
    "spectral late, 1/8": Arm(8, Spectral(budget=0.125, cut_at=0.85)),
    "spectral by weights, 1/8": Arm(8, Spectral(budget=0.125, metric="weight")),
    "spectral online, 1/8": Arm(8, Spectral(budget=0.125, source="online")),
}
# What this arm comes to when it is cut at its end, as `loradrop compress` does.
CUT = "LoRA r=8"
CUTS = {f"{CUT}, cut to 1/{n}": 1 / n for n in (2, 4, 8, 16)}


def cuts(
    name: str, arm: str, given: Prepared, judge: Callable[[], Cell]
) -> Iterator[tuple[str, Cell]]:
    """Of `CUT` what it comes to at every budget, without training."""
    if arm != CUT:
        return
    setting = SETTINGS[name]
    rows = TokenizedDataset(given.train.rows[: setting.measured])
    model, batches = given.model, given.batches(rows, setting.measured_batch)
    scores = probe(model, batches, gram=True)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        for of, budget in CUTS.items():
            load(model, folder)
            injection_of(model).scores = scores
            truncate(model, allocate(spectrum(scores), budget=budget))
            yield of, judge()


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
    study = Study(tasks, args.out, args.minutes, ARMS, {"rank": RANK}, after=cuts)
    study.run([(t, arm) for arm in args.arms for t in args.tasks if tasks.has(t)], args.seeds)


if __name__ == "__main__":
    main()
