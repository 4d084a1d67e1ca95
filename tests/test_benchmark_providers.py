"""The providers of a GPU and its training step, as far as a CPU can tell."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bench_train_step as steps
from lib import llama, package
from loradrop.kernels.tiles import Machine
from loradrop.measuring import workers
from loradrop.op import call, dispatch, tuned

ROOT = Path(__file__).resolve().parent.parent
LORA = 4 * 16 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))  # layers · r · Σ (K + N)


def test_the_providers_of_a_gpu_are_right() -> None:
    pytest.importorskip("peft")
    from provider_checks import checked

    found = checked("bfloat16", "peft_compiled")
    plain = {"frozen", "peft_fp32", "peft_bf16", "addmm", "cublas", "addmm_", "cublas of dx"}
    assert plain | {"loradrop", "loradrop_eager+norm", "peft_hook_b+norm"} <= found


def test_and_by_triton_s_kernels() -> None:
    """In Triton's interpreter, which needs a process of its own."""
    pytest.importorskip("triton")
    path = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "provider_checks.py"), "float16", "peft"],
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    kernels = {"gemm", "gemm+chunk", "gemm+chunk of dx", "shrink of dy", "outer for dA"}
    kernels |= {"loradrop_thin", "loradrop_triton", "loradrop_triton+norm"}
    assert kernels <= set(done.stdout.splitlines())


def test_peft_compiled_is_right() -> None:
    pytest.importorskip("peft")
    from lib.correct import check
    from lib.providers import Provider
    from lib.results import Cell
    from lib.rivals import peft_compiled
    from loradrop.measuring.cases import make_case

    case = make_case(Cell("float32", 24, 16, 12, 4, 0.0, "forward_backward"), "cpu")
    check(Provider("peft_compiled", partial(peft_compiled, compiler="eager")), case, True)


# The dispatcher

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A dispatcher that finds every backend ready, and may be changed."""
    ready = {name: replace(b, missing=lambda: None) for name, b in dispatch.BACKENDS.items()}
    monkeypatch.setattr(dispatch, "BACKENDS", ready)
    monkeypatch.setattr(dispatch, "triton_missing", lambda: None)
    monkeypatch.setattr(dispatch.cuda, "missing", lambda: None)
    dispatch.forget()
    yield
    dispatch.forget()


def test_the_dispatcher_is_asked_about_the_call_that_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the name of the device, as the dispatcher knows it."""
    from lib.results import Cell
    from loradrop.measuring.cases import make_case

    asked: list[call.Problem] = []
    monkeypatch.setattr(call, "machine_of", lambda _: Machine(90, 132, H200))
    monkeypatch.setattr(dispatch, "choose", lambda problem: asked.append(problem) or "eager")
    case = make_case(Cell("bfloat16", 24, 16, 8, 4, 0.25, "forward"), "cpu")
    assert package.chosen(case, False) == "eager"
    expected = call.Problem("cpu", torch.bfloat16, 24, 16, 8, 4, 0.25, grad=False)
    assert asked == [expected._replace(arch=90, sms=132, device_name=H200)]


def test_a_backend_that_is_left_out_is_not_chosen(on_hopper: None) -> None:
    layer = call.Problem("cuda", torch.bfloat16, 8192, 4096, 1024, 16, 0.0, arch=90, sms=132)
    layer = layer._replace(device_name=H100)
    first = dispatch.choose(layer)
    assert first in ("triton", "cuda", "overlap")
    package.leave_out([first])
    second = dispatch.choose(layer)
    assert second not in (first, "eager") and dispatch.explain(layer).startswith(f"{second}: ")
    package.leave_out(["thin", "triton", "cuda", "overlap"])
    assert dispatch.choose(layer) == "eager"


def test_the_choices_say_by_which_measurement(
    on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choice(device: str) -> str:
        machine = Machine(90, 132, device)
        monkeypatch.setattr("loradrop.kernels.tiles.machine_of", lambda _: machine)
        dispatch.forget()
        layers = package.in_training([(4096, 4096)], 16, 8192, torch.bfloat16, "cuda")
        assert package.measured(layers["4096x4096"]) != (device == H200 and not found)
        return package.choice(layers["4096x4096"])

    found: list[Any] = []
    assert f": measured on {H100} at 8192 tokens" in choice(H100)
    assert ": not measured; the roofline's guess" in choice(H200)
    key = {"device": H200, "arch": 90, "sms": 132, "dtype": "bfloat16", "k": 4096, "n": 4096}
    us = {"eager": 3.0, "thin": 2.0, "triton": 1.0}
    point = key | {"m": 8192, "r": 16, "dropout": 0, "grad": 1, "us": us}
    found.append(point | {"host_us": {}, "refused": {}})
    monkeypatch.setattr(tuned, "of_problem", lambda _: tuned.Tuned(Path(), tuple(found)))
    assert choice(H200).startswith("triton: by loradrop tune at 8192 tokens")


# The training step


def test_the_layers_are_those_of_the_model() -> None:
    size = steps.SIZES["tiny"]
    linear = [m for m in steps.build(size, "cpu").modules() if isinstance(m, torch.nn.Linear)]
    found = {(m.in_features, m.out_features) for m in linear}
    assert found == {*llama.layers(size), (size.hidden, size.words)}


def test_layers_that_nobody_measured_are_tuned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "folder", lambda: tmp_path / "loradrop")
    dispatch.forget()
    size = steps.SIZES["tiny"]
    assert llama.unmeasured(size, "cpu") == ["32x32", "32x16", "32x64", "64x32"]
    assert steps.main(["--tune"]) == 0
    assert llama.unmeasured(size, "cpu") == []
    points = json.loads((tmp_path / "loradrop" / "tuned-cpu.json").read_text())["points"]
    assert {(p["m"], p["r"], p["grad"], p["dropout"]) for p in points} == {(32, 16, 1, 0)}
    assert "fastest" in capfd.readouterr().out
    assert steps.main(["--tune"]) == 0 and "fastest" not in capfd.readouterr().out
    monkeypatch.setattr(tuned, "folder", lambda: tmp_path / "nothing")
    gone = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(llama.subprocess, "run", lambda *_, **__: gone)
    assert steps.main(["--tune"]) == 1
    said = "loradrop tune ended with 3, and did not measure 32x32, 32x16, 32x64, 64x32"
    assert said in capfd.readouterr().out
    dispatch.forget()


