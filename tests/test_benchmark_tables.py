"""The README says what the result files say, and the arithmetic between them is right."""

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    return tables


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import timing

    return timing


def row(provider: str, us: float, process: int = 0, **columns: object) -> dict[str, str]:
    """One row of a result file; only what matters is given."""
    known = {
        "device": "a CPU",
        "dtype": "float32",
        **{"M": 4, "K": 3, "N": 2, "r": 0 if provider == "frozen" else 8, "dropout": 0.0},
        **{"norm": 0, "direction": "forward", "provider": provider},
        **{"median_us": us, "p20_us": us, "p80_us": us, "peak_bytes": ""},
        **{"torch": "2.0", "triton": "", "driver": "", "commit": "abc", "date": f"day {process}"},
    }
    return {name: str(value) for name, value in (known | columns).items()}


def group(process: int, frozen: float, peft: float, ours: float, **columns: object) -> list:
    """The rows of one process; the hook costs twice PEFT, our norm one more microsecond."""
    name = "peft_bf16" if columns.get("dtype") == "bfloat16" else "peft_fp32"
    return [
        row("frozen", frozen, process, **columns),
        row(name, peft, process, **columns),
        row("peft_hook", 2 * peft, process, norm=1, **columns),
        row("loradrop", ours, process, **columns),
        row("loradrop", ours + 1, process, norm=1, **columns),
    ]


THREE_PROCESSES = [*group(0, 100, 130, 110), *group(1, 200, 240, 230), *group(2, 100, 125, 112)]


def write_cell(folder: Path, task: str, arm: str, values: dict[int, float]) -> None:
    path = folder / "cpu" / "bench_quality.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(path.read_text()) if path.exists() else {"cells": []}
    for seed, value in values.items():
        cell = {"task": task, "arm": arm, "seed": seed, "metric": "accuracy", "value": value}
        parameters = 1000 + seed if arm == "drop" else 2000
        cell |= {"parameters": parameters, "seconds": 1.0, "kept": None, "targets": 12}
        report["cells"].append(cell)
    path.write_text(json.dumps(report))


def cells_of(table: str, first: str) -> list[str]:
    """The cells of the row that begins so, without the first."""
    lines = [line for line in table.splitlines() if line.startswith(f"| {first} |")]
    assert len(lines) == 1, table
    return [cell.strip() for cell in lines[0].strip("|").split("|")][1:]


