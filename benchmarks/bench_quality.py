"""Does LoRA-drop keep LoRA's quality at half the parameters? Every arm, several seeds, one dev
figure.

Every arm of a seed sees the same data in the same order, for the same number of optimiser steps
(the warm-up included), at the same learning rate, which was tuned for none. Dev is looked at once,
at the end of a run. Cells are written as they finish, the most telling first; a run again does the
rest.

    python benchmarks/bench_quality.py --data DIR    DIR/mrpc and DIR/sst2 hold train and dev files
"""

import argparse
import dataclasses
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from lib import RESULTS
from loradrop.base_models import build
from loradrop.config import LoRAConfig, TrainConfig
from loradrop.env import versions
from loradrop.files import read_json, write_json
from loradrop.methods import LoRA, LoRADrop, Method
from loradrop.pairs import LoRABank
from loradrop.run_config import RunConfig
from loradrop.scores import Assignment
from loradrop.text.examples import TextTask
from loradrop.text.task import DataConfig, load_task
from loradrop.text.tokens import collator, metric_fn, tokenize
from loradrop.training import fit

RESULT = RESULTS / "cpu" / "bench_quality.json"
TARGETS = ("query", "value")  # the paper's counts fit these
LEARNING_RATE = 3e-3


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """No adapter at all: what the head learns from frozen features."""

    name: ClassVar[str] = "head_only"

    def bank(self, *given: Any) -> LoRABank:
        bank = super().bank(*given)
        bank.assign(Assignment(bank.targets, (None,) * len(bank.targets)), [])
        return bank


def arms(seed: int) -> dict[str, LoRAConfig]:
    """Name -> configuration; the most telling first."""

    def config(method: Method, r: int = 8) -> LoRAConfig:
        return LoRAConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS, method=method)

    half: dict[str, Any] = {"budget": 0.5, "probe_steps": 0.2}
    return {
        "LoRA r=8": config(LoRA()),
        "LoRA-drop, half": config(LoRADrop(**half)),
        "LoRA r=4": config(LoRA(), r=4),
        "one shared LoRA": config(LoRADrop(threshold=0.0, probe_steps=0.2)),
        "drop without sharing": config(LoRADrop(**half, share="none")),
        "random selection, half": config(LoRADrop(**half, selection="random", selection_seed=seed)),
        "inverse selection, half": config(LoRADrop(**half, selection="inverse")),
        "LoRA-drop, T=0.9": config(LoRADrop(threshold=0.9, probe_steps=0.2)),
        "LoRA-drop, half, kept adapters continue": config(
            LoRADrop(**half, after_select="continue")
        ),
        "head only": config(HeadOnly()),
    }


@dataclass(frozen=True)
class Setting:
    """How one task is run: a sample of its training rows, and about a minute on one core."""

    steps: int
    max_length: int
    max_train: int | None


SETTINGS = {
    "stdlib": Setting(steps=160, max_length=40, max_train=2400),
    "mrpc": Setting(steps=100, max_length=64, max_train=2400),
    "sst2": Setting(steps=100, max_length=40, max_train=2400),
}


def cells(tasks: list[str], seeds: list[int]) -> Iterator[tuple[str, int, str]]:
    """(task, seed, arm) in the order of what they tell; MRPC, whose dev set decides least, last."""
    names = list(arms(0))
    telling = [task for task in tasks if task != "mrpc"]
    rest = [task for task in tasks if task == "mrpc"]
    for group, chosen in ((names[:5], telling), (names[5:], telling), (names, rest)):
        for seed in seeds:
            for arm in group:
                yield from ((task, seed, arm) for task in chosen)


def run_cell(task: TextTask, name: str, seed: int, arm: str, precision: str) -> dict[str, Any]:
    """One run, from the base model to its dev metric."""
    setting = SETTINGS[name]
    train = TrainConfig(
        steps=setting.steps,
        batch_size=16,
        learning_rate=LEARNING_RATE,
        precision=precision,
        seed=seed,
        save_every=10**6,
    )
    model, tokenizer, missing = build(RunConfig(train=train), task)
    lora = dataclasses.replace(arms(seed)[arm], modules_to_save=tuple(missing))
    rows, dev = tokenize(task, tokenizer, setting.max_length)
    started = time.process_time()
    given = {"metric": metric_fn(task), "collate": collator(task, tokenizer)}
    result = fit(model, rows, dev, lora, args=train, **given)
    kept = result.plan.kept
    return {
        "task": name,
        "arm": arm,
        "seed": seed,
        "metric": task.metric,
        "value": result.metrics[task.metric],
        "parameters": result.parameters,
        "seconds": round(time.process_time() - started, 1),
        "kept": None if kept is None else len(kept),
        "targets": len(result.plan.targets),
    }


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--data", type=Path, help="has mrpc/ and sst2/; default: stdlib alone")
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no run starts")
    parser.add_argument("--precision", default="bf16", choices=("float32", "bf16"))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = {}
    for name in args.tasks:
        if name != "stdlib" and args.data is None:
            continue
        source = "stdlib" if name == "stdlib" else str(args.data / name)
        tasks[name] = load_task(DataConfig(source=source, max_train=SETTINGS[name].max_train))
    environment = {
        "machine": platform.processor() or platform.machine(),
        "threads": 1,
        "precision": args.precision,
        "versions": versions(),
    }
    report: dict[str, Any] = read_json(args.out) if args.out.exists() else {"cells": []}
    report |= {
        "environment": environment,
        "data": report.get("data", {})
        | {name: dict(task.fingerprint) for name, task in tasks.items()},
        "settings": {name: dataclasses.asdict(setting) for name, setting in SETTINGS.items()}
        | {"learning_rate": LEARNING_RATE, "batch_size": 16},
    }
    done = {(cell["task"], cell["seed"], cell["arm"]) for cell in report["cells"]}
    deadline = time.monotonic() + 60 * args.minutes
    for name, seed, arm in cells(list(tasks), args.seeds):
        if (name, seed, arm) in done or time.monotonic() > deadline:
            continue
        report["cells"].append(run_cell(tasks[name], name, seed, arm, args.precision))
        write_json(args.out, report)
        print(json.dumps(report["cells"][-1]), flush=True)


if __name__ == "__main__":
    main()
