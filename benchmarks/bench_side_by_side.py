"""The same script with PEFT's LoRA and with LoRA-drop: lines, seconds, memory, bytes.

    python benchmarks/bench_side_by_side.py

Two tasks: `examples/classification.py` (MiniLM, transformers' Trainer) and `examples/sft_trl.py` (a
random Llama, TRL's SFTTrainer), each beside its twin in `side_by_side/`, which has PEFT's LoRA of
the same rank on the same layers. A script is run as it is, in a process of its own, one thread, on
a CPU; twins take turns, in an order that is drawn for every round. The clock counts processor time
from the end of a step to the end of the next, so that data and callbacks count too. Memory is the
highest resident set since the first step, above the one at its start. At the start of training
both twins have to give one batch the same loss, and train equally many elements.
"""

import argparse
import difflib
import json
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, trainer

from lib import RESULTS, ROOT
from lib.environment import environment, facts
from loradrop.command.base_models import resolve_model
from loradrop.command.run_config import MINILM
from loradrop.files import read_json, write_json

OUT = RESULTS / "cpu" / "bench_side_by_side.json"
EXAMPLES, PEFT = ROOT / "examples", ROOT / "benchmarks" / "side_by_side"
SIDES = {"PEFT": PEFT, "loradrop": EXAMPLES}
TASKS = ("classification", "sft_trl")
STEPS, BATCH, SENTENCES = 40, 16, 8
DECODER = {"layers": 6, "width": 384}
WARMUP = 0.1  # of the steps: LoraDropConfig's default
ROUNDING = 1e-4  # of a loss in float32
ADAPTERS = ("adapter_model.safetensors", "loradrop_adapter/adapter.safetensors")


def code(script: Path) -> list[str]:
    """The lines of a script below its docstring, without empty ones."""
    lines = script.read_text(encoding="utf-8").split('"""', 2)[2].splitlines()
    return [line for line in lines if line.strip()]


def changed(before: list[str], after: list[str]) -> list[str]:
    """The lines of `after` that are new, or other than those of `before`."""
    return [line[2:] for line in difflib.ndiff(before, after) if line.startswith("+ ")]


def resident(which: str) -> int:
    """Bytes of memory by /proc: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if which in line))


class Stopwatch(TrainerCallback):
    """Looks on at whatever Trainer a script makes."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.found: dict[str, Any] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **objects: Any
    ) -> None:
        rows = objects["train_dataloader"]
        names = "input_ids", "attention_mask", "label", "labels"
        some = [{k: v for k, v in rows.dataset[i].items() if k in names} for i in range(4)]
        batch, training = rows.collate_fn(some), model.training
        with torch.no_grad():
            loss = model.eval()(**batch).loss
        model.train(training)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.found = {"loss": float(loss), "trained": trained}
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak
        self.found["rss_before"] = resident("VmRSS")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.process_time())

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        left = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.found |= {"left": left, "rss_rise": resident("VmHWM") - self.found["rss_before"]}


def run(script: Path, arguments: list[str], folder: Path) -> dict[str, Any]:
    """What one run of a script took, in this process."""
    torch.set_num_threads(1)
    watch = Stopwatch()
    trainer.DEFAULT_CALLBACKS.append(watch)
    sys.path.insert(0, str(EXAMPLES))  # both have their tiny models from there
    sys.argv = [str(script), *arguments, "--out", str(folder)]
    runpy.run_path(str(script), run_name="__main__")
    steps = [b - a for a, b in zip(watch.ends, watch.ends[1:], strict=False)]
    (checkpoint,) = folder.glob("checkpoint-*")
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    adapter = next(checkpoint / name for name in ADAPTERS if (checkpoint / name).exists())
    sizes = {
        "checkpoint": sum(file.stat().st_size for file in files),
        "optimizer": (checkpoint / "optimizer.pt").stat().st_size,
        "adapter": adapter.stat().st_size,
    }
    return watch.found | sizes | {"steps": steps}