def test_readme_equals_the_result_files(
    tables: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_check_writes_nothing_and_writing_satisfies_it(
    tables: ModuleType,
    timing: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    stale = "top\n<!-- table:lora_linear_cpu -->\nold\n<!-- /table:lora_linear_cpu -->\nend\n"
    readme.write_text(stale)
    (results / "cpu").mkdir(parents=True)
    timing.write_rows(results / "cpu" / "bench_lora_linear.csv", THREE_PROCESSES)
    arguments = ["--readme", str(readme), "--results", str(results)]
    assert tables.main([*arguments, "--check"]) == 1
    assert "-old" in capsys.readouterr().out
    assert readme.read_text() == stale
    assert tables.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("top\n<!--") and text.endswith("-->\nend\n") and "old" not in text
    assert tables.main([*arguments, "--check"]) == 0
    assert capsys.readouterr().out == ""
    timing.write_rows(results / "cpu" / "bench_lora_linear.csv", group(0, 100, 130, 140))
    assert tables.main([*arguments, "--check"]) == 1


def test_a_marker_without_a_result_says_so_and_no_marker_is_no_table(
    tables: ModuleType, tmp_path: Path
) -> None:
    assert tables.fill("nothing here\n", tmp_path) == "nothing here\n"
    for name in tables.TABLES:
        text = f"<!-- table:{name} -->\n<!-- /table:{name} -->\n"
        filled = f"<!-- table:{name} -->\nnot yet measured\n<!-- /table:{name} -->\n"
        assert tables.fill(text, tmp_path) == filled


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- table:speed -->\n<!-- /table:speed -->\n", "speed is unknown"),
        ("<!-- table:quality -->\n", "its end marker"),
        ("<!-- /table:quality -->\n<!-- table:quality -->\n", "its end marker"),
    ],
)
def test_broken_markers_are_named(tables: ModuleType, tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tables.fill(text, tmp_path)


def test_ratios_are_formed_within_a_process(timing: ModuleType) -> None:
    (cell,) = timing.paired(THREE_PROCESSES)
    assert cell.cell == ("float32", 4, 3, 2, 8, 0.0, "forward")
    assert cell.frozen_us == [100, 200, 100]
    assert cell.ratios["loradrop"] == [1.10, 1.15, 1.12]
    assert cell.median("loradrop") == 1.12  # the ratio of the medians is 1.12 / 1.00 by chance only
    assert cell.median("peft") == 1.25
    assert cell.median("peft_hook") == 2.50


def test_goal_by_hand(timing: ModuleType) -> None:
    rows = [*THREE_PROCESSES, *group(0, 10, 15, 12, dtype="bfloat16")]
    figures = timing.goal(timing.paired(rows), 8, "forward")
    assert (figures.cells, figures.processes) == (2, 1)
    assert figures.peft == pytest.approx(0.25 + 0.5)
    assert figures.loradrop == pytest.approx(0.12 + 0.2)
    assert figures.of_peft == pytest.approx(0.32 / 0.75)
    assert figures.norm == pytest.approx((0.01 + 0.1) / 2)
    assert timing.goal(timing.paired(rows), 64, "forward") is None


def test_rounding_of_the_cpu_table(tables: ModuleType, timing: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    rows = group(0, 12340, 15000, 13333)
    timing.write_rows(tmp_path / "cpu" / "bench_lora_linear.csv", rows)
    table = tables.lora_linear_cpu(tmp_path)
    assert cells_of(table, "4×3→2") == ["fp32", "12.3", "1.22", "2.43", "1.08", "1.08"]
    assert "of 1 processes" in table and "a CPU" in table and "commit abc" in table
    assert "0.373 of PEFT's (goal: at most 0.55)" in table


def test_gpu_table_reads_every_folder_but_the_cpu(
    tables: ModuleType, timing: ModuleType, tmp_path: Path
) -> None:
    for folder in ("cpu", "some-gpu"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "some-gpu" / "bench_lora_linear.csv"
    timing.write_rows(tmp_path / "cpu" / path.name, THREE_PROCESSES)
    assert tables.lora_linear_gpu(tmp_path) is None
    rows = [
        *group(0, 400, 520, 440, dtype="bfloat16", device="GPU"),
        row("peft_fp32", 720, dtype="bfloat16"),
    ]
    timing.write_rows(path, rows)
    table = tables.lora_linear_gpu(tmp_path)
    assert cells_of(table, "4×3→2")[:5] == ["bf16", "8", "0", "forward", "400"]
    assert cells_of(table, "4×3→2")[5:] == ["1.30", "2.60", "1.10", "1.10", "1.80"]


def test_paired_difference_by_hand(tables: ModuleType) -> None:
    arm, base = {0: 0.80, 1: 0.84, 2: 0.79, 7: 0.1}, {0: 0.81, 1: 0.82, 2: 0.80, 3: 0.9}
    # −1, +2 and −1 points: mean 0, standard deviation √3, standard error 1
    assert tables.difference(arm, base) == "+0.0 ± 1.0 (n=3)"
    assert tables.difference({0: 0.80}, base) == "−1.0 (n=1)"
    assert tables.difference({9: 0.5}, base) == "not shown"
    assert tables.spread([0.80, 0.82, 0.84]) == "82.0 ± 2.0 (n=3)"
    assert tables.spread([0.805]) == "80.5 (n=1)"


def test_quality_table(tables: ModuleType, tmp_path: Path) -> None:
    write_cell(tmp_path, "stdlib", "LoRA r=8", {0: 0.50, 1: 0.60})
    write_cell(tmp_path, "mrpc", "LoRA r=8", {0: 0.70})
    write_cell(tmp_path, "stdlib", "drop", {0: 0.52, 1: 0.60})
    stdlib, mrpc = tables.quality(tmp_path).split("\n\n")
    assert cells_of(stdlib, "LoRA r=8") == ["2,000", "55.0 ± 7.1 (n=2)", ""]
    assert cells_of(stdlib, "drop") == ["1,000–1,001", "56.0 ± 5.7 (n=2)", "+1.0 ± 1.0 (n=2)"]
    assert cells_of(mrpc, "drop") == ["not shown"] * 3
    assert "dev accuracy" in mrpc.splitlines()[0]


def test_other_columns_are_refused(timing: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "bench_lora_linear.csv"
    path.write_text("device,us\ncpu,3\n")
    with pytest.raises(ValueError, match="columns"):
        timing.read_rows(path)
    assert timing.read_rows(tmp_path / "none.csv") == []
