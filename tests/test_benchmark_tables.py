"""The tables say what the result files say, and the arithmetic between them is right."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas")

import tables
from lib import cpu_tables, gpu_tables, measured, results

CHIP = {"arch": 90, "sms": 132, "l2_bytes": 50 << 20}
HALF = {"dtype": "bfloat16", "device": "GPU", "M": 8192, "K": 4096, "N": 4096}


def row(provider: str, us: float, process: int = 0, **columns: object) -> dict[str, str]:
    """One row of a result file; only what matters is given."""
    known = {
        **{"device": "a CPU", "torch": "2.0", "triton": "", "driver": "", "commit": "abc"},
        **{"M": 4, "K": 3, "N": 2, "r": 0 if provider == "frozen" else 8, "dropout": 0.0},
        **{"norm": 0, "direction": "forward", "provider": provider, "dtype": "float32"},
        **{"median_us": us, "p20_us": us, "p80_us": us, "peak_bytes": "", "date": f"day {process}"},
    }
    return {name: str(value) for name, value in (known | columns).items()}


def group(process: int, frozen: float, peft: float, ours: float, **columns: object) -> list:
    """The rows of one process; the hook costs twice PEFT, our norm one more microsecond."""
    name = "peft_bf16" if columns.get("dtype") == "bfloat16" else "peft_fp32"
    us = [("frozen", frozen, 0), (name, peft, 0), ("peft_hook", 2 * peft, 1)]
    us += [("loradrop", ours, 0), ("loradrop", ours + 1, 1)]
    return [row(who, time, process, norm=norm, **columns) for who, time, norm in us]


def cell(us: dict[str, float], date: int = 0, **columns: Any) -> list[dict[str, str]]:
    """The rows of one cell, rank 16; the frozen product takes 100 µs. A name may end in +norm."""
    rows = [row("frozen", 100, date, **HALF | columns, r=0)]
    for name, value in us.items():
        own = {"r": 16, "norm": int(name.endswith("+norm") or name.startswith("peft_hook"))}
        rows.append(row(name.removesuffix("+norm"), value, date, **HALF | columns | own))
    return rows


THREE_PROCESSES = [*group(0, 100, 130, 110), *group(1, 200, 240, 230), *group(2, 100, 125, 112)]


def write_csv(folder: Path, rows: list[dict[str, str]], name: str = "bench_lora_linear") -> Path:
    """A result file, and the JSON beside it."""
    path = folder / f"{name}.csv"
    results.write_rows(path, rows)
    report = {"environment": {"chip": CHIP, "device": "GPU"}}
    path.with_suffix(".json").write_text(json.dumps(report))
    return path


def cells_of(table: str, first: str) -> list[str]:
    """The cells of the row that begins so, without the first."""
    lines = [line for line in table.splitlines() if line.startswith(f"| {first} |")]
    assert len(lines) == 1, table
    return [cell.strip() for cell in lines[0].removeprefix(f"| {first} |").strip("|").split("|")]


# Documents


def test_documents_and_points_equal_the_result_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    marked = "".join(path.read_text() for path in tables.DOCUMENTS)
    assert all(f"<!-- table:{name} -->" in marked for name in tables.TABLES)


def test_check_writes_nothing_and_writing_satisfies_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, points, found = tmp_path / "page.md", tmp_path / "points.json", tmp_path / "results"
    stale = "top\n<!-- table:lora_linear_cpu -->\nold\n<!-- /table:lora_linear_cpu -->\nend\n"
    page.write_text(stale)
    points.write_text("{}")
    write_csv(found / "cpu", THREE_PROCESSES)
    write_csv(found / "gpu", cell({"loradrop_thin": 112}))
    arguments = ["--documents", str(page), "--measured", str(points), "--results", str(found)]
    assert tables.main([*arguments, "--check"]) == 1
    said = capsys.readouterr().out
    assert "-old" in said and '"us": {"thin": 112.0}' in said
    assert (page.read_text(), points.read_text()) == (stale, "{}")
    assert tables.main(arguments) == 0
    text = page.read_text()
    assert text.startswith("top\n<!--") and text.endswith("-->\nend\n") and "old" not in text
    assert json.loads(points.read_text())["points"] == measured.points(found)
    assert tables.main([*arguments, "--check"]) == 0
    assert capsys.readouterr().out == ""
    write_csv(found / "cpu", group(0, 100, 130, 140))
    assert tables.main([*arguments, "--check"]) == 1


def test_a_marker_without_a_result_says_so_and_no_marker_is_no_table(tmp_path: Path) -> None:
    assert tables.fill("nothing here\n", tmp_path) == "nothing here\n"
    for name in tables.TABLES:
        text = f"<!-- table:{name} -->\n<!-- /table:{name} -->\n"
        says = "Not yet measured on a GPU." if name == "gpu" else "not yet measured"
        filled = f"<!-- table:{name} -->\n{says}\n<!-- /table:{name} -->\n"
        assert tables.fill(text, tmp_path) == filled


BROKEN = {
    "<!-- table:speed -->\n<!-- /table:speed -->\n": "speed is unknown",
    "<!-- table:sizes -->\n": "its end marker",
    "<!-- /table:sizes -->\n<!-- table:sizes -->\n": "its end marker",
}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_markers_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=BROKEN[text]):
        tables.fill(text, tmp_path)


# Ratios


def test_ratios_are_formed_within_a_process() -> None:
    table = results.ratios(THREE_PROCESSES)
    assert list(table["frozen"]) == [100, 200, 100]
    assert list(table["loradrop"]) == pytest.approx([1.10, 1.15, 1.12])
    ((index, of),) = results.medians(table).iterrows()
    assert results.Cell(*index) == ("float32", 4, 3, 2, 8, 0.0, "forward")
    assert of["loradrop"] == pytest.approx(1.12)  # the ratio of the medians is the same by chance
    assert (of["peft"], of["peft_hook"]) == (1.25, 2.50)
    # rows without their frozen product
    assert results.ratios([]).empty
    assert results.ratios(cell({"loradrop": 130})[1:] + THREE_PROCESSES[:1]).empty


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bench_lora_linear.csv"
    path.write_text("device,us\ncpu,3\n")
    with pytest.raises(ValueError, match="columns"):
        results.read_rows(path)
    assert results.read_rows(tmp_path / "none.csv") == []


# The tables of a CPU


def test_overheads_by_hand() -> None:
    rows = [*THREE_PROCESSES, *group(0, 10, 15, 12, dtype="bfloat16")]
    figures = cpu_tables.overheads(results.ratios(rows))
    assert figures["peft"] == pytest.approx(0.25 + 0.5)
    assert figures["loradrop"] == pytest.approx(0.12 + 0.2)
    assert figures["of_peft"] == pytest.approx(0.32 / 0.75)
    assert figures["norm"] == pytest.approx((0.01 + 0.1) / 2)


def test_rounding_of_the_cpu_table(tmp_path: Path) -> None:
    write_csv(tmp_path / "cpu", group(0, 12340, 15000, 13333))
    table = cpu_tables.lora_linear_cpu(tmp_path)
    assert cells_of(table, "4×3→2") == ["fp32", "12.3", "1.22", "2.43", "1.08", "1.08"]
    assert "of 1 processes" in table and "a CPU" in table and "commit abc" in table
    assert cells_of(table, "fp32")[-4:] == ["0.08", "–", "0.37", "0.0"]


def test_the_summary_of_a_cpu(tmp_path: Path) -> None:
    more = {"r": 64, "M": 4}
    rows = [
        *group(0, 100, 130, 110),
        *group(1, 100, 150, 120, K=7),
        *group(2, 100, 900, 900, **more),
    ]
    write_csv(tmp_path / "cpu", rows)
    table = cpu_tables.summary(tmp_path)
    assert table.startswith("| % longer, mean of 2 layers | PEFT | PEFT + norm hook | loradrop |")
    assert cells_of(table, "forward, fp32") == ["40", "180", "15", "16"]
    assert len(table.splitlines()) == 3


def test_what_statistics_cost(tmp_path: Path) -> None:
    assert cpu_tables.statistics_cost(tmp_path) is None
    ratio = {"the squared norm": {"low": 0.99, "median": 1.004, "high": 1.02}}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "bench_statistics.json").write_text(json.dumps({"ratio": ratio}))
    line = cpu_tables.statistics_cost(tmp_path).splitlines()[-1]
    assert line == "| the squared norm | +0.4 | −1.0 to +2.0 |"


def test_compositions_and_who_is_above_the_goal(tmp_path: Path) -> None:
    assert cpu_tables.compose(tmp_path) is None
    row = {"method": "slow", "r": 8, "parameters": 24690, "compose_us": 1234.5, "layer_us": 41000}
    rows = [
        row | {"part": 0.02009, "p20": 0.0194, "p80": 0.0222},
        row | {"method": "quick", "layer_us": 43000, "part": 0.00042, "p20": 0.0004, "p80": 0.02},
    ]
    sizes = {"M": 64, "K": 5, "N": 7, "targets": 2, "rounds": 9}
    about = {"device": "a CPU", "torch": "2.0", "commit": "abc"}
    path = tmp_path / "cpu" / "bench_compose.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"environment": about, "protocol": sizes, "rows": rows}))
    table = cpu_tables.compose(tmp_path)
    assert cells_of(table, "`slow`") == ["8", "12,345", "1,234", "2.01 (1.94–2.22)"]
    assert cells_of(table, "`quick`")[-1] == "0.04 (0.04–2.00)"
    assert "takes 42 ms forward and backward at M = 64" in table and "of 9 pairs" in table
    assert table.splitlines()[0].endswith("Above the goal of 2 %: `slow`.")
    path.write_text(json.dumps({"environment": about, "protocol": sizes, "rows": rows[1:]}))
    assert "Above the goal of 2 %: none." in cpu_tables.compose(tmp_path)


def test_scripts_side_by_side(tmp_path: Path) -> None:
    assert cpu_tables.side_by_side(tmp_path) is None
    peft = {"left": 2000, "step_s": 0.5, "rss_rise": 3 * 2**20, "checkpoint": 4_000_000}
    peft |= {"optimizer": 2_500_000, "adapter": 1_234_567}
    ours = peft | {"left": 1000, "step_s": 0.45, "adapter": 600_000}
    row = {"task": "sft", "lines": ["a", "b"], "sides": {"PEFT": peft, "loradrop": ours}}
    row["ratio"] = {"step": [0.8, 1.1, 0.9], "all": [1.0, 1.25, 1.1]}
    about = {"device": "a CPU", "torch": "2.0", "commit": "abc"}
    path = tmp_path / "cpu" / "bench_side_by_side.json"
    path.parent.mkdir()
    protocol = {"batch": 16, "steps": 30, "rounds": 3}
    path.write_text(json.dumps({"environment": about, "protocol": protocol, "rows": [row]}))
    table = cpu_tables.side_by_side(tmp_path)
    sizes = ["3", "4.00", "2.50"]
    assert cells_of(table, "sft, PEFT") == ["", "2,000", "0.500", "", "", *sizes, "1.23"]
    ratios = ["0.90 (0.80–1.10)", "1.10 (1.00–1.25)"]
    assert cells_of(table, "sft, loradrop") == ["2", "1,000", "0.450", *ratios, *sizes, "0.60"]
    assert "commit abc" in table and "medians of 3 rounds" in table


# The tables of a GPU


def test_layers_steps_and_what_the_dispatcher_gains(tmp_path: Path) -> None:
    both = {"direction": "forward_backward", "dropout": 0.1}
    rows = [
        *cell({"peft_bf16": 130, "addmm": 114, "loradrop": 110, "loradrop_thin": 109}),
        *cell({"peft_bf16": 120, "addmm": 110, "loradrop": 100}, 1, M=2048),
        *cell({"peft_bf16": 150, "addmm": 110, "loradrop": 120, "loradrop_thin": 105}, 2, **both),
        *cell({"loradrop": 120}, 3, N=64),
    ]
    write_csv(tmp_path / "a-gpu", rows)
    write_csv(tmp_path / "cpu", THREE_PROCESSES)
    key = {"size": "8b", "checkpointing": True}
    runs = [
        {**key, "arm": "loradrop", "median_ms": 1000.0, "peak_bytes": 2 << 30, "without": ["thin"]},
        {**key, "arm": "peft_bf16", "median_ms": 1200.0, "peak_bytes": 3 << 30},
        {**key, "arm": "seen", "median_ms": 9, "host_ms": 8.6, "busy_ms": 6.2, "peak_bytes": None},
        {**key, "arm": "unseen", "median_ms": 9, "host_ms": 1, "busy_ms": None, "peak_bytes": 0},
        {**key, "checkpointing": False, "arm": "peft_bf16", "fault": "out of memory"},
    ]
    (tmp_path / "a-gpu" / "bench_train_step.json").write_text(json.dumps({"cells": runs}))
    said = gpu_tables.gpu(tmp_path)
    assert said.startswith("### a-gpu\n\nLayers, over the frozen product; torch 2.0")
    first, few = "bfloat16 | 8192 | 4096", ["16", "0.0", "forward", "100.0"]
    assert cells_of(said, f"{first} | 64") == [*few, "–", "–", "1.2", "–"]
    assert f"| {first} | 4096 | {' | '.join(few)} | 1.3 | 1.14 | 1.1 | 1.09 |" in said
    assert "| 2048 |" not in said
    # The best of the others over loradrop: 114/110, 110/100 and 110/120
    assert "takes 1.01 times as long as loradrop (geometric mean of 3; 0.92 to 1.10)" in said
    behind = "on 1 of 3: bfloat16 8192 4096 4096 16 0.1 forward_backward: 1.14 of loradrop_thin"
    assert f"behind the best provider {behind}" in said
    assert "A training step, ms (with those until the host had launched it, and" in said
    whole = ["1000, 2.0", "1200, 3.0", "9 (9, 6)", "9 (1, ?), 0.0"]
    assert cells_of(said, "8b | True") == whole
    assert said.endswith("\n\nThe dispatcher did without thin in some steps.")
    assert cells_of(said, "8b | False") == ["–", "out of memory", "–", "–"]


def test_the_summary_of_a_gpu(tmp_path: Path) -> None:
    """loradrop as it was served; where it was not, the fastest backend."""
    both = {"direction": "forward_backward"}
    served = {"peft_bf16": 150, "loradrop": 117, "loradrop_triton": 117, "loradrop_cuda": 116}
    rows = [
        *cell(served),
        *cell({"peft_bf16": 157, "loradrop_triton": 127, "loradrop_cuda": 132}, 1, **both),
    ]
    write_csv(tmp_path / "a-gpu", rows)
    table = gpu_tables.summary(tmp_path)
    assert cells_of(table, "4096→4096") == ["1.50", "1.17", "1.57", "1.27"]


# The dispatcher's points


def test_the_measured_points(tmp_path: Path) -> None:
    assert measured.text(measured.points(tmp_path)) == '{"schema": 1, "points": []}\n'
    both = {"direction": "forward_backward", "dropout": 0.1}
    rows = cell({"peft_bf16": 130, "loradrop": 110, "loradrop_thin": 112.26, "gemm_triton": 1}, 0)
    rows += cell({"loradrop_thin": 114.26, "loradrop_triton": 109, "loradrop_thin+norm": 1}, 1)
    rows += cell({"loradrop_triton": 300, "loradrop_eager": 200}, 2, **both)
    path = write_csv(tmp_path / "a-gpu", rows)
    first, second = json.loads(measured.text(measured.points(tmp_path)))["points"]
    layer = {"device": "GPU", "arch": 90, "sms": 132, "dtype": "bfloat16"}
    layer |= {"k": 4096, "n": 4096, "m": 8192, "r": 16}
    assert first == {**layer, "dropout": 0, "grad": 0, "us": {"thin": 113.3, "triton": 109.0}}
    assert second == {**layer, "dropout": 1, "grad": 1, "us": {"eager": 200.0, "triton": 300.0}}
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"bench_lora_linear.json in a-gpu does not say"):
        measured.points(tmp_path)


def test_the_dispatcher_reads_what_was_measured(tmp_path: Path) -> None:
    import torch

    from loradrop.op.costs import Problem, fastest, nearest

    rows = cell({"loradrop_thin": 112, "loradrop_triton": 109}, 0)
    rows += cell({"loradrop_thin": 105, "loradrop_triton": 109}, 1, direction="forward_backward")
    write_csv(tmp_path / "a-gpu", rows)
    points = measured.points(tmp_path)
    for grad, best in ((False, "triton"), (True, "thin")):
        layer = Problem("cuda", torch.bfloat16, 7000, 4096, 4096, 8, 0.0, grad, True, 90, 132)
        point = nearest(layer, points)
        assert point is not None and fastest(point["us"]) == best
        assert nearest(layer._replace(arch=80), points) is None
