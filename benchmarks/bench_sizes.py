"""Which quality does a model reach at which number of trained parameters?

LoRA of falling rank, LoRA-drop and spectral LoRA-drop, at equal steps and one α, each at its best
learning rate: see `lib/study.py`. The whole curves of the search are kept.
Beside dev the loss on the rows held out is told, which are like those of training where dev is not
(of stdlib it has other modules, but for "same modules"). Cells are written as they finish, and a
run again does the rest.

    python benchmarks/bench_sizes.py --data DIR [--models DIR]    DIR/sst2 ... hold train and dev
    python benchmarks/bench_sizes.py --picture                    docs/sizes.png from the cells
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lib import RESULTS, ROOT
from lib.size_picture import draw
from lib.size_tables import SUMMARY
from lib.study import ALONE, ALPHA, OF_HEAD, Arm, Cell, Study
from lib.tasks import SETTINGS, Prepared, Tasks
from loradrop.injection import injection_of
from loradrop.loading import load
from loradrop.methods import LoRA, LoRADrop, Spectral
from loradrop.native import save
from loradrop.probing import probe
from loradrop.spectral.allocation import allocate
from loradrop.spectral.spectra import spectrum
from loradrop.text.tokens import TokenizedDataset
from loradrop.truncation import truncate

RESULT = RESULTS / "cpu" / "bench_sizes.json"
TASKS = (*SUMMARY, "sst2, mpnet, query and value", "e2e, SmolLM2, query and value")
RANK = 8  # of what all sizes are a part of


def lora(rank: int, **options: Any) -> Arm:
    """LoRA of this rank; s = α/r."""
    return Arm(rank, LoRA(), s=ALPHA / rank, **options)


def spectral(part: int, like: str | None = None, **options: Any) -> Arm:
    """Spectral LoRA-drop at 1/part of LoRA's parameters; k directions have s = α/k."""
    budget = 1 / part
    method = Spectral(budget=budget, **options)
    return Arm(RANK, method, s=ALPHA / (budget * RANK), first=16e-3, like=like)


def drop(**options: Any) -> Arm:
    """LoRA-drop with a fifth of its steps for the warm-up."""
    method = LoRADrop(probe_steps=0.2, **options)
    return Arm(RANK, method, s=ALPHA / RANK)


ARMS = {
    "LoRA r=8": lora(8),
    "LoRA r=1": lora(1, first=16e-3),
    "spectral, 1/8": spectral(8),
    "LoRA r=4": lora(4),
    "spectral, 1/2": spectral(2),
    "LoRA r=2": lora(2),
    "spectral, 1/4": spectral(4),
    "spectral, 1/16": spectral(16),
    "spectral, 1/8, by output": spectral(8, "spectral, 1/8", metric="output"),
    "spectral, 1/8, by weight": spectral(8, "spectral, 1/8", metric="weight"),
    "spectral, 1/8, one rank for all": spectral(8, "spectral, 1/8", scope="per_target"),
    "spectral, 1/8, from r": spectral(8, "spectral, 1/8", r_start=RANK),
    "spectral, 1/8, cut late": spectral(8, "spectral, 1/8", cut_at=0.9),
    "LoRA-drop, 1/2": drop(budget=0.5),
    "LoRA-drop, 1/2, random layers": drop(budget=0.5, selection="random"),
    "LoRA-drop, 1/2, least important layers": drop(budget=0.5, selection="inverse"),
    "LoRA-drop, 1/2, no sharing": drop(budget=0.5, share="none"),
    "LoRA-drop, 1/2, kept adapters continue": drop(budget=0.5, after_select="continue"),
    "one shared LoRA": drop(threshold=0.0),
    "the head's rate": OF_HEAD,
    "head only": ALONE,
    "spectral online, 1/8": spectral(8, source="online")._replace(first=64e-3),
    "LoRA r=8, one rate": lora(8, own=False),
    "LoRA r=1, one rate": lora(1, own=False),
    "LoRA r=8, upper half": lora(8, exclude=r".*\.layer\.[012]\..*"),  # of MiniLM's six layers
}
CUT = "LoRA r=8"  # the arm that is cut at its end, as `loradrop compress` does
PARTS = (4, 8, 16)


def cuts(
    name: str, arm: str, given: Prepared, judge: Callable[[], Cell]
) -> Iterator[tuple[str, Cell]]:
    """What the arm `CUT` comes to at every budget, without training."""
    if arm != CUT:
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
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=TASKS)
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
    here = tasks.at_hand(args.tasks)
    study.run([(task, arm) for arm in args.arms for task in here], args.seeds)


if __name__ == "__main__":
    main()
