"""What happens on a GPU, rehearsed without one: a first start, faults, hangs and cuts."""

import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu
import smoke
from lib import harness
from loradrop.measuring import cases, workers

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
FACTS = {"device": "a GPU", "torch": "2", "triton": "3", "driver": "1", "commit": "abc"}


def python(code: str, folder: Path, *arguments: str) -> str:
    """stdout of code that runs in a folder, without the checkout on Python's path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(ROOT), *arguments]
    options = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, cwd=folder, env=environment, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# A first start

BARE = """
import importlib.util, os, runpy, sys
from pathlib import Path
root = sys.argv[1]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path = [p for p in sys.path if p not in ("", root) and not p.startswith("__editable__")]
assert importlib.util.find_spec("loradrop") is None
for absent in ("datasets", "peft", "pandas"):
    sys.modules[absent] = None
folder = str(Path(root) / "benchmarks")
sys.path.insert(0, folder)
import torch  # once: each script starts in a process of its own, where nothing else of ours is
for script in sys.argv[2:]:
    sys.stdout.flush()
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, script
        continue
    runpy.run_path(str(Path(folder) / script), run_name="started")
    if "loradrop" in sys.modules:  # else it imports what it needs later
        print(script, sys.modules["loradrop"].__file__)
    sys.exit()
"""


def test_scripts_start_where_loradrop_is_not_installed(tmp_path: Path) -> None:
    """Nor datasets, PEFT and pandas, and from any folder."""
    scripts = {path.name for path in FOLDER.glob("*.py")} - {
        "bench_cut.py", "bench_sizes.py", "bench_methods.py",
    }  # fmt: skip  # train on a CPU
    assert {"gpu.py", "smoke.py", "tables.py", "bench_parts.py"} <= scripts
    found = dict(
        line.split(maxsplit=1) for line in python(BARE, tmp_path, *sorted(scripts)).splitlines()
    )
    assert set(found.values()) == {str(ROOT / "loradrop" / "__init__.py")}
    assert {"tables.py", "bench_statistics.py", "bench_parts.py"} <= found.keys()


def test_the_tests_step_needs_no_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import importlib, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
sys.modules["datasets"] = None
for name in sys.argv[2:]:
    importlib.import_module(name)
"""
    python(code, tmp_path, *gpu.TESTS)
    monkeypatch.setitem(sys.modules, "datasets", None)  # what needs it is skipped
    monkeypatch.delitem(sys.modules, "training_runs", raising=False)
    with pytest.raises(pytest.skip.Exception, match="datasets"):
        runpy.run_path(str(ROOT / "tests" / "test_training.py"))


# Workers that end or hang

WORKER = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import lib
from loradrop.measuring import cases, workers

print("a library prints this too", flush=True)

def work(task, without, begin):
    done = [os.getpid()]
    for name in ("first", "bad", "last"):
        if name in without:
            continue
        begin(name)
        if name == "bad" and task == "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "bad" and task == "exit":
            sys.exit("a kernel went wrong")
        if name == "bad" and task == "hang":
            time.sleep(60)
        if name == "bad" and task == "broken":
            raise workers.BrokenDeviceError(name, "an illegal address")
        done.append(name)
    print("a library prints this", flush=True)
    begin(workers.TASK)
    if task == "late":
        os._exit(4)
    return done

