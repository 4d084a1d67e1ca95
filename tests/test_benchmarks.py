"""The benchmarks run, and a provider that computes something else gets no number."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "bench_lora_linear.py"
SIX = {
    ("frozen", "0"),
    ("peft_fp32", "0"),
    ("peft_hook", "1"),
    ("addmm", "0"),
    ("loradrop", "0"),
    ("loradrop", "1"),
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import bench_lora_linear

    return bench_lora_linear


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_end_to_end_and_a_second_run_measures_nothing(tmp_path: Path, bench: ModuleType) -> None:
    out = tmp_path / "bench.csv"
    arguments = ["--shapes", "24x16x12", "--dtype", "float32", "--processes", "1"]
    arguments += ["--seconds", "0", "--commit", "abc", "--out", str(out)]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    rows = bench.timing.read_rows(out)
    for direction in ("forward", "forward_backward"):
        found = [row for row in rows if row["direction"] == direction]
        assert {(row["provider"], row["norm"]) for row in found} == SIX
        assert len({row["date"] for row in found}) == 1
    assert all(
        float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"]) for row in rows
    )
    assert all(float(row["p20_us"]) > 0 for row in rows)
    assert {row["r"] for row in rows if row["provider"] == "frozen"} == {"0"}
    assert {row["commit"] for row in rows} == {"abc"}
    report = json.loads(out.with_suffix(".json").read_text())
    assert [(goal["r"], goal["direction"]) for goal in report["goals"]] == [
        (8, "forward"),
        (8, "forward_backward"),
    ]
    before = out.read_bytes()
    again = run(*arguments)
    assert (again.returncode, again.stdout) == (0, ""), again.stderr
    assert out.read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_said(tmp_path: Path) -> None:
    done = run("--device", "cuda", "--out", str(tmp_path / "bench.csv"))
    assert done.returncode == 1
    assert "finds no CUDA device" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def measure(bench: ModuleType, direction: str, dropout: float = 0.0) -> tuple[list, list]:
    cell = bench.Cell("float32", 24, 16, 12, 4, dropout, direction)
    facts = dict.fromkeys(("device", "torch", "triton", "driver", "commit"), "")
    return bench.run_cell(cell, "cpu", 0.0, facts)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_dropout_has_the_reference_s_mask(bench: ModuleType, direction: str) -> None:
    rows, errors = measure(bench, direction, dropout=0.1)
    assert errors == []
    assert {(row["provider"], row["norm"]) for row in rows} == SIX


@pytest.mark.parametrize(
    ("what", "direction"),
    [
        ("y", "forward"),
        ("sqnorm", "forward"),
        ("dx", "forward_backward"),
        ("dB", "forward_backward"),
    ],
)
def test_a_wrong_provider_gets_no_number(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, what: str, direction: str
) -> None:
    import providers

    right = providers.ours

    def wrong(case: object) -> object:
        call = right(case, norm=True)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            y, sqnorm = call()
            if what == "y":
                y = y * 1.001
            if what == "sqnorm":
                sqnorm = sqnorm * 1.01
            if what == "dx":
                y = y + (case.x - case.x.detach()).sum(1, keepdim=True)
            if what == "dB":
                y = y + (case.B - case.B.detach()).sum()
            return y, sqnorm

        return run

    def with_wrong(dtype: str, device: str) -> list:
        good = providers.providers(dtype, device)
        return [good[0], providers.Provider("wrong", wrong, norm=True), good[-1]]

    monkeypatch.setattr(bench, "providers", with_wrong)
    rows, errors = measure(bench, direction)
    assert [row["provider"] for row in rows] == ["frozen", "loradrop"]
    assert (
        len(errors) == 1 and errors[0].startswith("wrong+norm is wrong") and f"{what}:" in errors[0]
    )


def test_red_ends_with_1(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The script's verdict; the measuring process is replaced by its answer."""
    monkeypatch.setattr(bench.timing, "in_process", lambda *_: [([], ["loradrop is wrong"])])
    arguments = ["bench", "--shapes", "2x2x2", "--processes", "1", "--out", str(tmp_path / "b.csv")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench.main() == 1
