"""The benchmarks run, resume, and a provider that computes something else gets no number."""

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_lora_linear import BENCH
from lib import grids, harness, providers, results
from lib.environment import commit_of
from loradrop.measuring import workers

pytest.importorskip("peft")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
FACTS = dict.fromkeys(("device", "torch", "triton", "driver", "commit"), "")
Capsys, Patch, Stub = pytest.CaptureFixture[str], pytest.MonkeyPatch, Callable[..., int]
SIX = {(name, "0") for name in ("frozen", "peft_fp32", "addmm", "loradrop")}
SIX |= {("peft_hook", "1"), ("loradrop", "1")}
MEASURED = {"forward": SIX, "forward_backward": SIX | {("loradrop_grams", "0")}}


def test_end_to_end_and_a_second_run_measures_nothing(tmp_path: Path, capsys: Capsys) -> None:
    out = tmp_path / "bench.csv"
    arguments = ["--shapes", "24x16x12", "--dtype", "float32", "--processes", "1"]
    arguments += ["--seconds", "0", "--grid", "encoders", "--commit", "abc", "--out", str(out)]
    assert harness.main(BENCH, harness.arguments(None, arguments)) == 0
    assert "1/1 float32 24 16 12 8 0.0 forward frozen" in capsys.readouterr().out
    rows = results.read_rows(out)
    for direction in MEASURED:
        found = [row for row in rows if row["direction"] == direction]
        assert {(row["provider"], row["norm"]) for row in found} == MEASURED[direction]
        assert len({row["date"] for row in found}) == 1
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
    assert {row["r"] for row in rows if row["provider"] == "frozen"} == {"0"}
    assert {row["commit"] for row in rows} == {"abc"}
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["environment"]["commit"] == "abc" and report["given_up"] == []
    before = out.read_bytes()
    assert harness.main(BENCH, harness.arguments(None, arguments)) == 0
    assert capsys.readouterr().out == ""
    assert out.read_bytes() == before
    assert json.loads(out.with_suffix(".json").read_text()) == report


def test_what_was_given_up_is_tried_again_when_asked(tmp_path: Path) -> None:
    """Where the file has rows of other cells, too."""
    out = tmp_path / "bench.csv"
    options = ["--dtype", "float32", "--processes", "1", "--seconds", "0", "--grid", "encoders"]
    options += ["--commit", "abc", "--out", str(out)]

    def sizes(shape: str, *more: str) -> set[str]:
        arguments = harness.arguments(None, [*options, "--shapes", shape, *more])
        assert harness.main(BENCH, arguments) == 0
        return {row["M"] for row in results.read_rows(out)}

    assert sizes("24x16x12") == {"24"} and sizes("20x16x12") == {"20", "24"}
    rows = results.read_rows(out)
    lost = {results.cell_of(row) for row in rows if row["M"] == "24" and row["r"] != "0"}
    results.write_rows(out, [row for row in rows if row["M"] == "20"])
    beside = out.with_suffix(".json")
    report = json.loads(beside.read_text())
    report["given_up"] = [{"cell": list(cell), "commit": "abc"} for cell in lost]
    beside.write_text(json.dumps(report))
    assert sizes("24x16x12") == {"20"} and sizes("24x16x12", "--fresh") == {"20", "24"}
    assert json.loads(beside.read_text())["given_up"] == []


