"""How long is a training step, and how much memory does it take? Llama-shaped models, all layers.

Random weights, r = 16 on every linear layer but the head, AdamW. Every cell, an arm with or
without activation checkpointing, is a process of its own, so that its peak is its own. A second run
measures what is missing; a cell without enough memory says so.

    peft_bf16      PEFT with adapters of the model's dtype: the rival
    peft_fp32      PEFT's default, adapters in float32: for information
    loradrop       LoRA by loradrop, adapters in float32
    loradrop_bf16  the same with adapters of the model's dtype, as the rival's are
    loradrop_half  LoRA-drop by loradrop at half the parameters: own adapters and shared ones

    python benchmarks/bench_train_step.py --device cuda                    1b and 8b
    python benchmarks/bench_train_step.py --device cuda --size 1b          one of them
    python benchmarks/bench_train_step.py --device cuda --tune             loradrop tune, if needed
    python benchmarks/bench_train_step.py --size tiny                      seconds on a CPU

A cell of loradrop says which backend serves each layer, and by which measurement (`choices`), and
which backends the dispatcher had to do without (`without`, by `--without`); it is measured again
where those are others.

A cell says when the host had launched all of a step (`host_ms`: where that is as long as the step,
the device waited), how long the device was busy in one more step, under PyTorch's profiler, and
with what (`kernels`: name, calls, ms; on a CPU its operators).

Before it is timed, an arm must give the loss of the model without adapters, since B starts at zero,
and a gradient to every B.
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lib import environment, harness, package
from lib.llama import RANK, SIZES, build, choices, tune
from loradrop import LoRAConfig, LoraDropConfig, inject, probe, select, share
from loradrop.files import read_json, write_json
from loradrop.measuring import timing, workers

ALPHA = 32
ARMS = ("peft_bf16", "peft_fp32", "loradrop", "loradrop_bf16", "loradrop_half")
ADAPTER_DTYPES = {"loradrop": "float32", "loradrop_bf16": "base"}
KERNELS, LETTERS = 12, 80  # of the profile that a cell keeps, and of their names
SECONDS, PATIENCE = 10.0, 300.0  # of timed steps; until a cell shows a sign of life
OUT_OF_MEMORY = "out of memory"
LOSS_ERROR = 0.01  # relative: a bfloat16 model is not more exact


def adapt(model: nn.Module, arm: str, batch: dict[str, Tensor]) -> nn.Module:
    """The model with the adapters of an arm."""
    if arm.startswith("peft"):
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        return peft.get_peft_model(model, config, autocast_adapter_dtype=arm == "peft_fp32")
    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    if arm != "loradrop_half":
        inject(model, LoRAConfig(adapter_dtype=ADAPTER_DTYPES[arm], **options))
        return model
    bank = inject(model, LoraDropConfig(budget=0.5, **options))
    with torch.no_grad():
        for B in bank.B:  # as if the warm-up had trained them
            B.normal_(std=0.02)
    scores = probe(model, [{"input_ids": batch["input_ids"][:1]}])
    share(model, select(scores, budget=0.5))
    return model


def able_arms() -> list[str]:
    """The arms that can run here; says why others are left out."""
    if find_spec("peft") is not None:
        return list(ARMS)
    print("peft is left out: PEFT is not installed")
    return [arm for arm in ARMS if of_loradrop(arm)]


def of_loradrop(arm: str) -> bool:
    """Whether its layers are served by the dispatcher."""
    return arm.startswith("loradrop")


def left_out(text: str) -> list[str]:
    """The backends that `--without` names. Ends the script for what is none."""
    names = sorted(filter(None, text.split(",")))
    if unknown := [name for name in names if name not in package.BACKENDS]:
        known = ", ".join(package.BACKENDS)
        sys.exit(f"--without {unknown[0]}: there is no such backend; there are {known}")
    return names


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def check(model: nn.Module, base: float, batch: dict[str, Tensor]) -> None:
    """The loss is the base model's, and every B gets a gradient. Raises AssertionError."""
    loss = model(**batch).loss
    loss.backward()
    off = abs(float(loss.detach()) / base - 1.0)
    assert off <= LOSS_ERROR, f"the loss is off by {off:.2%}, though B is zero"
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    of_b = [name for name in names if "lora_B" in name or name.endswith(".B")]
    assert 2 * len(of_b) == len(names), f"{len(of_b)} of {len(names)} parameters are a B"
    for name in of_b:
        grad = model.get_parameter(name).grad
        assert grad is not None and bool(grad.any()), f"{name} gets no gradient"
    model.zero_grad(set_to_none=True)


def timed(
    step: Callable[[], None], device: str, seconds: float
) -> tuple[list[float], list[float]]:
    """Milliseconds of every step after three that warm up, at least three; and of them those until
    the host had launched all of it.
    """
    times: list[float] = []
    of_host: list[float] = []
    deadline = None
    for done in range(1000):
        start = time.perf_counter()
        step()
        launched = time.perf_counter()
        if device == "cuda":
            torch.cuda.synchronize()
        if done >= 3:
            times.append(1e3 * (time.perf_counter() - start))
            of_host.append(1e3 * (launched - start))
            deadline = deadline or time.monotonic() + seconds
            if len(times) >= 3 and time.monotonic() > deadline:
                break
    return times, of_host


