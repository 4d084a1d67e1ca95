"""What the benchmarks do on a GPU, as far as a CPU can tell: the providers, the training step, the
single kernels and the steps that run on a GPU.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
LORA = 4 * 16 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))  # layers · r · Σ (K + N)
BY_KERNELS = {"gemm_triton", "loradrop_thin", "loradrop_triton", "loradrop_triton+norm"}

# Every provider of a GPU that serves here, by values and gradients; those whose dropout is
# PyTorch's, with its mask too.
CHECKS = """
import sys; sys.path.insert(0, {folder!r})
from dataclasses import replace
import torch
from torch.nn.functional import dropout, linear
from cases import make_case
from correct import check
from graph_split import graph_split
from providers import probing, providers
from rivals import addmm
from timing import Cell

torch.set_num_threads(1)
checked = set()
for p, direction in ((0.1, "forward_backward"), (0.0, "forward")):
    cell = Cell({dtype!r}, 40, 64, 96, 4, p, direction)
    case = replace(make_case(cell, "cpu"), bias=None)
    for provider in [*providers(cell.dtype, "cuda"), *probing(cell.dtype, "cuda")]:
        wanted = provider.name != "peft_compiled" and not provider.name.startswith({skip!r})
        if wanted and provider.refuses(cell, case.x) is None:
            check(provider, case, p > 0.0)
            checked.add(provider.key)
print(*sorted(checked))

case = replace(make_case(Cell("float32", 40, 64, 96, 4, 0.25, ""), "cpu"), bias=None)
leaves = case.x, case.A, case.B
torch.manual_seed(3)
dropped = dropout(case.x, case.dropout)
y = linear(case.x, case.weight) + case.scaling * linear(linear(dropped, case.A), case.B)
wanted = y, *torch.autograd.grad(y, leaves, case.dy)
for make in (graph_split, addmm):
    torch.manual_seed(3)
    y = make(case)()[0]
    found = y, *torch.autograd.grad(y, leaves, case.dy)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_the_providers_of_a_gpu_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    exec(CHECKS.format(folder=str(FOLDER), dtype="bfloat16", skip="none"), {})
    checked = set(capsys.readouterr().out.split())
    plain = {"frozen", "peft_fp32", "peft_bf16", "addmm", "graph_split", "merged", "cublas"}
    assert plain | {"loradrop", "loradrop_eager+norm", "peft_hook_b+norm"} <= checked
    assert torch.cuda.is_available() or not checked & BY_KERNELS


def test_and_by_triton_s_kernels() -> None:
    """In Triton's interpreter, which needs a process of its own."""
    pytest.importorskip("triton")
    code = CHECKS.format(folder=str(FOLDER), dtype="float16", skip="peft")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert BY_KERNELS | {"graph_split"} <= set(done.stdout.split())


def test_peft_compiled_and_blocks_of_dy(monkeypatch: pytest.MonkeyPatch) -> None:
    import graph_split
    from cases import make_case
    from correct import check
    from providers import Provider
    from rivals import peft_compiled
    from timing import Cell

    case = make_case(Cell("float32", 24, 16, 12, 4, 0.0, "forward_backward"), "cpu")
    check(Provider("peft_compiled", partial(peft_compiled, compiler="eager")), case, True)
    monkeypatch.setattr(graph_split, "rows_per_block", lambda _: 10)  # the last block is short
    check(Provider("graph_split", graph_split.graph_split), replace(case, bias=None), True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", ["risk_gemm", "risk_pdl", "risk_addmm", "bench_parts"])
def test_single_kernels_refuse_without_cuda(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit, match=f"{script}: PyTorch finds no CUDA device here"):
        __import__(script).main()


@pytest.fixture
def steps(folder: None) -> ModuleType:
    import bench_train_step

    return bench_train_step


@pytest.fixture
def gpu(folder: None) -> ModuleType:
    import gpu

    return gpu


@pytest.mark.parametrize(
    ("arm", "checkpointing"),
    [("peft_bf16", False), ("peft_fp32", True), ("loradrop", True), ("loradrop_half", False)],
)
def test_a_tiny_step(steps: ModuleType, arm: str, checkpointing: bool) -> None:
    found = steps.run("tiny", arm, checkpointing, "cpu", 0.0)
    assert 0 < found["p20_ms"] <= found["median_ms"] <= found["p80_ms"]
    assert found["tokens"] == 32 and found["steps"] >= 3
    if arm == "loradrop_half":
        assert 0 < found["parameters"] <= LORA / 2
    else:
        assert found["parameters"] == LORA


def test_an_arm_that_changes_the_loss_or_learns_nothing_is_refused(steps: ModuleType) -> None:
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


def test_cells_go_on_where_they_stopped(
    steps: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def in_process(_: str, argv: list[str]) -> Any:
        cell = json.loads(argv[-1])
        asked.append(cell)
        if cell == ["tiny", "loradrop", False]:
            raise RuntimeError("the measuring process ended with -6")
        if cell == ["tiny", "peft_fp32", False]:
            return [{"fault": "out of memory"}]
        return [{"median_ms": 1.0}]

    monkeypatch.setattr(steps.timing, "in_process", in_process)
    arguments = ["--results", str(tmp_path), "--commit", "abc"]
    assert steps.main(arguments) == 1
    assert len(asked) == 8
    asked.clear()
    assert steps.main(arguments) == 1
    assert asked == [["tiny", "loradrop", False]]  # what failed is asked for again, and only that
    cells = json.loads((tmp_path / "cpu" / "bench_train_step.json").read_text())["cells"]
    assert sum("fault" in cell for cell in cells) == 1 and len(cells) == 7
    with pytest.raises(SystemExit, match="huge is unknown; there are tiny"):
        steps.main(["--size", "huge"])


def test_every_step_is_a_script_that_is_there(gpu: ModuleType, tmp_path: Path) -> None:
    for step in gpu.STEPS:
        command = gpu.command(step, tmp_path, "abc")
        if step in gpu._SANITIZE:
            assert command[0] == "compute-sanitizer" and "tests/test_gpu.py" in command
            continue
        assert command[0] == sys.executable
        if step != "tests":
            assert Path(command[1]).is_file()
            assert (str(tmp_path) in command) == (step not in ("measured", "tables", "roofline"))


def test_a_step_out_of_time_is_stopped_with_its_children(gpu: ModuleType, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    assert gpu.run(["sh", "-c", f"sleep 60 & echo $! > {note}; wait"], 1.0) is None
    for _ in range(100):  # until whoever inherits the child has waited for it
        if not _alive(int(note.read_text())):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of the step lives on")
    assert gpu.run(["sh", "-c", "exit 3"], 60.0) == 3


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_an_unknown_step_is_named(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "fast"])
    with pytest.raises(SystemExit, match="fast is no step; there are risk_gemm"):
        gpu.main()
