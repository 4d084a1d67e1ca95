"""Everything that is measured and tested on a GPU, in the order of what it tells.

    python benchmarks/gpu.py                  all steps, for 570 seconds
    python benchmarks/gpu.py smoke quick      these
    python benchmarks/gpu.py --results DIR    writes into another folder than benchmarks/results

It stops by itself when the time is over, and the same command goes on where it stopped. Every cell
is written when it is there; what became of every step stands in gpu.json beside the results. First
come two steps whatever is asked for: `build` builds the CUDA kernels where they are not built and
there is nvcc; `smoke` is the smoke test, and a backend that fails it is left out of everything
after it. `tune` has `loradrop tune` measure the layers of the training steps where nothing is
measured on this device, so that a step does not time a guess.
A step that is done, or has failed, at this commit is not run again but with `--again`.
Afterwards, `make readme` makes the tables, on any machine.
"""

import argparse
import collections
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import smoke
from lib import RESULTS, ROOT
from loradrop.files import read_json, write_json

LEAST = 20.0  # seconds below which no step is begun
DONE, FAILED, SKIPPED, CUT = "done", "failed", "skipped", "cut off"
TESTS = ("test_gpu", "test_cuda", "test_linear", "test_linear_use", "test_statistics")
TESTS += ("test_compiled",)
SANITIZERS = ("memcheck", "racecheck", "synccheck")
BENCHES = {
    "tune": "bench_train_step --tune",
    "quick": "bench_lora_linear --grid quick",
    "parts": "bench_parts",
    "full": "bench_lora_linear --ranks 16",
    "train": "bench_train_step --size 1b",
    "probe": "bench_probe",
    "ranks": "bench_lora_linear",
    "8b": "bench_train_step --size 8b",
    "compiled": "bench_lora_linear --grid compiled",
}
STEPS = ("build", "smoke", "tune", "quick", "parts", "full", "train", "tests", "sanitizers")
STEPS += ("probe", "ranks", "8b", "compiled")  # torch.compile may take what is left of the time
FIRST = ("build", "smoke")  # whatever is asked for
TUNED = ("train", "8b")  # ask for `tune`
OF_THE_MACHINE = ("build", "tune")  # what they made is not there on the next machine
EXTENSION = "loradrop._C"
_FACTS = """
import json, sys
from pathlib import Path
from lib import environment
environment.need_cuda("gpu.py")
facts = environment.facts("cuda", sys.argv[1] or None)
print(json.dumps([environment.folder(Path("."), "cuda").name, facts]))
"""


class Command(NamedTuple):
    """One command of a step."""

    name: str  # under which its outcome is recorded
    argv: list[str]
    needs: tuple[str, ...] = ()  # packages
    tools: tuple[str, ...] = ()  # other programs than that of the command
    limit: float = float("inf")  # seconds


class Outcome(NamedTuple):
    """What became of a command, and why."""

    outcome: str
    reason: str = ""


def facts(commit: str | None) -> tuple[str, dict[str, str]]:
    """The folder of this GPU's results, and the facts of the run; asked in a process of its own."""
    command = [sys.executable, "-c", _FACTS, commit or ""]
    folder = ROOT / "benchmarks"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        sys.exit((done.stderr.strip().splitlines() or ["PyTorch does not start"])[-1])
    folder, known = json.loads(done.stdout.splitlines()[-1])
    return folder, known


def plan(step: str, results: Path, commit: str, left_out: Iterable[str]) -> list[Command]:
    """The commands of a step: none where there is nothing to do."""
    names = sorted(left_out)
    if step == "build":
        importlib.invalidate_caches()
        if importlib.util.find_spec(EXTENSION) is not None:
            return []
        argv = ["env", "LORADROP_BUILD_CUDA=1", sys.executable, "setup.py", "build_ext"]
        packages = ("setuptools", "pybind11", "ninja")
        return [Command(step, [*argv, "--inplace"], packages, ("nvcc",), limit=240.0)]
    if step in BENCHES:
        script, *more = BENCHES[step].split()
        argv = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--device", "cuda"]
        argv += ["--results", str(results), "--commit", commit, "--without", ",".join(names), *more]
        needs = ("transformers",) if "train" in script else ()
        return [Command(step, argv, (*needs, "typer") if step == "tune" else needs)]
    pytest = [sys.executable, "-m", "pytest", "-q"]
    spared = [f"not ([{name} or -{name})" for name in names]  # as tests are parametrised
    if step == "tests":
        parallel = importlib.util.find_spec("xdist") is not None
        many = ["-n", str(min(12, os.cpu_count() or 1))] if parallel else []
        pytest += [*many, "-k", " and ".join(spared)] if spared else many
        files = [f"tests/{name}.py" for name in TESTS]
        return [Command(file, [*pytest, file], ("pytest",)) for file in files]
    if step == "sanitizers":
        tests = [*pytest, "tests/test_gpu.py", "-k", " and ".join(["test_small", *spared])]
        tool = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
        return [Command(n, [*tool, n, *tests], ("pytest",), limit=180.0) for n in SANITIZERS]
    return [Command("smoke", [sys.executable])]


def lacking(command: Command) -> str | None:
    """Why a command cannot run here, or None."""
    if missing := [name for name in command.needs if importlib.util.find_spec(name) is None]:
        return f"{missing[0]} is not installed"
    for tool in (command.argv[0], *command.tools):
        if shutil.which(tool) is None:
            return f"{tool} is not on the PATH"
    return None


