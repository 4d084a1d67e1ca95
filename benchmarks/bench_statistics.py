"""What collecting statistics costs: a training step of MiniLM with it and without, taking turns.

    python benchmarks/bench_statistics.py

LoRA of rank 8 on every linear layer, 16 sentences of 40 tokens, forward, backward and AdamW, one
thread. The clock counts processor time. In every round each kind of step is made once, in an order
of its own; the result is the median over the rounds of a step over the one without statistics in
the same round, with the quartiles.
"""

import argparse
import logging
import random
import statistics
import time
from typing import Any

import torch

from lib import RESULTS
from lib.environment import device_name
from loradrop import inject
from loradrop.command.base_models import build
from loradrop.command.run_config import RunConfig
from loradrop.config import LoRAConfig
from loradrop.files import write_json
from loradrop.machine import versions
from loradrop.statistics.collector import Collector
from loradrop.text.examples import TextTask

RESULT = RESULTS / "cpu" / "bench_statistics.json"
RANK, ROWS, TOKENS, CLASSES = 8, 16, 40, 4
KINDS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "the squared norm": ("sqnorm",),
    "what the spectrum needs": ("sqnorm", "gram_in", "core"),
    "the moment of the input": ("moment",),
}


class Training:
    """One model, and a step of its training."""

    def __init__(self) -> None:
        labels = tuple(map(str, range(CLASSES)))
        task = TextTask("any", "classification", labels, (), (), "accuracy", {})
        self.model, _, missing = build(RunConfig(), task)
        lora = LoRAConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", modules_to_save=tuple(missing)
        )
        self.bank = inject(self.model, lora)
        self.model.train()
        ids = torch.randint(1000, 20000, (ROWS, TOKENS))
        self.batch = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "labels": torch.randint(CLASSES, (ROWS,)),
        }  # fmt: skip
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(self, statistics: tuple[str, ...]) -> float:
        """Seconds of processor time; to attach the collector is no part of a step."""
        collector = None
        if statistics:
            collector = Collector(self.model, self.bank, online=True, statistics=statistics)
        started = time.process_time()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        if collector is not None:
            collector.close_row()
        self.optimizer.zero_grad()
        seconds = time.process_time() - started
        if collector is not None:
            collector.detach()
        return seconds


def quartiles(ratios: list[float]) -> dict[str, float]:
    """The three of them, as parts of a step without statistics."""
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"low": round(low, 4), "median": round(median, 4), "high": round(high, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    logging.getLogger("loradrop").setLevel(logging.ERROR)  # or each step's collector says the same
    torch.set_num_threads(1)
    torch.manual_seed(0)
    training, order = Training(), random.Random(0)
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds + 2):
        kinds = order.sample(list(KINDS), len(KINDS))
        rounds.append({kind: training.step(KINDS[kind]) for kind in kinds})
    rounds = rounds[2:]  # the first ones are slower
    found: dict[str, Any] = {
        kind: quartiles([one[kind] / one["nothing"] for one in rounds]) for kind in list(KINDS)[1:]
    }
    seconds = statistics.median(one["nothing"] for one in rounds)
    setting = {"r": RANK, "rows": ROWS, "tokens": TOKENS, "rounds": args.rounds, "seconds": seconds}
    environment = {"cpu": device_name("cpu"), "threads": 1, "versions": versions()}
    write_json(RESULT, {"environment": environment, "setting": setting, "ratio": found})
    print(found)


if __name__ == "__main__":
    main()
