"""What a method's composition costs: `bank.factors(i)` and its backward pass, beside the layer's.

    python benchmarks/bench_compose.py

For every method with its defaults, a bank of twelve targets 768 -> 3072, as a model of twelve
layers has them. A round composes all twelve, takes gradients back into what the bank owns, and
right after that runs a layer of LoRA forward and backward, on 2,048 tokens in float32. One thread;
the clock counts processor time, so that a busy machine disturbs little. The figure of a method is
the median over its rounds of one composition's part of the layer that ran beside it; methods take
turns, shuffled. The goal is at most 2 %.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from lib import RESULTS
from lib.environment import environment, facts
from loradrop import LoRALinear, methods
from loradrop.bank import AdapterBank
from loradrop.files import write_json
from loradrop.measuring.timing import Work, fifths
from loradrop.scores import Target

OUT = RESULTS / "cpu" / "bench_compose.json"
RANK, RANKS = 8, {"vera": 256}  # VeRA's is in the hundreds as a rule
SIZES = {"M": 2048, "K": 768, "N": 3072, "targets": 12}


def bank_of(method: str, K: int, N: int, targets: int) -> AdapterBank:
    """The bank of the method's defaults for so many targets, with values that are not zero."""
    r = RANKS.get(method, RANK)
    of = [Target(f"layers.{i}.up", "up", K, N, r) for i in range(targets)]
    bank = methods.get(method)().bank(of, [1.0] * targets, [torch.empty(0)] * targets)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(std=0.05)
    return bank


def composition(bank: AdapterBank) -> Work:
    """Composes every target and takes gradients back, as a step of training does."""
    pairs = [bank.factors(i) or () for i in range(len(bank.targets))]
    gradients = [[torch.randn_like(factor) for factor in pair] for pair in pairs]
    wanted = [[n for n, factor in enumerate(pair) if factor.requires_grad] for pair in pairs]

    def call() -> None:
        bank.zero_grad(set_to_none=True)
        for i, which in enumerate(wanted):
            pair = bank.factors(i)
            assert pair is not None
            torch.autograd.backward([pair[n] for n in which], [gradients[i][n] for n in which])

    return call


def layer(M: int, K: int, N: int) -> Work:
    """Forward and backward of a layer of LoRA."""
    module = LoRALinear(K, N, r=RANK)
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
    inputs = (x, *(p for p in module.parameters() if p.requires_grad))
    return lambda: torch.autograd.grad(module(x), inputs, dy)


def seconds(call: Work) -> float:
    """Processor time of one call."""
    start = time.process_time_ns()
    call()
    return (time.process_time_ns() - start) / 1e9


def measure(names: list[str], sizes: dict[str, int], rounds: int) -> list[dict[str, Any]]:
    """A row for each method: microseconds of one composition, and its part of the layer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    M, K, N, targets = sizes.values()
    beside = layer(M, K, N)
    banks = {name: bank_of(name, K, N, targets) for name in names}
    calls = {name: composition(bank) for name, bank in banks.items()}
    for call in (beside, *calls.values()):
        call()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    order = names * rounds
    random.Random(0).shuffle(order)
    for name in order:
        times[name].append((seconds(calls[name]) / targets, seconds(beside)))
    rows = []
    for name, pairs in times.items():
        parts = [composed / whole for composed, whole in pairs]
        low, high = fifths(parts)
        rows.append(
            {
                "method": name,
                "r": banks[name].targets[0].r,
                "parameters": banks[name].trainable,
                "compose_us": round(1e6 * statistics.median(own for own, _ in pairs), 1),
                "layer_us": round(1e6 * statistics.median(whole for _, whole in pairs)),
                "part": round(statistics.median(parts), 6),
                "p20": round(low, 6),
                "p80": round(high, 6),
            }
        )
    return rows


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--methods", nargs="+", choices=methods.available(), help="default: all")
    parser.add_argument("--rounds", type=int, default=25, help="of each method; default: 25")
    parser.add_argument("--commit", help="of the measured code; default: what git says")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    names = args.methods or list(methods.available())
    rows = measure(names, SIZES, args.rounds)
    protocol = {"clock": "process time", "threads": 1, "rounds": args.rounds, "dtype": "float32"}
    about = environment("cpu", facts("cpu", args.commit))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"environment": about, "protocol": protocol | SIZES, "rows": rows})
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
