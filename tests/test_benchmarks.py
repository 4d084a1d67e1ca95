"""The benchmarks run, and a provider that computes something else gets no number."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
SCRIPT = FOLDER / "bench_lora_linear.py"
FACTS = dict.fromkeys(("device", "torch", "triton", "driver", "commit"), "")
SIX = {
    ("frozen", "0"),
    ("peft_fp32", "0"),
    ("peft_hook", "1"),
    ("addmm", "0"),
    ("loradrop", "0"),
    ("loradrop", "1"),
}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def harness(folder: None) -> ModuleType:
    import harness

    return harness


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_end_to_end_and_a_second_run_measures_nothing(tmp_path: Path, harness: ModuleType) -> None:
    out = tmp_path / "bench.csv"
    arguments = ["--shapes", "24x16x12", "--dtype", "float32", "--processes", "1"]
    arguments += ["--seconds", "0", "--commit", "abc", "--out", str(out)]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    rows = harness.timing.read_rows(out)
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
    assert {pick["chosen"] for pick in report["dispatcher"]} == {"eager"}
    assert len(report["dispatcher"]) == 2
    before = out.read_bytes()
    again = run(*arguments)
    assert (again.returncode, again.stdout) == (0, ""), again.stderr
    assert out.read_bytes() == before
    assert json.loads(out.with_suffix(".json").read_text()) == report


def measure(
    harness: ModuleType, direction: str, dropout: float = 0.0, compared: list | None = None
) -> Any:
    import providers

    cell = harness.Cell("float32", 24, 16, 12, 4, dropout, direction)
    compared = compared or providers.providers("float32", "cpu")
    return harness.run_cell(compared, cell, "cpu", 0.0, FACTS)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_dropout_has_the_reference_s_mask(harness: ModuleType, direction: str) -> None:
    measured = measure(harness, direction, dropout=0.1)
    assert (measured.errors, measured.left_out, measured.chosen) == ([], [], "eager")
    assert {(row["provider"], row["norm"]) for row in measured.rows} == SIX


def spoilt(what: str) -> Callable[[Any], Any]:
    """Our op with its norm, and one of its results a little off."""
    import providers

    def make(case: Any) -> Any:
        call = providers.ours(case, norm=True)

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
            if what == "fault":
                raise RuntimeError("no such kernel\nand a long story")
            return y, sqnorm

        return run

    return make


@pytest.mark.parametrize(
    ("what", "direction"),
    [
        ("y", "forward"),
        ("sqnorm", "forward"),
        ("dx", "forward_backward"),
        ("dB", "forward_backward"),
    ],
)
def test_a_wrong_provider_gets_no_number(harness: ModuleType, what: str, direction: str) -> None:
    from providers import Provider, providers

    good = providers("float32", "cpu")
    compared = [good[0], Provider("wrong", spoilt(what), norm=True), good[-1]]
    rows, errors, *_ = measure(harness, direction, compared=compared)
    assert [row["provider"] for row in rows] == ["frozen", "loradrop"]
    assert len(errors) == 1 and errors[0].startswith("wrong+norm is wrong")
    assert f"{what}:" in errors[0]


def test_a_failing_provider_costs_the_others_nothing(harness: ModuleType) -> None:
    from providers import Provider, providers

    good = providers("float32", "cpu")
    bad = Provider("bad", spoilt("fault"), norm=True)
    absent = Provider("absent", spoilt("fault"), refuses=lambda *_: "it is not built")
    rows, errors, left_out, _ = measure(harness, "forward", compared=[good[0], bad, absent])
    assert [row["provider"] for row in rows] == ["frozen"]
    assert errors == ["bad+norm fails, and gets no number: RuntimeError: no such kernel"]
    assert left_out == ["absent is left out: it is not built"]


def test_a_norm_that_changes_bits_gets_no_number(harness: ModuleType) -> None:
    from providers import Provider, ours, probing

    def other(case: Any) -> Any:
        call = ours(case)
        return lambda: (call()[0] * (1.0 + 2.0**-23), None)

    compared = [*probing("float32", "cpu")]
    compared.append(Provider("other", partial(ours, norm=True), True, masks=True, silent=other))
    rows, errors, *_ = measure(harness, "forward", compared=compared)
    assert errors == [
        "other+norm is wrong, and gets no number: y: other bits than without the norm"
    ]
    names = [harness.timing.label(row) for row in rows]
    assert names == ["frozen", "peft", "peft_hook", "peft_hook_b", "loradrop", "loradrop+norm"]


def through_main(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, path: Path, answers: list
) -> int:
    """The script's verdict; each measuring process is replaced by its answers."""
    from bench_lora_linear import BENCH

    def in_process(*_: Any) -> Any:
        for answer in answers.pop(0):
            if answer is None:
                raise RuntimeError("the measuring process ended with -6")
            yield answer

    monkeypatch.setattr(harness.timing, "in_process", in_process)
    arguments = ["--shapes", "2x2x2,3x2x2", "--dtype", "float32", "--directions", "forward"]
    arguments += ["--processes", "1", "--commit", "abc", "--out", str(path)]
    return harness.main(BENCH, harness.arguments(None, arguments))


