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
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lib import RESULTS, ROOT
from lib.size_picture import draw
from lib.tasks import (
    SETTINGS,
    Prepared,
    Tasks,
    labels_of,
    predictions,
    quality,
    write_cells,
)
from loradrop.allocation import allocate
from loradrop.config import LoRAConfig, TrainConfig
from loradrop.files import read_json
from loradrop.injection import injection_of
from loradrop.loading import load
from loradrop.methods import LoRA, LoRADrop, Method, Spectral
from loradrop.native import save
from loradrop.probing import probe
from loradrop.spectra import spectrum
from loradrop.text.tokens import TokenizedDataset
from loradrop.training import fit
from loradrop.truncation import truncate

RESULT = RESULTS / "cpu" / "bench_sizes.json"
RANK = 8  # of what all sizes are a part of
RATES = tuple(1e-3 * 2**k for k in range(-2, 7))
FIRST_RATE, SEARCH_SEED = 4e-3, 100
# Arm -> rank of its configuration and its method.
ARMS: dict[str, tuple[int, Method]] = {
    "LoRA r=8": (8, LoRA()),
    "LoRA r=1": (1, LoRA()),
    "spectral, 1/8": (8, Spectral(budget=0.125)),
    "spectral, 1/16": (8, Spectral(budget=0.0625)),
    "LoRA r=2": (2, LoRA()),
    "spectral, 1/4": (8, Spectral(budget=0.25)),
    "LoRA-drop, 1/2": (8, LoRADrop(budget=0.5, probe_steps=0.2)),
    "LoRA r=4": (4, LoRA()),
    "spectral, 1/2": (8, Spectral(budget=0.5)),
    "LoRA r=16": (16, LoRA()),
    "spectral, step time 0.75, 1/8": (8, Spectral(budget=0.125, budget_time=0.75)),
    "spectral from r, 1/8": (8, Spectral(budget=0.125, r_start=8)),
    "spectral from r, late, 1/8": (8, Spectral(budget=0.125, r_start=8, cut_at=0.85)),
    "spectral late, 1/8": (8, Spectral(budget=0.125, cut_at=0.85)),
    "spectral by weights, 1/8": (8, Spectral(budget=0.125, metric="weight")),
    "spectral online, 1/8": (8, Spectral(budget=0.125, source="online")),
}
# What this arm comes to when it is cut at its end, as `loradrop compress` does.
CUT = "LoRA r=8"
CUTS = {f"{CUT}, cut to 1/{n}": 1 / n for n in (2, 4, 8, 16)}


def judged(given: Prepared, search: bool) -> dict[str, Any]:
    """The loss on the rows held out of train; unless a rate is searched, dev beside it."""
    model, held_out = given.model, given.batches(given.choice)
    found = quality(predictions(model, held_out), labels_of(held_out))
    size = model.lora_bank.trainable
    if search:
        return {"of": "held out", "n": len(given.choice), "parameters": size, **found}
    dev = given.batches(given.dev)
    facts = {"n": len(given.dev), "parameters": size, "held_out_loss": found["loss"]}
    return {"of": "dev", **facts, **quality(predictions(model, dev), labels_of(dev))}


class Study:
    """The cells of one result file."""

    def __init__(self, tasks: Tasks, path: Path, minutes: float) -> None:
        self.tasks, self.path = tasks, path
        self.cells: list[dict[str, Any]] = read_json(path)["cells"] if path.exists() else []
        self._deadline = time.monotonic() + 60 * minutes

    def cell(self, task: str, arm: str, rate: float, seed: int) -> dict[str, Any] | None:
        """The cell, measured now if it is new; None where the time is over."""
        key = {"task": task, "arm": arm, "rate": rate, "seed": seed}
        for cell in self.cells:
            if key.items() <= cell.items():
                return cell
        if time.monotonic() > self._deadline:
            return None
        self.cells += [key | {"arm": of} | found for of, found in self._run(task, arm, rate, seed)]
        settings = {"rank": RANK, "rates": RATES, "search_seed": SEARCH_SEED}
        write_cells(self.path, self.cells, settings)
        print(json.dumps(self.cells[-1]), flush=True)
        return self.cell(task, arm, rate, seed)

    def _run(
        self, name: str, arm: str, rate: float, seed: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """The arm and its cell, and of `CUT` those that are cut from it, without training."""
        setting, (rank, method) = SETTINGS[name], ARMS[arm]
        train = TrainConfig(
            steps=setting.steps, batch_size=setting.batch_size, learning_rate=rate, seed=seed,
            save_every=10**6,
        )  # fmt: skip
        given = self.tasks.prepare(name, train)
        lora = LoRAConfig(
            r=rank, lora_alpha=2 * rank, target_modules=setting.target_modules,
            modules_to_save=given.missing, method=method,
        )  # fmt: skip
        search = seed == SEARCH_SEED
        started = time.process_time()
        try:
            fit(given.model, given.train, None, lora, args=train, collate=given.collate)
        except ValueError as error:  # a rate at which the loss is not finite any more
            if "finite" not in str(error):
                raise
            yield arm, {"loss": None}
            return
        seconds = round(time.process_time() - started, 1)
        yield arm, {"seconds": seconds} | judged(given, search)
        if search or arm != CUT:
            return
        rows = TokenizedDataset(given.train.rows[: setting.measured])
        model, batches = given.model, given.batches(rows, setting.measured_batch)
        scores = probe(model, batches, gram=True)
        with tempfile.TemporaryDirectory() as folder:
            save(model, folder)
            for of, budget in CUTS.items():
                load(model, folder)
                injection_of(model).scores = scores
                truncate(model, allocate(spectrum(scores), budget=budget))
                yield of, judged(given, search)

    def search(self, task: str, arm: str) -> float | None:
        """The rate of the least loss on the rows held out of train: down from the first on either
        side, as far as it falls. None where the time is over.
        """
        losses: dict[int, float] = {}

        def loss(k: int) -> float | None:
            if not 0 <= k < len(RATES):
                return math.inf
            if k not in losses:
                cell = self.cell(task, arm, RATES[k], SEARCH_SEED)
                if cell is None:
                    return None
                losses[k] = math.inf if cell["loss"] is None else cell["loss"]
            return losses[k]

        best = RATES.index(FIRST_RATE)
        for step in (-1, 1):
            while True:
                here, there = loss(best), loss(best + step)
                if here is None or there is None:
                    return None
                if there >= here:
                    break
                best += step
        return RATES[best]


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
    study = Study(tasks, args.out, args.minutes)
    chosen = [(task, arm) for arm in args.arms for task in args.tasks if tasks.has(task)]
    rates = {key: study.search(*key) for key in chosen}
    for seed in range(args.seeds):
        for key in chosen:
            if (rate := rates[key]) is not None:
                study.cell(*key, rate, seed)


if __name__ == "__main__":
    main()
