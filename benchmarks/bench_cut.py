"""What a trained adapter loses when directions are cut off, without any training afterwards.

LoRA is trained on every linear layer of a model. Then each way to cut leaves a half, a quarter, an
eighth or a sixteenth of it, and the cut model is compared with the uncut one: the KL divergence of
its predictions on dev, the loss and the accuracy; of some also what a step of training takes, as a
part of one of the uncut model, the two taking turns. On GSM8K some also write answers: the part
with the right number, and with the uncut model's. Cells are written as they finish; a run again
does the rest.

    python benchmarks/bench_cut.py --data DIR [--models DIR]    DIR/sst2 ... hold train and dev
"""

import argparse
import copy
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lib import RESULTS
from lib.answers import Questions
from lib.tasks import (
    SETTINGS,
    Tasks,
    divergence,
    labels_of,
    predictions,
    quality,
    write_cells,
)
from loradrop import fit, load, probe, save, truncate
from loradrop.config import LoRAConfig, TrainConfig
from loradrop.files import read_json
from loradrop.injection import injection_of
from loradrop.scores import Assignment
from loradrop.spectral.allocation import allocate
from loradrop.spectral.spectra import spectrum
from loradrop.text.tokens import TokenizedDataset

RESULT = RESULTS / "cpu" / "bench_cut.json"
RANK = 8
TASKS = "sst2", "stdlib", "sst2, mpnet", "cola, mpnet", "e2e, SmolLM2", "gsm8k, SmolLM2"
BUDGETS = (0.5, 0.25, 0.125, 0.0625)
# Arm -> metric (None: directions drawn at random), and how `allocate` spends the budget.
ARMS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "loss": ("loss", {}),
    "loss, nothing made up": ("loss", {}),
    "loss, one rank for all": ("loss", {"scope": "per_target"}),
    "loss, step time 0.75": ("loss", {"budget_time": 0.75}),  # nothing in the lowest layers
    "output": ("output", {}),
    "weight": ("weight", {}),
    "weight, one rank for all": ("weight", {"scope": "per_target"}),  # as PEFT's conversion
    "random, one rank for all": (None, {"scope": "per_target"}),
    "whole layers by output": ("output", {"multiple": RANK}),  # LoRA-drop without sharing
}
ANSWERING, ANSWERED = ("loss", "weight", "weight, one rank for all"), (0.25, 0.125)


def run_cell(
    tasks: Tasks, name: str, seed: int, arms: Collection[str]
) -> Iterator[dict[str, Any]]:
    """Of the uncut model, if it is among the arms, then every other arm at every budget."""
    setting = SETTINGS[name]
    train = TrainConfig(
        steps=setting.steps, batch_size=setting.batch_size, learning_rate=setting.learning_rate,
        seed=seed, save_every=10**6,
    )  # fmt: skip
    given = tasks.prepare(name, train)
    model = given.model
    lora = LoRAConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=setting.target_modules,
        modules_to_save=given.missing,
    )  # fmt: skip
    fit(model, given.train, None, lora, args=train, collate=given.collate)
    dev = random.Random(0).sample(given.dev.rows, min(setting.dev_rows, len(given.dev)))
    batches = given.batches(TokenizedDataset(dev), 32)
    labels = labels_of(batches)
    rows = TokenizedDataset(given.train.rows[: setting.measured])
    scores = probe(model, given.batches(rows, setting.measured_batch), gram=True)
    uncut = predictions(model, batches)
    questions = Questions(model, given.dev.rows, given.tokenizer, setting.answered)
    facts = {"task": name, "seed": seed, "n": len(labels), "full": model.lora_bank.trainable}
    if "uncut" in arms:
        found = quality(uncut, labels) | questions.uncut
        yield facts | {"arm": "uncut", "budget": 1.0, "kl": 0.0, **found}
    whole, batch = copy.deepcopy(model), given.batches(given.train, setting.batch_size)[0]
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        for arm, (metric, options) in ARMS.items():
            if arm not in arms:
                continue
            found = spectrum(scores, metric or "weight")
            for budget in BUDGETS:
                if options.get("scope") == "per_target" and budget * RANK < 1:
                    continue  # below rank 1 there is none
                ranks = allocate(found, budget=budget, **options)
                load(model, folder)
                injection_of(model).scores = scores
                made_up = arm != "loss, nothing made up"
                log = {"loss": None, "compensated": None}
                if metric is None:
                    draw_directions(model, ranks, seed)
                else:
                    truncate(model, ranks, metric=metric, compensate=made_up)
                    log = injection_of(model).plan.cut
                cut = predictions(model, batches)
                timed = arm == "loss" or "budget_time" in options
                asked = arm in ANSWERING and budget in ANSWERED
                yield facts | {
                    "arm": arm, "budget": budget, "parameters": model.lora_bank.trainable,
                    "predicted": log["loss"] if log["compensated"] is None else log["compensated"],
                    "kl": divergence(cut, uncut), **quality(cut, labels),
                    "step": step_time(model, whole, batch) if timed else None,
                    **(questions.judged() if asked else {}),
                }  # fmt: skip


@torch.no_grad()
def draw_directions(model: Any, ranks: Mapping[str, int], seed: int) -> None:
    """Of every B·A = U Σ Vᵀ so many triplets as `ranks` says, drawn at random."""
    bank, random = model.lora_bank, torch.Generator().manual_seed(seed)
    targets = tuple(target._replace(r=ranks[target.name]) for target in bank.targets)
    pairs = []
    for target, A, B in zip(targets, bank.A, bank.B, strict=True):
        U, sigma, Vt = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
        drawn = torch.randperm(len(A), generator=random)[: target.r]
        root = sigma[drawn].sqrt()
        pairs.append(((root[:, None] * Vt[drawn]).float(), (U[:, drawn] * root).float()))
    bank.assign(Assignment(targets, bank.slots), pairs)


def step_time(model: Any, whole: Any, batch: Any) -> float:
    """Forward and backward of `model`, as a part of those of `whole`: medians of eight turns."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(9):
        for i, each in enumerate((model, whole)):
            each.train()
            started = time.perf_counter()
            each(**batch).loss.backward()
            seconds[i].append(time.perf_counter() - started)
            each.zero_grad(set_to_none=True)
    return statistics.median(seconds[0][1:]) / statistics.median(seconds[1][1:])


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--data", type=Path, help="has sst2/, mrpc/ ...; default: stdlib alone")
    parser.add_argument("--models", type=Path, help="has mpnet/, smollm2/")
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=TASKS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no run starts")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = Tasks(args.data, args.models)
    here = known.at_hand(args.tasks)
    cells = read_json(args.out)["cells"] if args.out.exists() else []
    done = {(cell["task"], cell["seed"], cell["arm"]) for cell in cells}
    deadline = time.monotonic() + 60 * args.minutes
    for seed in args.seeds:
        for name in here:
            arms = [arm for arm in ("uncut", *args.arms) if (name, seed, arm) not in done]
            if not arms or time.monotonic() > deadline:
                continue
            cells += list(run_cell(known, name, seed, arms))
            write_cells(args.out, cells, {"rank": RANK})
            print(json.dumps(cells[-1]), flush=True)


if __name__ == "__main__":
    main()
