"""The host's time of a layer call: loradrop's and PEFT's, and the same products without a layer.

    python benchmarks/bench_host.py                     this checkout
    python benchmarks/bench_host.py --before ../old     and another one, in alternation

An adapted `nn.Linear` of 256 x 256 in float32 at rank 8, with one and with 64 tokens: there the CPU
spends as long on Python and PyTorch's dispatcher as on the products. The clock and the processes
are those of `lib/host_time.py`: each keeps the median block, and the result is the median of the
processes. "host" is a call less the products that it cannot do without.
"""

import json
from collections.abc import Callable
from typing import Any

from lib import RESULTS, host_time

OUT = RESULTS / "cpu" / "bench_host.json"
K, RANK, ALPHA = 256, 8, 16
TOKENS = (1, 64)
DIRECTIONS = ("no_grad", "forward", "forward_backward")
PROTOCOL = {"calls": 60, "blocks": 11, "K": K, "N": K, "r": RANK, "dtype": "float32"}

Call = Callable[[], object]


def calls() -> dict[str, Call]:
    """What is timed in a process, by "name tokens direction"."""
    import peft
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import linear

    import loradrop

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
    host_time.use_checkout()
    found = host_time.times(calls(), PROTOCOL["calls"], PROTOCOL["blocks"])
    return {name: host_time.median(of, 3) for name, of in found.items()}


def results(runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each number of tokens and direction: the medians, and what became of them."""
    rows = []
    for m in TOKENS:
        for direction in DIRECTIONS:
            row: dict[str, Any] = {"M": m, "direction": direction}
            cell = f"{m} {direction}"
            for which, processes in runs.items():
                row[which] = {
                    name: host_time.median((p[f"{name} {cell}"] for p in processes), 1)
                    for name in ("loradrop", "peft", "products")
                }
                row[which]["host"] = round(row[which]["loradrop"] - row[which]["products"], 1)
            if "before" in runs:
                for what in ("loradrop", "host"):
                    row[f"{what}_ratio"] = round(row["after"][what] / row["before"][what], 3)
            rows.append(row)
    return rows


def main() -> None:
    args = host_time.arguments(__doc__, OUT, 9, action="store_true")
    if args.measure:
        print(json.dumps(measure()))
        return
    checkouts = host_time.checkouts(args.before)
    runs: dict[str, list[dict[str, float]]] = {which: [] for which in checkouts}
    for _ in range(args.processes):
        for which, checkout in checkouts.items():
            runs[which].append(host_time.in_a_process(__file__, checkout))
    host_time.write(args, PROTOCOL, "us", results(runs))


if __name__ == "__main__":
    main()