def answer(harness: ModuleType, m: int, *errors: str) -> list[Any]:
    cell = {"dtype": "float32", "M": m, "K": 2, "N": 2, "dropout": 0.0, "direction": "forward"}
    row = dict.fromkeys(harness.timing.COLUMNS, "1") | cell | {"date": f"day {m}", "norm": "0"}
    rows = [row | {"provider": "frozen", "r": 0}, row | {"provider": "loradrop", "r": 8}]
    rows = [{name: str(value) for name, value in row.items()} for row in rows]
    return [rows, list(errors), ["cuda is left out: not built"], "eager"]


def test_red_ends_with_1_and_a_refusal_is_said_once(
    harness: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = [[answer(harness, 2), answer(harness, 3)]]
    assert through_main(harness, monkeypatch, tmp_path / "good.csv", good) == 0
    assert capsys.readouterr().out.count("cuda is left out") == 1
    red = [[answer(harness, 2, "loradrop is wrong"), answer(harness, 3)]]
    assert through_main(harness, monkeypatch, tmp_path / "red.csv", red) == 1
    assert "loradrop is wrong" in capsys.readouterr().out


def test_a_process_that_dies_costs_one_cell(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "b.csv"
    answers = [[None], [answer(harness, 3)]]
    assert through_main(harness, monkeypatch, path, answers) == 1
    assert {row["M"] for row in harness.timing.read_rows(path)} == {"3"}
    assert answers == []
    with pytest.raises(RuntimeError, match="ended with -6"):
        through_main(harness, monkeypatch, tmp_path / "c.csv", [[None], [None]])


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--grid", "lama", "lama is unknown; there are encoders, llama"),
        ("--shapes", "2x3", "give shapes as MxKxN"),
        ("--directions", "backward", "choose of forward, forward_backward"),
    ],
)
def test_bad_options_are_named(harness: ModuleType, option: str, value: str, says: str) -> None:
    from bench_lora_linear import BENCH

    with pytest.raises(SystemExit, match=says):
        harness.main(BENCH, harness.arguments(None, [option, value]))


def test_the_grids_have_the_points_they_are_named_for(harness: ModuleType) -> None:
    from bench_lora_linear import BENCH

    args = harness.arguments(None, ["--device", "cuda", "--dtype", "bfloat16"])
    cells = harness.chosen_cells(args, BENCH.grids["cuda"])
    assert len(cells) == len(set(cells))
    assert {c.M for c in cells if c.N == 14336 and c.direction == "forward"} >= {1, 32, 8192}
    assert {c.r for c in cells if c.M == 8192 and c.K == c.N == 4096} == {8, 16, 64, 128}
    assert {c.dropout for c in cells if (c.K, c.N, c.M) == (5120, 5120, 8192)} == {0.0, 0.1}
    assert {c.M for c in cells if c.K == c.N == 8192} == {2048, 4096, 6144, 8192}
    one = harness.arguments(None, ["--grid", "quick", "--dtype", "bfloat16", "--ranks", "4"])
    assert {c.r for c in harness.chosen_cells(one, "llama")} == {4}
    decode = [c for c in cells if c.M <= 32]
    assert decode and all(harness.grids.in_graph(c, "cuda") for c in decode)
    assert not any(harness.grids.in_graph(c, "cpu") for c in cells)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", ["bench_lora_linear", "bench_probe", "bench_train_step"])
def test_no_cuda_is_said(harness: ModuleType, tmp_path: Path, script: str) -> None:
    module, arguments = __import__(script), ["--device", "cuda", "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match="finds no CUDA device"):
        if script == "bench_train_step":
            module.main(arguments)
        else:
            harness.main(module.BENCH, harness.arguments(None, arguments))
    assert not list(tmp_path.iterdir())