def profiled(step: Callable[[], None], device: str) -> list[tuple[str, int, float]]:
    """(name, calls, ms) of what the device computes in a step, the longest first.

    Empty where the profiler sees nothing of the device.
    """
    on_gpu = device == "cuda"
    every = torch.profiler.ProfilerActivity
    activity = every.CUDA if on_gpu else every.CPU
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    rows = [row for row in profile.key_averages() if row.device_type == kind]
    found = [(row.key[:LETTERS], row.count, round(getattr(row, time_of) / 1e3, 3)) for row in rows]
    return sorted(found, key=lambda row: -row[2])


def run(name: str, arm: str, checkpointing: bool, device: str, seconds: float) -> dict[str, Any]:
    """The figures of one cell."""
    size = SIZES[name]
    model = build(size, device)
    draw = torch.Generator(device).manual_seed(1)
    ids = torch.randint(size.words, (size.batch, size.tokens), device=device, generator=draw)
    batch = {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        base = float(model(**batch).loss)
    adapted = adapt(model, arm, batch).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check(adapted, base, batch)
    parameters = trained(adapted)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, of_host = timed(step, device, seconds)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    low, high = timing.fifths(times)
    kernels = profiled(step, device)
    return {
        "median_ms": round(statistics.median(times), 2),
        "p20_ms": round(low, 2),
        "p80_ms": round(high, 2),
        "host_ms": round(statistics.median(of_host), 2),
        "busy_ms": round(sum(ms for *_, ms in kernels), 2) if kernels else None,
        "kernels": kernels[:KERNELS],
        "steps": len(times),
        "peak_bytes": peak,
        "tokens": size.batch * size.tokens,
        "parameters": sum(parameter.numel() for parameter in parameters),
    }


def work(
    args: argparse.Namespace, key: dict[str, Any], without: set[str], begin: Callable[[str], None]
) -> dict[str, Any]:
    """What a worker does with a cell."""
    begin(workers.TASK)
    served: dict[str, Any] = {}
    try:
        if of_loradrop(key["arm"]):
            served = {"choices": choices(SIZES[key["size"]], args.device, left_out(args.without))}
        found = run(*(key[name] for name in ("size", "arm", "checkpointing")), args.device,
                    args.seconds)  # fmt: skip
        return found | served
    except torch.OutOfMemoryError:
        return {"fault": OUT_OF_MEMORY}
    except AssertionError as error:
        return {"fault": str(error)}
    except Exception as error:
        return {"fault": workers.first_line(error)}


def main(argv: list[str] | None = None) -> int:
    """Ends with 1 where a cell has no figures."""
    parser = harness.options(__doc__)
    parser.add_argument("--size", help=f"of {', '.join(SIZES)}; default: tiny, on CUDA 1b,8b")
    say = "no step: have loradrop tune measure those layers of which nothing is measured here"
    parser.add_argument("--tune", action="store_true", help=say)
    args = parser.parse_args(argv)
    if args.device == "cuda":
        environment.need_cuda("--device cuda")
    if args.worker:
        workers.serve(partial(work, args))
        return 0
    sizes = (args.size or ("tiny" if args.device == "cpu" else "1b,8b")).split(",")
    if unknown := [name for name in sizes if name not in SIZES]:
        sys.exit(f"--size {unknown[0]} is unknown; there are {', '.join(SIZES)}")
    if args.tune:
        faults = [fault for name in sizes if (fault := tune(SIZES[name], args.device))]
        print(*faults, sep="\n")
        return 1 if faults else 0
    path = environment.folder(args.results, args.device) / "bench_train_step.json"
    facts = environment.facts(args.device, args.commit)
    known: list[dict[str, Any]] = read_json(path)["cells"] if path.exists() else []
    wanted = []
    without = left_out(args.without)
    if without:
        print(f"the dispatcher does without {', '.join(without)}")
    for name, kept, arm in itertools.product(sizes, (True, False), able_arms()):
        key = {"size": name, "arm": arm, "checkpointing": kept}
        if args.fresh or not holds(key, known, facts["commit"], without):
            wanted.append(key)
    command = [sys.executable, __file__, "--worker", "--device", args.device]
    command += ["--seconds", str(args.seconds or SECONDS), "--without", args.without]
    failed = False
    answers = workers.answers(command, wanted, PATIENCE, fresh=True)
    for key, answer in zip(wanted, answers, strict=True):
        found = answer.value or {"fault": "; ".join(answer.lost.values())}
        known[:] = [cell for cell in known if not key.items() <= cell.items()]
        if of_loradrop(key["arm"]):
            found = found | {"without": without}
        known.append(key | found | {"commit": facts["commit"]})
        environ = environment.environment(args.device, facts)
        write_json(path, {"environment": environ, "cells": known})
        failed |= found.get("fault", OUT_OF_MEMORY) != OUT_OF_MEMORY
        print(*key.values(), found.get("fault") or f"{found['median_ms']} ms", flush=True)
    return 1 if failed else 0


def holds(
    key: dict[str, Any], cells: list[dict[str, Any]], commit: str, without: list[str]
) -> bool:
    """Whether a cell need not be measured: figures hold for every commit, a fault for its own; and
    either for the dispatcher that had to do without the same backends.
    """
    same = [cell for cell in cells if key.items() <= cell.items()]
    if of_loradrop(key["arm"]):
        same = [cell for cell in same if cell.get("without", []) == without]
    return any("fault" not in cell or cell["commit"] == commit for cell in same)


if __name__ == "__main__":
    sys.exit(main())
