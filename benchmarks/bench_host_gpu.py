"""The host's time of a layer call on a GPU, measured without one.

    python benchmarks/bench_host_gpu.py                     this checkout
    python benchmarks/bench_host_gpu.py --before ../old     and another one, in alternation

Python, PyTorch's dispatcher and Triton's own launcher do all that they do for an H100, and where
the driver would launch there is nothing (`lib/no_device.py`). An adapted layer of 64 x 64 in
bfloat16 at rank 16 with float32 adapters. PEFT's beside it, all in one type and on a single token:
its products run on the CPU, and take little there, nor does its Python depend on their size.
(Those of `eager` and `thin` would run there too, so they are not here.) One thread; the clock
counts processor time. Each process measures one backend and PEFT in blocks, shuffled, and keeps the
fastest block, since a busy machine only slows; the result is the median over the processes of the
ratio to PEFT's time.

What is not in it: the driver's own time for a launch, cuBLAS's, the caching allocator's, and the
extension's, whose functions are replaced. `launches` counts kernels of Triton and of the extension,
`casts` the other operations of PyTorch that launch a kernel.
"""

import argparse
import importlib.util
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
OUT = ROOT / "benchmarks" / "results" / "cpu" / "bench_host_gpu.json"
K, RANK, ALPHA = 64, 16, 32
BACKENDS = {"triton": 128, "overlap": 128, "decode": 16}  # and tokens
DIRECTIONS = ("no_grad", "forward_backward", "recomputed")  # the last under checkpointing
CALLS, BLOCKS = 40, 11
FREE = {"new_empty", "empty_like", "permute", "alias", "t", "view", "detach", "_unsafe_view"}


def measure(backend: str) -> dict[str, Any]:
    """By "layer direction": µs of processor time; and what one call of ours launches."""
    import peft
    import torch
    from torch import Tensor, nn
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.checkpoint import checkpoint

    torch.set_num_threads(1)
    torch.manual_seed(0)
    # By its path: the package `lib` would bring this checkout's loradrop with it.
    spec = importlib.util.spec_from_file_location("no_device", ROOT / "benchmarks/lib/no_device.py")
    assert spec is not None and spec.loader is not None
    no_device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(no_device)
    launched = no_device.pretend("overlap" if backend == "decode" else backend)
    import loradrop

    assert Path(loradrop.__file__).is_relative_to(Path.cwd()), loradrop.__file__
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
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(CALLS):
            call()
        before = launched() + sum(no_device.LAUNCHED.values())
        with Counted() as counted:
            call()
        after = launched() + sum(no_device.LAUNCHED.values())
        counts[name] = {"launches": after - before, "casts": counted.kernels}
    order = list(calls) * BLOCKS
    random.Random(0).shuffle(order)
    for name in order:
        call, start = calls[name], time.process_time_ns()
        for _ in range(CALLS):
            call()
        times[name].append((time.process_time_ns() - start) / CALLS / 1e3)
    return {"us": {n: min(of) for n, of in times.items()}, "counts": counts}


def in_a_process(checkout: Path, backend: str) -> dict[str, Any]:
    """`measure` with the loradrop of that checkout."""
    path = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", backend]
    done = subprocess.run(
        command, env=os.environ | path, cwd=checkout, check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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
                    "us": round(statistics.median(one[ours] for one in us), 1),
                    "over_peft": round(statistics.median(o[ours] / o[theirs] for o in us), 2),
                }
            if "before" in runs:
                row["ratio"] = round(row["after"]["over_peft"] / row["before"]["over_peft"], 2)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="a checkout of loradrop to compare with")
    parser.add_argument("--processes", type=int, default=5, help="of each checkout; default: 5")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", choices=BACKENDS, help="one process: print and end")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    from bench_host import write

    checkouts = {"before": args.before.resolve()} if args.before else {}
    checkouts["after"] = ROOT
    runs: dict[str, Any] = {which: {name: [] for name in BACKENDS} for which in checkouts}
    for _ in range(args.processes):
        for backend in BACKENDS:
            for which, checkout in checkouts.items():
                runs[which][backend].append(in_a_process(checkout, backend))
    protocol = {"clock": "process time", "processes": args.processes, "calls": CALLS,
                "blocks": BLOCKS, "K": K, "N": K, "r": RANK, "dtype": "bfloat16"}  # fmt: skip
    write(args.out, checkouts, protocol, "calls", results(runs))


if __name__ == "__main__":
    main()