def test_results_of_a_changed_tree_say_so(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        named = "-c", "user.name=a", "-c", "user.email=a@b.c"
        run = ["git", "-C", str(tmp_path), *named, *command]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()

    assert commit_of(tmp_path) == ""
    (tmp_path / "docs").mkdir()
    for name in ("a.py", "README.md", "docs/a.png"):
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    commit = git("rev-parse", "--short", "HEAD")
    (tmp_path / "README.md").write_text("2")
    (tmp_path / "docs" / "a.png").write_text("2")
    assert commit_of(tmp_path) == commit
    (tmp_path / "a.py").write_text("2")
    assert commit_of(tmp_path) == f"{commit}-dirty"


@pytest.fixture
def good() -> list[providers.Provider]:
    return providers.providers("float32", "cpu")


def measure(compared: list, direction: str, dropout: float = 0.0, **more: Any) -> harness.Measured:
    cell = results.Cell("float32", 24, 16, 12, 4, dropout, direction)
    return harness.run_cell(compared, cell, "cpu", 0.0, FACTS, **more)


def names(rows: list[dict[str, str]]) -> list[str]:
    return [results.label(row) for row in rows]


@pytest.mark.parametrize("direction", MEASURED)
def test_dropout_has_the_reference_s_mask(good: list, direction: str) -> None:
    measured = measure(good, direction, dropout=0.1)
    grams = ["loradrop_grams is left out: statistics come with the backward pass"]
    left_out = grams if direction == "forward" else []
    assert (measured.errors, measured.left_out) == ([], left_out)
    assert {(row["provider"], row["norm"]) for row in measured.rows} == MEASURED[direction]


def spoilt(what: str) -> Callable[[Any], Any]:
    """Our op with its norm, and one of its results a little off."""

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


@pytest.mark.parametrize("what", ["y", "sqnorm", "dx", "dB"])
def test_a_wrong_provider_gets_no_number(what: str, good: list) -> None:
    compared = [good[0], providers.Provider("wrong", spoilt(what), norm=True), good[-2]]
    rows, (error,), _ = measure(compared, "forward_backward" if what[0] == "d" else "forward")
    assert [row["provider"] for row in rows] == ["frozen", "loradrop"]
    assert error.startswith("wrong+norm is wrong") and f"{what}:" in error


def test_a_failing_provider_costs_the_others_nothing(good: list) -> None:
    bad = providers.Provider("bad", spoilt("fault"), norm=True)
    absent = providers.Provider("absent", spoilt("fault"), rule=lambda _: "it is not built")
    rows, errors, left_out = measure([good[0], bad, absent], "forward")
    assert names(rows) == ["frozen"]
    assert errors == ["bad+norm fails, and gets no number: RuntimeError: no such kernel"]
    assert left_out == ["absent is left out: it is not built"]


def test_a_norm_that_changes_bits_gets_no_number() -> None:
    def other(case: Any) -> Any:
        call = providers.ours(case)
        return lambda: (call()[0] * (1.0 + 2.0**-23), None)

    compared = [*providers.probing("float32", "cpu")]
    ours = partial(providers.ours, norm=True)
    compared.append(providers.Provider("other", ours, True, masks=True, silent=other))
    rows, (error,), _ = measure(compared, "forward")
    assert error == "other+norm is wrong, and gets no number: y: other bits than without the norm"
    six = ["frozen", "peft", "peft_hook", "peft_hook_b", "loradrop", "loradrop+norm"]
    assert names(rows) == six


# A benchmark whose workers need no torch: "bad" ends its process at M = 3, nobody at M = 4.
STUB = """
import os, sys
sys.path.insert(0, FOLDER)
from lib import results
from loradrop.measuring import workers

def work(task, without, begin):
    cell = results.Cell(*task)
    if "bad" not in without:
        begin("bad")
        if cell.M == 3:
            os._exit(6)
    begin(workers.TASK)
    if cell.M == 4:
        os._exit(7)
    row = dict.fromkeys(results.COLUMNS, "1") | {n: str(v) for n, v in cell._asdict().items()}
    row |= {"date": f"day {cell.M}", "commit": sys.argv[sys.argv.index("--commit") + 1]}
    rows = [row | {"provider": "frozen", "r": "0"}, row | {"provider": "good", "norm": "0"}]
    if "bad" not in without:
        rows.append(row | {"provider": "bad", "norm": "0"})
    wrong = ["worse is wrong"] if cell.M == 5 else []
    return rows, wrong, ["cuda is left out: not built"]

workers.serve(work)
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: Patch) -> Stub:
    """Runs the stub on cells with these numbers of tokens, into b.csv: its exit status."""
    script = tmp_path / "bench_stub.py"
    script.write_text(STUB.replace("FOLDER", repr(str(FOLDER))))
    facts = FACTS | {"device": "1"}
    monkeypatch.setattr(harness.environment, "facts", lambda _, commit: facts | {"commit": commit})
    bench = harness.Bench(str(script), providers.providers, {"cpu": "encoders"})

    def run(*tokens: int, commit: str = "abc") -> int:
        shapes = ",".join(f"{m}x2x2" for m in tokens)
        arguments = ["--shapes", shapes, "--dtype", "float32", "--directions", "forward"]
        arguments += ["--processes", "1", "--commit", commit, "--out", str(tmp_path / "b.csv")]
        return harness.main(bench, harness.arguments(None, arguments))

    return run


def measured(folder: Path) -> dict[str, list[str]]:
    """M -> the providers that have a row."""
    found: dict[str, list[str]] = {}
    for row in results.read_rows(folder / "b.csv"):
        found.setdefault(row["M"], []).append(row["provider"])
    return found


def test_red_ends_with_1_and_a_refusal_is_said_once(stub: Stub, capsys: Capsys) -> None:
    assert stub(1, 2) == 0
    assert capsys.readouterr().out.count("cuda is left out") == 1
    assert stub(5) == 1
    assert "worse is wrong" in capsys.readouterr().out


def test_reasons_for_no_figure_are_kept(stub: Stub, tmp_path: Path) -> None:
    def kept() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        report = json.loads((tmp_path / "b.json").read_text())
        return report["errors"], report["left_out"]

    def cells(*tokens: int) -> list[str]:
        return [f"float32 {m} 2 2 8 0.0 forward" for m in tokens]

    assert stub(1, 4, 5) == 1
    absent, wrong = {"cuda is left out: not built": cells(1, 5)}, {"worse is wrong": cells(5)}
    ended = "the cell gets no number: its process ended with status 7: it printed nothing"
    assert kept() == ({ended: cells(4)} | wrong, absent)
    script = tmp_path / "bench_stub.py"
    script.write_text(script.read_text().replace("os._exit(7)", "pass"))
    assert stub(1, 4, 5, commit="def") == 0  # what was given up, and the rest holds
    assert kept() == (wrong, {"cuda is left out: not built": cells(1, 5, 4)})


def test_who_ends_its_process_costs_others_nothing(
    stub: Stub, tmp_path: Path, capsys: Capsys
) -> None:
    all_three, file = ["frozen", "good", "bad"], tmp_path / "b.csv"
    assert stub(2, 3, 4, 6) == 1
    assert measured(tmp_path) == {"2": all_three, "3": ["frozen", "good"], "6": all_three}
    said = capsys.readouterr().out
    assert "bad gets no number: its process ended with status 6" in said
    assert "the cell gets no number: its process ended with status 7" in said
    assert stub(2, 3, 4, 6) == 0 and capsys.readouterr().out == ""  # not tried again ...
    assert stub(2, 3, 4, 6, commit="def") == 1  # ... but at another commit: the cell given up
    assert capsys.readouterr().out.count("1/1") == 1
    rows = results.read_rows(file)
    assert {row["M"]: row["commit"] for row in rows} == {"2": "abc", "3": "abc", "6": "abc"}
    results.write_rows(file, [row | {"device": "another"} for row in rows])
    assert stub(2) == 0
    assert measured(tmp_path) == {"3": all_three[:2], "6": all_three, "2": all_three}
    assert "3 rows of another machine are replaced" in capsys.readouterr().out


def test_a_run_cut_off_keeps_its_cells(stub: Stub, tmp_path: Path, monkeypatch: Patch) -> None:
    asked: list[int] = []
    real = workers.answers

    def answers(command: Any, cells: list[results.Cell], patience: float) -> Any:
        asked[:] = [cell.M for cell in cells]
        for answer in real(command, cells, patience):
            if results.read_rows(tmp_path / "b.csv") and not asked == [2, 6]:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(workers, "answers", answers)
    with pytest.raises(KeyboardInterrupt):
        stub(1, 2, 6)
    assert measured(tmp_path) == {"1": ["frozen", "good", "bad"]}
    assert stub(1, 2, 6) == 0
    assert asked == [2, 6] and list(measured(tmp_path)) == ["1", "2", "6"]


def test_what_is_left_out_and_what_breaks_the_device(good: list, monkeypatch: Patch) -> None:
    compared = [good[0], providers.named("triton"), good[-3]]
    found = measure(compared, "forward", without={"triton", "peft"})
    assert names(found.rows) == ["frozen", "loradrop"]
    assert found.left_out == ["loradrop_triton is left out: as asked"]
    found = measure(compared, "forward", without={"eager"})  # which would be picked
    assert "loradrop is left out: as asked" in found.left_out
    monkeypatch.setattr(harness, "device_survives", lambda _: False)
    bad = providers.Provider("bad", spoilt("fault"))
    with pytest.raises(workers.BrokenDeviceError, match=r"bad.*no such kernel"):
        measure([good[0], bad], "forward")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--grid", "lama", "lama is unknown; there are encoders, encoders_all, llama"),
        ("--shapes", "2x3", "give shapes as MxKxN"),
        ("--directions", "backward", "choose of forward, forward_backward"),
    ],
)
def test_bad_options_are_named(option: str, value: str, says: str) -> None:
    with pytest.raises(SystemExit, match=says):
        harness.main(BENCH, harness.arguments(None, [option, value]))


def test_the_grids_have_the_points_they_are_named_for() -> None:
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
    assert decode and all(grids.in_graph(c, "cuda") for c in decode)
    assert not any(grids.in_graph(c, "cpu") for c in cells)


def test_peft_is_compiled_last_and_in_cells_of_its_own() -> None:
    *others, last = providers.providers("bfloat16", "cuda")
    assert last.name == "peft_compiled" and not any("compiled" in of.name for of in others)
    own = set(grids.cells(grids.GRIDS["compiled"], ["bfloat16"]))
    rest = [grid for name, of in grids.GRIDS.items() for grid in of if name != "compiled"]
    elsewhere = set(grids.cells(rest, ["bfloat16"]))
    assert own and not own & elsewhere and not any(grids.in_graph(cell, "cuda") for cell in own)
    assert not any(last.rule(cell) for cell in own)
    assert all("compiling takes long" in str(last.rule(cell)) for cell in elsewhere)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_measured_where_the_cpu_has_it(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, "native_bf16", lambda: native)
    assert grids.dtypes("cpu") == ("float32,bfloat16" if native else "float32")
    assert grids.dtypes("cuda") == "bfloat16"
