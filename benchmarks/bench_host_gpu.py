"""The host's time of a layer call on a GPU, measured without one.

    python benchmarks/bench_host_gpu.py                     this checkout
    python benchmarks/bench_host_gpu.py --before ../old     and another one, in alternation

Python, PyTorch's dispatcher and Triton's own launcher do all that they do for an H100, and where
the driver would launch there is nothing (`lib/no_device.py`). An adapted layer of 64 x 64 in
bfloat16 at rank 16 with float32 adapters. PEFT's beside it, all in one type and on a single token:
its products run on the CPU, and take little there, nor does its Python depend on their size.
(Those of `eager` and `thin` would run there too, so they are not here.) The clock and the processes
are those of `lib/host_time.py`: each measures one backend and PEFT and keeps the fastest block,
since a busy machine only slows; the result is the median over them of the ratio to PEFT's time.

What is not in it: the driver's own time for a launch, cuBLAS's, the caching allocator's, and the
extension's, whose functions are replaced. `launches` counts kernels of Triton and of the extension,
`casts` the other operations of PyTorch that launch a kernel.
"""

import json
from collections.abc import Callable
from typing import Any

from lib import RESULTS, host_time, no_device

OUT = RESULTS / "cpu" / "bench_host_gpu.json"
K, RANK, ALPHA = 64, 16, 32
BACKENDS = {"triton": 128, "overlap": 128, "decode": 16}  # and tokens
DIRECTIONS = ("no_grad", "forward_backward", "recomputed")  # the last under checkpointing
PROTOCOL = {"calls": 40, "blocks": 11, "K": K, "N": K, "r": RANK, "dtype": "bfloat16"}
FREE = {"new_empty", "empty_strided"}
FREE |= {"permute", "alias", "t", "view", "detach", "_unsafe_view"}


def measure(backend: str) -> dict[str, Any]:
    """By "layer direction": µs of processor time; and what one call of ours launches."""
    host_time.use_checkout()
    launched = no_device.pretend("overlap" if backend == "decode" else backend)
    import peft
    import torch
    from torch import Tensor, nn
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.checkpoint import checkpoint

    import loradrop

    m = BACKENDS[backend]
    half = torch.bfloat16
    ours = loradrop.LoRALinear(K, K, r=RANK, lora_alpha=ALPHA, bias=False, dtype=half)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    frozen = nn.Sequential(nn.Linear(K, K, bias=False))
    theirs = peft.inject_adapter_in_model(config, frozen)[0]

    def of(layer: nn.Module, rows: int, dtype: torch.dtype) -> list[Callable[[], object]]:
        x = torch.randn(rows, K, dtype=dtype, requires_grad=True)
        dy = torch.randn(rows, K, dtype=dtype)
        inputs = (x, *(p for p in layer.parameters() if p.requires_grad))

        @torch.no_grad()
        def no_grad() -> object:
            return layer(x)

        def again() -> object:
            y: Tensor = checkpoint(layer, x, use_reentrant=False)
            return torch.autograd.grad(y, inputs, dy)

        return [no_grad, lambda: torch.autograd.grad(layer(x), inputs, dy), again]

    class Counted(TorchDispatchMode):
        kernels = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.kernels += function.name().split("::")[1].split(".")[0] not in FREE
            return function(*args, **(kwargs or {}))

    calls, counts = {}, {}
    every = {"loradrop": of(ours, m, half), "peft": of(theirs, 1, torch.float32)}
    for name, three in every.items():
        calls |= {f"{name} {d}": c for d, c in zip(DIRECTIONS, three, strict=True)}
    for name, call in calls.items():
        call()
        before = launched() + sum(no_device.LAUNCHED.values())
        with Counted() as counted:
            call()
        after = launched() + sum(no_device.LAUNCHED.values())
        counts[name] = {"launches": after - before, "casts": counted.kernels}
    times = host_time.times(calls, PROTOCOL["calls"], PROTOCOL["blocks"])
    return {"us": {n: min(of) for n, of in times.items()}, "counts": counts}


def results(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """A row for each backend and direction."""
    rows = []
    for backend in BACKENDS:
        for direction in DIRECTIONS:
            row: dict[str, Any] = {"backend": backend, "M": BACKENDS[backend], "call": direction}
            for which, found in runs.items():
                us = [run["us"] for run in found[backend]]
                ours, theirs = f"loradrop {direction}", f"peft {direction}"
                row[which] = found[backend][0]["counts"][ours] | {
                    "us": host_time.median((one[ours] for one in us), 1),
                    "over_peft": host_time.median((o[ours] / o[theirs] for o in us), 2),
                }
            if "before" in runs:
                row["ratio"] = round(row["after"]["over_peft"] / row["before"]["over_peft"], 2)
            rows.append(row)
    return rows


def main() -> None:
    args = host_time.arguments(__doc__, OUT, 5, choices=BACKENDS)
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    checkouts = host_time.checkouts(args.before)
    runs: dict[str, Any] = {which: {name: [] for name in BACKENDS} for which in checkouts}
    for _ in range(args.processes):
        for backend in BACKENDS:
            for which, checkout in checkouts.items():
                runs[which][backend].append(host_time.in_a_process(__file__, checkout, backend))
    host_time.write(args, PROTOCOL, "calls", results(runs))


if __name__ == "__main__":
    main()
