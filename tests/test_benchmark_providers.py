"""The providers of a GPU and its training step, as far as a CPU can tell."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_train_step as steps
from loradrop.measuring import workers

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


# The training step


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
    main("abc", "--without", "triton", "--fresh")
    assert {arm for arm, _ in asked} == {"peft_bf16", "peft_fp32"}
    assert "loradrop is left out: the dispatcher might pick triton" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="huge is unknown; there are tiny"):
        main("abc", "--size", "huge")
