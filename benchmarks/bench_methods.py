"""Which method reaches which quality at the parameters of LoRA of rank 1, 2 and 4?

Every method adapts every linear layer, for equally many steps, and has the learning rate that is
best for it on one grid, searched at its smallest size: see `lib/study.py`. A budget is LoRA's own
size at that rank, on the same layers; each method's rank and options for it are in `SIZES`, and a
cell says what it came to. s is α over the budget for all of them, with one α, so that it is LoRA's
at every size, and a rate that suits one size suits the others. A new head has a rate of its own.
Cells are written as they finish, the most telling first, and a run again does the rest.

    python benchmarks/bench_methods.py --data DIR [--minutes 30]    DIR/sst2 ... hold train and dev
    python benchmarks/bench_methods.py --picture                    docs/methods.png from the cells
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from lib import RESULTS, ROOT
from lib.method_picture import draw
from lib.study import ALPHA, FIRST_RATE, Arm, Study
from lib.tasks import Tasks
from loradrop import methods

RESULT = RESULTS / "cpu" / "bench_methods.json"
TASKS = ("stdlib, same modules", "sst2", "mrpc, 120 steps", "stdlib")
BUDGETS = (1, 4, 2)  # ranks of LoRA; the smallest and the largest tell most
# Where the search of a rate begins for methods that do not train A as LoRA does.
FIRST = {"lora_fa": 64e-3}
# Method -> budget -> the rank of its configuration, and its options where they are not the
# defaults, for the layers of MiniLM: within 16 % of LoRA's size. At the end AdaLoRA and spectral
# LoRA-drop are of that size, and wider at first. The next size of VeRA would need a rank of
# 1,700, and RaSA of rank 1 is LoRA.
SIZES: dict[str, dict[int, tuple[int, dict[str, Any]]]] = {
    "lora": {1: (1, {}), 2: (2, {}), 4: (4, {})},
    "lora_drop": {n: (2 * n, {"budget": 0.5, "probe_steps": 0.2}) for n in (1, 2, 4)},
    "spectral": {n: (8, {"budget": n / 8}) for n in (1, 2, 4)},
    "adalora": {1: (1, {}), 2: (2, {}), 4: (4, {})},
    "rasa": {2: (2, {}), 4: (4, {})},
    "share_lora": {1: (2, {}), 2: (3, {}), 4: (7, {})},
    "tied_lora": {1: (3, {}), 2: (9, {}), 4: (21, {})},
    "vera": {1: (384, {})},
    "mos": {
        1: (3, {"equivalent_rank": 1, "private_rank": 0}),
        2: (6, {"equivalent_rank": 2}),
        4: (12, {"equivalent_rank": 4}),
    },
    "prolora": {1: (4, {"u": 0}), 2: (5, {"u": 1}), 4: (10, {"u": 2})},
    "lora_fa": {1: (2, {}), 2: (4, {}), 4: (8, {})},
    "lorta": {1: (9, {}), 2: (18, {}), 4: (36, {})},
    "nb_lora": {1: (1, {}), 2: (2, {}), 4: (4, {})},
    "rm_lora": {1: (1, {}), 2: (2, {}), 4: (4, {})},
    "prilora": {1: (1, {"r_start": 1, "r_end": 1}), 2: (2, {}), 4: (4, {})},
}


def arms(budget: int, names: list[str]) -> dict[str, Arm]:
    """Name -> arm at this budget, for the methods that there are. The smallest size that a method
    has is the one at which its rate is searched.
    """
    found = {}
    for name in names:
        if budget in SIZES[name]:
            rank, options = SIZES[name][budget]
            about = {"method": name, "budget": budget}
            method = methods.get(name)(**options)
            first = FIRST.get(name, FIRST_RATE)
            least = min(SIZES[name])
            like = None if budget == least else f"{name}, {least}"
            arm = Arm(rank, method, about, ALPHA / budget, first, like)
            found[f"{name}, {budget}"] = arm
    return found


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--data", type=Path, help="has sst2/ and mrpc/; default: stdlib alone")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--budgets", nargs="+", type=int, choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no run starts")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--picture", action="store_true", help="only draw what is there")
    args = parser.parse_args()
    if args.picture:
        draw(RESULTS, ROOT / "docs" / "methods.png")
        return
    torch.set_num_threads(1)
    tasks = Tasks(args.data, None)
    every = {budget: arms(budget, args.methods) for budget in BUDGETS}
    merged = {name: arm for found in every.values() for name, arm in found.items()}
    study = Study(tasks, args.out, args.minutes, merged, {"budgets": BUDGETS, "alpha": ALPHA})
    here = tasks.at_hand(args.tasks)
    for found in (every[budget] for budget in BUDGETS if budget in args.budgets):
        for task in here:
            for arm in found:  # a method at a time: the table has whole rows, however long it ran
                study.run([(task, arm)], args.seeds)


if __name__ == "__main__":
    main()