workers.serve(work)
"""


def answers(tasks: list[str], patience: float = 20.0, **more: bool) -> list[workers.Answer]:
    command = [sys.executable, "-c", WORKER, str(FOLDER)]
    return list(workers.answers(command, tasks, patience, **more))


REASONS = {
    "segv": "its process ended with SIGSEGV: a library prints this",
    "exit": "its process ended with status 1: a kernel went wrong",
    "broken": "an illegal address",
    "hang": "gave no sign of life for 3 s and was stopped",
}


@pytest.mark.parametrize("task", REASONS)
def test_who_ends_or_hangs_a_process_is_named_and_left_out(task: str) -> None:
    fine, faulty, after = answers(["fine", task, "fine"], 3.0 if task == "hang" else 20.0)
    assert fine.value[1:] == after.value[1:] == ["first", "bad", "last"]
    assert faulty.value[1:] == ["first", "last"] and faulty.lost == {"bad": REASONS[task]}
    assert not fine.lost and not after.lost
    assert fine.value[0] != faulty.value[0] == after.value[0]  # the new process goes on


def test_who_is_left_out_of_the_rest_and_what_is_given_up() -> None:
    segv, exit_, late, fine = answers(["segv", "exit", "late", "fine"])
    assert segv.value[1:] == exit_.value[1:] == fine.value[1:] == ["first", "last"]  # two ended
    ended = "its process ended with status 4: a library prints this"
    assert late == (None, {"": ended}) and fine.lost == {}  # nobody can be blamed
    one, two = answers(["fine", "fine"], fresh=True)
    assert one.value[0] != two.value[0] and one.value[1:] == two.value[1:]


def test_a_worker_that_does_not_start_ends_the_run() -> None:
    command = [sys.executable, "-c", "import no_such_module"]
    with pytest.raises(RuntimeError, match=r"does not start: .*No module named 'no_such_module'"):
        list(workers.answers(command, ["a", "b", "c"], 20.0))


# The smoke test

CHILDREN = {
    "eager": "print('right')",
    "thin": "raise AssertionError('37x136->264, dropout 0: y: relative error 1')",
    "triton": "import time; time.sleep(60)",
    "cuda": "print('not here: it is not built')",
    "overlap": "print('right')",
}


def children(name: str) -> list[str]:
    return [sys.executable, "-S", "-c", CHILDREN[name]]


def held_up(folder: Path, others: smoke.Command) -> smoke.Command:
    """eager gives its answer when it is asked again; the others as they are."""
    held = f"""
import os, time
try:
    os.mkdir({str(folder / "once")!r})
    time.sleep(60)
except FileExistsError:
    print('right')
"""
    return lambda name: [*children(name)[:3], held] if name == "eager" else others(name)


def test_a_backend_that_is_wrong_or_hangs_is_named(tmp_path: Path) -> None:
    """Those that hang are asked again alone: one was only held up by the other."""
    found = smoke.run(held_up(tmp_path, children), 4.0)
    assert found["eager"] == "right" and found["cuda"] == "not here: it is not built"
    wrong = "ended with 1: AssertionError: 37x136->264, dropout 0: y: relative error 1"
    assert smoke.faulty(found) == {"thin": wrong, "triton": "gave no answer in 4 s"}


def test_a_single_late_one_is_asked_again(tmp_path: Path) -> None:
    found = smoke.run(held_up(tmp_path, lambda _: children("overlap")), 4.0)
    assert found == dict.fromkeys(CHILDREN, "right")


def test_smoke_checks_values(monkeypatch: pytest.MonkeyPatch) -> None:
    assert smoke.one("eager", "cpu") == "right"
    assert smoke.one("cuda", "cpu").startswith("not here: ")
    right = cases.lora_linear

    def wrong(*operands: Any, **options: Any) -> Any:
        found = right(*operands, **options)
        if options["backend"] == "reference":
            return found
        return (found[0] * 1.001, found[1]) if options["return_sqnorm"] else found * 1.001

    monkeypatch.setattr(cases, "lora_linear", wrong)
    with pytest.raises(AssertionError, match="37x136->264, dropout 0: y: relative error"):
        smoke.one("eager", "cpu")


# The steps


@pytest.fixture
def run_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """gpu.py with steps of our own, name -> code: gives its status, and each step's record."""

    def run(
        steps: dict[str, str], *options: str, smoked: Any = None, asked: Any = None
    ) -> tuple[int, dict[str, Any]]:
        real = gpu.plan

        def plan(step: str, *more: Any) -> list[gpu.Command]:
            if step in ("smoke", "sanitizers"):
                return real(step, *more)
            if step not in steps:
                return []
            return [gpu.Command(step, [sys.executable, "-S", "-c", steps[step], str(tmp_path)])]

        with monkeypatch.context() as patch:
            patch.setattr(gpu, "facts", lambda commit: ("a-gpu", FACTS | {"commit": commit}))
            patch.setattr(gpu, "plan", plan)
            patch.setattr(gpu.smoke, "run", lambda _: smoked or {"eager": "right"})
            patch.setattr(gpu, "LEAST", 0.1)
            patch.setattr(gpu.signal, "signal", lambda *_: None)
            arguments = [*(asked or steps), "--results", str(tmp_path), "--commit", "abc", *options]
            status = gpu.main(arguments)
        report = json.loads((tmp_path / "a-gpu" / "gpu.json").read_text())
        return status, report["steps"]

    return run