def started(script: Path, arguments: list[str]) -> dict[str, Any]:
    """The same in a process of its own. Raises RuntimeError with what it said where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, __file__, "--worker", str(script), str(answer), *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{script} failed:\n{done.stderr[-2000:]}")
        return read_json(answer)


def arguments_of(task: str, folder: Path, steps: int, tiny_sizes: bool) -> list[str]:
    """The options of a task's scripts: its model and rows, for so many steps."""
    sys.path.insert(0, str(EXAMPLES))
    import tiny

    rows = steps * BATCH
    if task == "sft_trl":
        model = tiny.decoder(folder / task, **({} if tiny_sizes else DECODER))
        data = tiny.answers(folder / "answers.jsonl", rows, SENTENCES)
    else:
        model = tiny.encoder(folder / task) if tiny_sizes else Path(resolve_model(MINILM))
        data = tiny.reviews(folder / "reviews.csv", rows * 5 // 4, SENTENCES)  # a fifth is held out
    pairs = {"--model": model, "--data": data, "--epochs": 1, "--batch": BATCH}
    return [str(part) for pair in pairs.items() for part in pair]


def summary(runs: list[dict[str, Any]], warm: int) -> dict[str, Any]:
    """A side's figures over the rounds; the first step is slower, and belongs to none."""
    ours = {key: runs[0][key] for key in ("trained", "left", "checkpoint", "optimizer", "adapter")}
    return ours | {
        "rss_rise": round(statistics.median(run["rss_rise"] for run in runs)),
        "warmup_s": statistics.median(statistics.median(run["steps"][: warm - 1]) for run in runs),
        "step_s": statistics.median(statistics.median(run["steps"][warm:]) for run in runs),
        "all_s": statistics.median(sum(run["steps"]) for run in runs),
    }


def ratios(runs: dict[str, list[dict[str, Any]]], warm: int) -> dict[str, list[float]]:
    """Ours over PEFT's, round by round."""
    of = {
        side: [(statistics.median(run["steps"][warm:]), sum(run["steps"])) for run in runs[side]]
        for side in SIDES
    }
    pairs = zip(of["loradrop"], of["PEFT"], strict=True)
    step, all_ = zip(*((a / c, b / d) for (a, b), (c, d) in pairs), strict=True)
    return {"step": [*step], "all": [*all_]}


def require_equal(task: str, sides: dict[str, dict[str, Any]]) -> None:
    """Raises ValueError unless both train the same thing from the same start."""
    one, other = sides["PEFT"], sides["loradrop"]
    if one["trained"] != other["trained"] or abs(one["loss"] - other["loss"]) > ROUNDING:
        raise ValueError(
            f"{task}: PEFT begins with {one['trained']:,} elements at a loss of {one['loss']:.5f}, "
            f"loradrop with {other['trained']:,} at {other['loss']:.5f}"
        )


def measure(task: str, rounds: int, steps: int, tiny_sizes: bool = False) -> dict[str, Any]:
    """The row of a task."""
    order, runs = random.Random(0), {side: list[dict[str, Any]]() for side in SIDES}
    warm = max(3, round(WARMUP * steps))
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_of(task, Path(folder), steps, tiny_sizes)
        for number in range(rounds):
            for side in order.sample(list(SIDES), len(SIDES)):
                runs[side].append(started(SIDES[side] / f"{task}.py", arguments))
                print(f"{task} {number + 1}/{rounds} {side}", flush=True)
            require_equal(task, {side: of[-1] for side, of in runs.items()})
    lines = changed(*(code(folder / f"{task}.py") for folder in SIDES.values()))
    sides = {side: summary(of, warm) for side, of in runs.items()}
    return {"task": task, "lines": lines, "sides": sides, "ratio": ratios(runs, warm)}


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--commit", help="of the measured code; default: what git says")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        script, answer, *arguments = args.worker
        return write_json(answer, run(Path(script), arguments, Path("out").resolve()))
    protocol = {"clock": "process time", "threads": 1, "rounds": args.rounds, "steps": args.steps}
    protocol |= {"batch": BATCH, "memory": "resident set, peak above the start of training"}
    about = environment("cpu", facts("cpu", args.commit))
    rows = [measure(task, args.rounds, args.steps) for task in TASKS]
    write_json(args.out, {"environment": about, "protocol": protocol, "rows": rows})
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