def surroundings() -> dict[str, str]:
    """A child's environment: the checkout is importable, and Triton keeps what it compiled."""
    cache = {"TRITON_CACHE_DIR": str(Path.home() / ".triton" / "cache")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return cache | os.environ | {"PYTHONPATH": path}


def run(argv: Sequence[str], seconds: float) -> Outcome:
    """Runs a command, its output passed on; its children end with it."""
    lines: collections.deque[str] = collections.deque(maxlen=50)

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())

    pipe, both = subprocess.PIPE, subprocess.STDOUT
    process = subprocess.Popen(
        argv, cwd=ROOT, env=surroundings(), stdout=pipe, stderr=both, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Outcome(CUT, f"after {seconds:.0f} s")
    finally:
        _end(process)
        listener.join(2.0)
    last = next((line for line in reversed(lines) if line), f"status {status}")
    return Outcome(DONE) if status == 0 else Outcome(FAILED, last[:300])


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process with its whole group, at once if it does not go by itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=3.0)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


class Record:
    """gpu.json: the machine, the backends that are left out, and the outcome of every command."""

    def __init__(self, path: Path, facts: dict[str, str]) -> None:
        self.path, self.commit = path, facts["commit"]
        self.report: dict[str, Any] = read_json(path) if path.exists() else {"steps": {}}
        self.report["environment"] = facts
        if self.report.get("smoke", {}).get("commit") != self.commit:
            self.report["smoke"] = {"commit": self.commit, "left_out": {}}
        self.left_out: dict[str, str] = self.report["smoke"]["left_out"]  # backend -> why

    def finished(self, name: str) -> Outcome | None:
        """The outcome of a command that need not run again at this commit."""
        known = self.report["steps"].get(name, {})
        ends = (FAILED,) if name in OF_THE_MACHINE else (DONE, FAILED)
        ended = known.get("outcome") in ends and known["commit"] == self.commit
        return Outcome(known["outcome"], known["reason"]) if ended else None

    def forget(self, name: str) -> None:
        """Lets a command run again."""
        self.report["steps"].pop(name, None)

    def note(self, name: str, found: Outcome, seconds: float = 0.0) -> None:
        """Writes an outcome."""
        stamp = {"seconds": round(seconds, 1), "commit": self.commit}
        self.report["steps"][name] = found._asdict() | stamp
        write_json(self.path, self.report)


def perform(command: Command, record: Record, seconds: float) -> Outcome:
    """Runs one command if it can run here, and writes what became of it."""
    # Until it has ended otherwise it counts as cut off: this process itself may be killed.
    record.note(command.name, Outcome(CUT, "with the whole run"))
    start = time.monotonic()
    if reason := lacking(command):
        found = Outcome(SKIPPED, reason)
    elif command.name == "smoke":
        found = smoke_test(record)
    else:
        found = run(command.argv, min(seconds, command.limit))
    if command.name == "build" and found.outcome == DONE:
        record.forget("smoke")  # it has not seen what is there now
    record.note(command.name, found, time.monotonic() - start)
    return found


def smoke_test(record: Record) -> Outcome:
    """The first step; notes the backends that are left out of everything after it."""
    outcomes = smoke.run(smoke.commands("cuda"))
    for name, outcome in outcomes.items():
        print(f"  {name}: {outcome}", flush=True)
    record.left_out.clear()
    record.left_out.update(smoke.faulty(outcomes))
    named = "; ".join(f"{name}: {why}" for name, why in record.left_out.items())
    return Outcome(FAILED, f"left out from here on: {named}") if named else Outcome(DONE)


def main(argv: Sequence[str] | None = None) -> int:
    """Ends with 0 where everything asked for is done or had to be skipped."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--seconds", type=float, default=570.0, help="for this call, all steps")
    parser.add_argument("--again", action="store_true", help="also what is done or has failed")
    args = parser.parse_args(argv)
    if unknown := [step for step in args.steps if step not in STEPS]:
        sys.exit(f"there is not a step {unknown[0]}; there are {', '.join(STEPS)}")
    deadline = time.monotonic() + args.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the children end too
    folder, known = facts(args.commit)
    results = args.results.resolve()
    record = Record(results / folder / "gpu.json", known)
    wanted = {*FIRST, *args.steps} | ({"tune"} if set(TUNED) & set(args.steps) else set())
    chosen = [step for step in STEPS if step in wanted or not args.steps]
    outcomes: dict[str, Outcome] = {}
    for step in chosen:
        for command in plan(step, results, record.commit, record.left_out):
            left = deadline - time.monotonic()
            if not args.again and (found := record.finished(command.name)):
                pass
            elif left < LEAST:
                found = Outcome(CUT, "not begun")
            else:
                print(f"{command.name} ...", flush=True)
                found = perform(command, record, left)
                print(f"{command.name}: {': '.join(filter(None, found))}", flush=True)
            outcomes[command.name] = found
    print()
    for name, (outcome, reason) in outcomes.items():
        print(f"{name:<28} {outcome:<8} {reason}")
    if any(outcome == CUT for outcome, _ in outcomes.values()):
        print("The same command goes on from here.")
    return 0 if all(outcome in (DONE, SKIPPED) for outcome, _ in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