def outcomes(steps: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {name: (step["outcome"], step["reason"]) for name, step in steps.items()}


def test_a_missing_tool_is_skipped_and_later_steps_run(
    run_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    status, steps = run_gpu({"sanitizers": "", "probe": "pass"})
    assert status == 0
    skipped = ("skipped", "compute-sanitizer is not on the PATH")
    done = {"smoke": ("done", ""), "probe": ("done", "")}
    assert outcomes(steps) == done | dict.fromkeys(gpu.SANITIZERS, skipped)
    command = gpu.Command("train", [sys.executable], ("no_such_package",))
    assert gpu.lacking(command) == "no_such_package is not installed"


def test_a_failing_or_unknown_step_is_named_and_costs_the_others_nothing(run_gpu: Any) -> None:
    status, steps = run_gpu({"quick": "print('two is wrong'); raise SystemExit(1)", "parts": ""})
    found = outcomes(steps)
    assert (status, found["quick"]) == (1, ("failed", "two is wrong"))
    assert found["parts"] == ("done", "")
    with pytest.raises(SystemExit, match="there is not a step fast; there are build, smoke"):
        gpu.main(["fast"])


CELLS = """
import pathlib, sys, time
done = pathlib.Path(sys.argv[1]) / "cells"
for cell in range(4):
    if cell < len(done.read_text() if done.exists() else ""):
        continue
    with done.open("a") as file:
        file.write("x")
    if cell == 1:
        time.sleep(60)
"""


def test_a_step_that_is_cut_off_goes_on(run_gpu: Any, tmp_path: Path) -> None:
    once = "import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'once').touch(exist_ok=False)"
    steps = {"quick": once, "parts": CELLS, "full": "pass"}
    status, found = run_gpu(steps, "--seconds", "4")
    assert status == 1 and found["parts"]["outcome"] == "cut off"
    assert found["quick"]["outcome"] == "done" and "full" not in found
    assert (tmp_path / "cells").read_text() == "xx"
    status, found = run_gpu(steps)
    assert status == 0 and (tmp_path / "cells").read_text() == "xxxx"
    assert [step["outcome"] for step in found.values()] == ["done"] * 4
    status, found = run_gpu(steps, "--again")
    assert status == 1 and "FileExistsError" in found["quick"]["reason"]


def test_what_fails_the_smoke_test_is_left_out_of_everything(run_gpu: Any, tmp_path: Path) -> None:
    smoked = {"eager": "right", "triton": "gave no answer in 45 s", "cuda": "not here: no"}
    status, steps = run_gpu({"quick": "pass"}, smoked=smoked)
    assert status == 1 and steps["quick"]["outcome"] == "done"
    why = "left out from here on: triton: gave no answer in 45 s"
    assert outcomes(steps)["smoke"] == ("failed", why)
    record = gpu.Record(tmp_path / "a-gpu" / "gpu.json", FACTS)  # the next call
    assert record.left_out == {"triton": "gave no answer in 45 s"}
    assert record.finished("smoke") == ("failed", why)
    for step in set(gpu.STEPS) - {"build", "smoke"}:
        for command in gpu.plan(step, tmp_path, "abc", record.left_out):
            spared = "not ([triton or -triton)"
            if step in gpu.BENCHES:
                assert command.argv[command.argv.index("--without") + 1] == "triton"
            else:
                assert command.argv[command.argv.index("-k") + 1].endswith(spared)
                assert any((ROOT / part).is_file() for part in command.argv if "tests/" in part)
    assert gpu.Record(tmp_path / "a-gpu" / "gpu.json", FACTS | {"commit": "b"}).left_out == {}


def test_the_kernels_are_built_before_the_smoke_test(run_gpu: Any, tmp_path: Path) -> None:
    note = "import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'built').touch()"
    status, found = run_gpu({"quick": "pass"})
    assert status == 0 and list(found) == ["smoke", "quick"]  # nothing to build
    status, found = run_gpu({"build": note})
    assert status == 0 and list(found) == ["quick", "build", "smoke"]  # smoke has run again
    assert outcomes(found)["build"] == ("done", "")
    (tmp_path / "built").unlink()
    assert run_gpu({"build": note})[0] == 0 and (tmp_path / "built").exists()  # another machine
    status, found = run_gpu({"build": "raise SystemExit('no compiler')", "parts": "pass"})
    assert status == 1 and outcomes(found)["build"] == ("failed", "no compiler")
    assert found["parts"]["outcome"] == "done"
    status, found = run_gpu({"build": note, "parts": "pass"})  # in vain at this commit
    assert status == 1 and found["build"]["outcome"] == "failed"


def test_the_kernels_are_built_only_where_they_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "EXTENSION", "loradrop.no_such_extension")
    (command,) = gpu.plan("build", tmp_path, "abc", ())
    assert command.argv[:2] == ["env", "LORADROP_BUILD_CUDA=1"] and command.argv[-1] == "--inplace"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: None if tool == "nvcc" else tool)
    assert gpu.lacking(command) == "nvcc is not on the PATH"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    assert gpu.lacking(command) == "setuptools is not installed"
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "EXTENSION", "loradrop.files")  # as if it were built
    assert gpu.plan("build", tmp_path, "abc", ()) == []


