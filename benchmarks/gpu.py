"""Everything that is measured on a GPU, step by step, each within ten minutes.

    python benchmarks/gpu.py                    all steps, in their order
    python benchmarks/gpu.py quick full         these
    python benchmarks/gpu.py --results DIR      writes into another folder than benchmarks/results

A step that runs out of time is stopped and keeps what it has; the same command goes on from there.
The last three steps need no GPU and read benchmarks/results alone: with another folder they are
left out.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from machine import RESULTS, ROOT

BENCH = ("bench_lora_linear.py", "--device", "cuda")
_SMALL = ("-m", "pytest", "-q", "tests/test_gpu.py", "-k", "test_small")
_SANITIZE = {tool: ("--tool", tool, "--error-exitcode", "9") for tool in (
    "memcheck", "racecheck", "synccheck"
)}  # fmt: skip
STEPS: dict[str, tuple[str, ...]] = {
    "risk_gemm": ("risk_gemm.py",),
    "risk_warps": ("risk_gemm.py", "--warps"),
    "risk_pdl": ("risk_pdl.py",),
    "risk_addmm": ("risk_addmm.py",),
    "tests": ("-m", "pytest", "-q", "-m", "gpu", "tests"),
    "memcheck": _SANITIZE["memcheck"],
    "racecheck": _SANITIZE["racecheck"],
    "synccheck": _SANITIZE["synccheck"],
    "quick": (*BENCH, "--grid", "quick"),
    "full": BENCH,
    "parts": ("bench_parts.py",),
    "probe": ("bench_probe.py", "--device", "cuda"),
    "train": ("bench_train_step.py", "--device", "cuda"),
    "measured": ("measured.py",),
    "tables": ("tables.py",),
    "roofline": ("roofline.py",),
}
_LIMITS = {"risk_warps": 120.0}  # a kernel that hangs must not take the time of the rest
_OF_RESULTS = ("measured", "tables", "roofline")


def command(step: str, results: Path, commit: str | None) -> list[str]:
    """What runs."""
    first, *rest = STEPS[step]
    if step in _SANITIZE:
        return ["compute-sanitizer", *STEPS[step], sys.executable, *_SMALL]
    if step == "tests":
        return [sys.executable, first, *rest]
    script = [sys.executable, str(ROOT / "benchmarks" / first), *rest]
    if step in _OF_RESULTS:
        return script
    return [*script, "--results", str(results), *(["--commit", commit] if commit else [])]


def run(argv: Sequence[str], seconds: float) -> int | None:
    """The exit status of a command, None where its time ran out; its children end with it."""
    with subprocess.Popen(argv, cwd=ROOT, start_new_session=True) as process:
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            return None


def main() -> int:
    """Ends with 1 where a step failed or ran out of time."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for each step")
    args = parser.parse_args()
    if unknown := [step for step in args.steps if step not in STEPS]:
        sys.exit(f"{unknown[0]} is no step; there are {', '.join(STEPS)}")
    outcome = {}
    elsewhere = args.results.resolve() != RESULTS
    steps = args.steps or [step for step in STEPS if not (elsewhere and step in _OF_RESULTS)]
    for step in steps:
        start, limit = time.monotonic(), _LIMITS.get(step, args.limit)
        status = run(command(step, args.results.resolve(), args.commit), min(args.limit, limit))
        said = {0: "done", None: "out of time: run it again to go on"}.get(status, "FAILED")
        outcome[step] = f"{said} ({time.monotonic() - start:.0f} s)"
        print(f"{step}: {outcome[step]}", flush=True)
    print(*(f"{step:<12} {said}" for step, said in outcome.items()), sep="\n")
    return 0 if all(said.startswith("done") for said in outcome.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