def test_a_cell_says_who_serves_and_who_may_not(
    on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "run", lambda *_: {"median_ms": 1.0})

    def work(arm: str, without: str) -> dict[str, Any]:
        args = SimpleNamespace(device="cpu", seconds=0.0, without=without)
        key = {"size": "tiny", "arm": arm, "checkpointing": False}
        return steps.work(args, key, set(), lambda _: None)

    found = work("loradrop_bf16", "triton")["choices"]
    assert found.keys() == {"32x32", "32x16", "32x64", "64x32"}
    assert all(why.startswith("eager: a CPU runs plain") for why in found.values())
    assert dispatch.BACKENDS["triton"].why_not(None) == "it is left out, as asked"
    assert work("peft_bf16", "eager") == {"median_ms": 1.0}
    fault = "nobody serves 32x32 without eager, which is left out"
    assert work("loradrop", "eager") == {"fault": fault}


@pytest.mark.parametrize(
    ("arm", "checkpointing"),
    [
        ("peft_bf16", False),
        ("peft_fp32", True),
        ("loradrop", True),
        ("loradrop_bf16", False),
        ("loradrop_half", False),
    ],
)
def test_a_tiny_step(arm: str, checkpointing: bool) -> None:
    pytest.importorskip("peft")
    found = steps.run("tiny", arm, checkpointing, "cpu", 0.0)
    assert 0 < found["p20_ms"] <= found["median_ms"] <= found["p80_ms"]
    assert found["tokens"] == 32 and found["steps"] >= 3
    assert 0 < found["host_ms"] <= found["median_ms"]
    names, calls, times = zip(*found["kernels"], strict=True)
    assert "aten::mm" in names and min(calls) > 0 and list(times) == sorted(times, reverse=True)
    assert sum(times) <= found["busy_ms"] + 0.01
    half = arm == "loradrop_half"
    assert 0 < found["parameters"] <= LORA / 2 if half else found["parameters"] == LORA


def test_an_arm_that_changes_the_loss_or_learns_nothing_is_refused() -> None:
    size = steps.SIZES["tiny"]
    model, ids = steps.build(size, "cpu"), torch.arange(16)[None] % size.words
    batch = {"input_ids": ids, "labels": ids}
    base = float(model(**batch).loss)
    adapted = steps.adapt(model, "loradrop", batch)
    steps.check(adapted, base, batch)
    with pytest.raises(AssertionError, match="the loss is off by"):
        steps.check(adapted, 2 * base, batch)
    adapted.lora_bank.enabled = False
    adapted.lm_head.weight.requires_grad_(True)
    with pytest.raises(AssertionError):
        steps.check(adapted, base, batch)


def test_cells_of_a_step_go_on_where_they_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    found = {
        ("loradrop", False): workers.Answer(None, {"": "its process ended with SIGABRT"}),
        ("peft_fp32", False): workers.Answer({"fault": "out of memory"}, {}),
    }

    def answers(_: Any, keys: list[dict[str, Any]], *__: Any, **___: Any) -> Any:
        for key in keys:
            asked.append((key["arm"], key["checkpointing"]))
            yield found.get(asked[-1], workers.Answer({"median_ms": 1.0}, {}))

    def main(commit: str, *options: str) -> int:
        asked.clear()
        return steps.main(["--results", str(tmp_path), "--commit", commit, *options])

    monkeypatch.setattr(steps.workers, "answers", answers)
    assert main("abc") == 1 and len(asked) == 2 * len(steps.ARMS)
    assert main("abc") == 0 and not asked
    assert main("def") == 1  # what has no figures, at another commit
    assert asked == [("peft_fp32", False), ("loradrop", False)]
    cells = json.loads((tmp_path / "cpu" / "bench_train_step.json").read_text())["cells"]
    assert sorted(cell["commit"] for cell in cells) == ["abc"] * 8 + ["def"] * 2
    faults = {cell["arm"]: cell["fault"] for cell in cells if "fault" in cell}
    assert faults == {"peft_fp32": "out of memory", "loradrop": "its process ended with SIGABRT"}
    main("def", "--without", "triton")  # another dispatcher: what it serves, and nothing else
    assert {arm for arm, _ in asked} == {"loradrop", "loradrop_bf16", "loradrop_half"}
    assert "the dispatcher does without triton" in capsys.readouterr().out
    cells = json.loads((tmp_path / "cpu" / "bench_train_step.json").read_text())["cells"]
    ours = [cell for cell in cells if cell["arm"].startswith("loradrop")]
    assert len(ours) == 6 and all(cell["without"] == ["triton"] for cell in ours)
    assert main("def", "--without", "triton") == 0 and not asked
    with pytest.raises(SystemExit, match="--without tritn: there is no such backend; there are"):
        main("abc", "--without", "tritn")
    with pytest.raises(SystemExit, match="huge is unknown; there are tiny"):
        main("abc", "--size", "huge")