@pytest.mark.parametrize("step", gpu.TUNED)
def test_layers_are_tuned_before_a_training_step(step: str, run_gpu: Any, tmp_path: Path) -> None:
    assert gpu.STEPS[:3] == ("build", "smoke", "tune")
    status, found = run_gpu({step: "pass", "tune": "pass"}, asked=[step])
    assert status == 0 and list(found) == ["smoke", "tune", step]
    record = gpu.Record(tmp_path / "a-gpu" / "gpu.json", FACTS)
    assert record.finished(step) and not record.finished("tune")  # the next machine has no file


def test_the_results_of_a_device_are_eight_files() -> None:
    """That is all that may have to be copied: who adds one has to spare another."""
    names = {"gpu.json"}
    for bench in gpu.BENCHES.values():
        module = importlib.import_module(bench.split()[0])
        name = Path(module.__file__).stem
        names |= {f"{name}.json"} | ({f"{name}.csv"} if hasattr(module, "BENCH") else set())
    assert len(names) <= 8, sorted(names)


def test_a_step_out_of_time_is_stopped_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    found = gpu.run(["sh", "-c", f"sleep 60 & echo $! > {note}; wait"], 1.0)
    assert found == ("cut off", "after 1 s")
    child, until = int(note.read_text()), time.monotonic() + 10.0
    while _alive(child) and time.monotonic() < until:  # whoever inherits it has to wait for it
        time.sleep(0.1)
    assert not _alive(child)
    assert gpu.run(["sh", "-c", "echo bad luck; exit 3"], 60.0) == ("failed", "bad luck")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("step", gpu.BENCHES)
def test_the_benchmarks_know_their_options_and_refuse_without_cuda(
    step: str, tmp_path: Path
) -> None:
    (command,) = gpu.plan(step, tmp_path, "abc", {"triton": "hangs"})
    module = importlib.import_module(Path(command.argv[1]).stem)
    with pytest.raises(SystemExit, match="PyTorch finds no CUDA device here"):
        if step in ("tune", "train", "8b"):
            module.main(command.argv[2:])
        else:
            args = harness.arguments(None, [*command.argv[2:], "--dtype", "bfloat16"])
            assert harness.chosen_cells(args, module.BENCH.grids["cuda"])
            harness.main(module.BENCH, args)
    assert not list(tmp_path.iterdir())


def test_children_keep_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/kept")
    assert gpu.surroundings()["TRITON_CACHE_DIR"] == "/kept"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert gpu.surroundings()["TRITON_CACHE_DIR"].endswith(".triton/cache")
    assert gpu.surroundings()["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
