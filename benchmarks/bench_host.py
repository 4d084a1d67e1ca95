"""The host's time of a layer call: loradrop's and PEFT's, and the same products without a layer.

    python benchmarks/bench_host.py                     this checkout
    python benchmarks/bench_host.py --before ../old     and another one, in alternation

An adapted `nn.Linear` of 256 x 256 in float32 at rank 8, with one and with 64 tokens: there the CPU
spends as long on Python and PyTorch's dispatcher as on the products. One thread; the clock counts
processor time, so that a busy machine disturbs little. Every process measures all calls in blocks,
shuffled, and keeps the median block; the result is the median of the processes. "host" is a call
less the products that it cannot do without.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "cpu" / "bench_host.json"
K, RANK, ALPHA = 256, 8, 16
TOKENS = (1, 64)
DIRECTIONS = ("no_grad", "forward", "forward_backward")
CALLS, BLOCKS = 60, 11  # in a process: calls in a block, blocks of each call

Call = Callable[[], object]


def calls() -> dict[str, Call]:
    """What is timed in a process, by "name tokens direction"."""
    import peft
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import linear

    import loradrop

    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours = loradrop.LoRALinear(K, K, r=RANK, lora_alpha=ALPHA)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(K, K)))[0]
    weight, bias, s = ours.weight.detach(), ours.bias.detach(), ALPHA / RANK
    a, b = torch.randn(RANK, K), torch.randn(K, RANK)

    def products(x: Tensor) -> tuple[Tensor, Tensor]:
        h = linear(x, a)
        return linear(x, weight, bias).addmm_(h, b.t(), alpha=s), h

    def products_and_gradients(x: Tensor, dy: Tensor) -> None:
        _, h = products(x)
        dh = torch.addmm(h, dy, b, beta=0, alpha=s)
        torch.mm(dy, weight).addmm_(dh, a)
        torch.mm(dh.t(), x)
        torch.addmm(b, dy.t(), h, beta=0, alpha=s)

    def of(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, inputs: Any) -> list[Call]:
        @torch.no_grad()
        def no_grad() -> object:
            return layer(x)

        return [no_grad, lambda: layer(x), lambda: torch.autograd.grad(layer(x), inputs, dy)]

    found: dict[str, Call] = {}
    for m in TOKENS:
        x, dy = torch.randn(m, K, requires_grad=True), torch.randn(m, K)
        bare = x.detach()
        forward = lambda bare=bare: products(bare)  # noqa: E731
        by_hand = [forward, forward, lambda bare=bare, dy=dy: products_and_gradients(bare, dy)]
        every = {"products": by_hand}
        for name, layer in (("loradrop", ours), ("peft", theirs)):
            inputs = (x, *(p for p in layer.parameters() if p.requires_grad))
            assert len(inputs) == 3, f"{name} trains more than A and B"
            every[name] = of(layer, x, dy, inputs)
        for name, three in every.items():
            found |= {f"{name} {m} {d}": c for d, c in zip(DIRECTIONS, three, strict=True)}
    return found


def measure() -> dict[str, float]:
    """Microseconds of processor time of each call, the median over blocks."""
    found, times = calls(), {}
    for name, call in found.items():
        times[name] = []
        for _ in range(CALLS):
            call()
    order = list(found) * BLOCKS
    random.Random(0).shuffle(order)
    for name in order:
        call, start = found[name], time.process_time_ns()
        for _ in range(CALLS):
            call()
        times[name].append((time.process_time_ns() - start) / CALLS / 1e3)
    return {name: statistics.median(of) for name, of in times.items()}


def in_a_process(checkout: Path) -> dict[str, float]:
    """`measure` with the loradrop of that checkout."""
    one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, __file__, "--measure"],
        env=os.environ | one | {"PYTHONPATH": str(checkout)},
        cwd=checkout, check=True, capture_output=True, text=True,
    )  # fmt: skip
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def commit(checkout: Path) -> str:
    """Its short hash, marked where files differ from it."""
    git = "git", "describe", "--always", "--dirty", "--exclude=*"
    return subprocess.run(git, cwd=checkout, capture_output=True, text=True).stdout.strip()


def results(runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each number of tokens and direction: the medians, and what became of them."""
    rows = []
    for m in TOKENS:
        for direction in DIRECTIONS:
            row: dict[str, Any] = {"M": m, "direction": direction}
            cell = f"{m} {direction}"
            for which, processes in runs.items():
                row[which] = {
                    name: round(statistics.median(p[f"{name} {cell}"] for p in processes), 1)
                    for name in ("loradrop", "peft", "products")
                }
                row[which]["host"] = round(row[which]["loradrop"] - row[which]["products"], 1)
            if "before" in runs:
                for what in ("loradrop", "host"):
                    row[f"{what}_ratio"] = round(row["after"][what] / row["before"][what], 3)
            rows.append(row)
    return rows


def write(
    out: Path,
    checkouts: dict[str, Path],
    protocol: dict[str, Any],
    key: str,
    rows: list[dict[str, Any]],
) -> None:
    """The result file, with the rows under `key`, and the rows themselves on stdout."""
    from lib.environment import device_name  # this checkout's, so not in `--measure`
    from loradrop.env import report

    facts = report()
    facts = {name: facts[name] for name in ("python", "packages", "cpu")}
    facts["cpu"]["name"] = device_name("cpu")
    environment = facts | {"commits": {which: commit(path) for which, path in checkouts.items()}}
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = {"environment": environment, "protocol": protocol, key: rows}
    out.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="a checkout of loradrop to compare with")
    parser.add_argument("--processes", type=int, default=9, help="of each checkout; default: 9")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", action="store_true", help="one process: print and end")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure()))
        return
    checkouts = {"before": args.before.resolve()} if args.before else {}
    checkouts["after"] = ROOT
    runs: dict[str, list[dict[str, float]]] = {which: [] for which in checkouts}
    for _ in range(args.processes):
        for which, checkout in checkouts.items():
            runs[which].append(in_a_process(checkout))
    protocol = {"clock": "process time", "processes": args.processes, "calls": CALLS,
                "blocks": BLOCKS, "K": K, "N": K, "r": RANK, "dtype": "float32"}  # fmt: skip
    write(args.out, checkouts, protocol, "us", results(runs))


if __name__ == "__main__":
    main()
