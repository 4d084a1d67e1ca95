"""The tables of small adapters say what the result files say, and their arithmetic is right."""

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from lib import ROOT, size_picture, size_tables


def write(folder: Path, name: str, cells: list[dict[str, Any]]) -> Path:
    (folder / "cpu").mkdir(parents=True, exist_ok=True)
    (folder / "cpu" / f"{name}.json").write_text(json.dumps({"cells": cells}))
    return folder


def cut_cells() -> list[dict[str, Any]]:
    """Two seeds of one task: uncut, the rival, and one that diverges half as far."""
    cells = []
    for seed, loss in ((0, 0.5), (1, 1.0)):
        facts = {"task": "t", "seed": seed}
        cells.append(
            facts | {"arm": "uncut", "budget": 1.0, "kl": 0.0, "loss": loss, "accuracy": 0.8}
        )
        for arm, kl in (("weight", 0.04), ("loss", 0.02), ("weight, one rank for all", 0.08),
                        ("whole layers by output", 0.4)):  # fmt: skip
            for budget in (0.5, 0.25, 0.125):
                cut = {"arm": arm, "budget": budget, "kl": kl * (1 + seed), "loss": 1.1 * loss}
                cut |= {"predicted": 0.01 if arm == "loss" else None, "accuracy": 0.79}
                cut |= {"step": 0.75 if arm == "loss" else None}
                cells.append(facts | cut)
    return cells


def test_an_interval_is_that_of_student() -> None:
    assert size_tables.interval([3.0]) == (3.0, None)
    mean, half = size_tables.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=2e-3)
    assert size_tables.interval([0.0, 1.0] * 50)[1] == pytest.approx(1.96 * 0.05025, rel=1e-3)


def test_ablations_are_paired_with_lora_drop(tmp_path: Path) -> None:
    """By seed, as the mean over the tasks; an arm that nothing is paired with has no row."""
    first, second, *_ = size_tables.SUMMARY
    random, _, anew, *_ = size_tables.ABLATIONS
    cells = [
        {"task": task, "arm": arm, "seed": seed, "loss": loss * (1 + seed), "of": "dev"}
        | {"parameters": 96 if arm == random else 100}
        for seed in (0, 1)
        for task, arm, loss in (
            (first, size_tables.DROP, 1.0), (second, size_tables.DROP, 2.0), (first, random, 1.1),
            (second, random, 2.6),
        )
    ]  # fmt: skip
    cells += [cells[0] | {"arm": anew, "seed": 7}, cells[0] | {"arm": anew, "of": "held out"}]
    table = size_tables.ablations(write(tmp_path, "bench_sizes", cells))
    assert table is not None and len(table.splitlines()) == 3
    assert table.splitlines()[-1] == (
        "| random layers keep their adapters | 96 | +10.0 ± 0.0 % | +30.0 ± 0.0 % | "
        "+20.0 ± 0.0 % | 2 |"
    )
    assert size_tables.ablations(tmp_path / "nothing") is None


def test_how_figures_are_shown() -> None:
    assert size_tables.shown([-0.04], 1, " %", "+") == "+0.0 %"
    assert size_tables.shown([-1.0, -1.0], 1, "", "+") == "−1.0 ± 0.0"


def test_cuts(tmp_path: Path) -> None:
    results = write(tmp_path, "bench_cut", cut_cells())
    one, every = size_tables.cut(results), size_tables.cut_all(results)
    assert one is not None and every is not None
    assert "| t, n=2 | 0.5 left | 0.25 left | 0.125 left |" in one
    assert "| loss | 0.0300; −1.0; +10.0 % |" in one
    assert every.startswith("| 1 settings, 2 runs |")
    assert "| loss | 0.50; −1.0 (−1.0 to −1.0); +10.0 (+10.0 to +10.0) % |" in every
    assert "| weight | 1.00; " in every
    foretold = size_tables.foretold(results)
    assert foretold is not None and "weight" not in foretold
    assert "| loss | 3.0 (2.0 to 4.0) | 3.0 (2.0 to 4.0) | 3.0 (2.0 to 4.0) |" in foretold
    step = size_tables.step_time(results)
    assert step is not None
    assert "| t | loss | 0.75 ± 0.00; 0.0300 |" in step and "weight" not in step


def size_cells() -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = [
        {"task": "t", "arm": "LoRA r=1", "rate": 0.1, "seed": 100, "of": "held out", "loss": 9.0}
    ]
    for arm, size, loss, head in (("LoRA r=8", 8000, 0.9, 0.2), ("LoRA r=1", 1000, 1.0, None)):
        for seed in (0, 1):
            cells.append(
                {"task": "t", "arm": arm, "rate": 0.1, "head_rate": head, "seed": seed,
                 "of": "dev", "n": 10,
                 "parameters": size, "held_out_loss": 2 * loss, "loss": loss, "accuracy": 0.5}
            )  # fmt: skip
    return cells


def test_sizes(tmp_path: Path) -> None:
    found = size_tables.sizes(write(tmp_path, "bench_sizes", size_cells()))
    assert found is not None
    row = "| LoRA r=8 | 8,000 | 0.1; head 0.2 | 1.800 ± 0.000 | 0.900 ± 0.000 | 50.0 ± 0.0 | "
    assert row in found
    assert "| −10.0 ± 0.0 % | 2 |" in found and "9.0" not in found
    assert "| LoRA r=1 | 1,000 | 0.1 | 2.000" in found


def test_the_summary_has_the_arms_and_tasks_of_the_readme(tmp_path: Path) -> None:
    cells = [cell | {"task": "stdlib, same modules"} for cell in size_cells()]
    found = size_tables.sizes_summary(write(tmp_path, "bench_sizes", cells))
    assert found is not None
    assert "| dev loss | size | stdlib, all linear layers (n=2) |" in found
    assert "| LoRA r=8 | 1 | 0.900 ± 0.000 |" in found
    assert "| spectral, 1/8 | 1/8 | – |" in found


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = [cell | {"seed": seed} for cell in size_cells() for seed in range(size_picture.SEEDS)]
    size_picture.draw(write(tmp_path, "bench_sizes", cells), tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_measured_is_no_table(tmp_path: Path) -> None:
    assert {table(tmp_path) for table in size_tables.SIZE_TABLES.values()} == {None}


def test_settings_count_and_not_their_runs(tmp_path: Path) -> None:
    """A task with two runs weighs as much as one with a single run; and a way to cut that one task
    lacks is in no table over all of them.
    """
    cells = cut_cells()
    other = [c | {"task": "u"} for c in cells if c["seed"] == 0]
    for cell in other:
        if cell["arm"] != "uncut":
            cell["accuracy"] -= 0.03
    rare = [cell | {"arm": "rare"} for cell in cells if cell["arm"] == "loss"]
    results = write(tmp_path, "bench_cut", [*cells, *other, *rare])
    every, foretold = size_tables.cut_all(results), size_tables.foretold(results)
    assert every is not None and every.startswith("| 2 settings, 3 runs |")
    assert foretold is not None and "| rare |" not in every + foretold
    assert "| rare |" in str(size_tables.cut(results))
    assert "−2.5 (−4.0 to −1.0)" in every
    assert every.endswith("95 % interval: −2.5 ± 19.1 points, +10.0 ± 0.0 % of loss.")
    more = [c | {"task": f"{c['task']}{i}"} for i in range(5) for c in cells]
    most = [c | {"arm": "rare"} for c in more if c["arm"] == "loss" and c["task"] != "t4"]
    results = write(tmp_path, "bench_cut", [*more, *most])
    for table in (size_tables.cut_all(results), size_tables.foretold(results)):
        assert table is not None and "| loss |" in table and "| rare (4 settings) |" in table


def test_a_file_without_the_default_cut_has_no_mean_of_it(tmp_path: Path) -> None:
    cells = [cell for cell in cut_cells() if cell["arm"] != size_tables.DEFAULT]
    every = size_tables.cut_all(write(tmp_path, "bench_cut", cells))
    assert every is not None and "interval" not in every


@pytest.mark.parametrize("script", ["bench_sizes.py", "bench_methods.py", "bench_cut.py"])
def test_a_task_whose_files_are_not_there_is_told(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tasks", "sst2", "--data", str(tmp_path), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(SystemExit, match="no task is left"):
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    told = capsys.readouterr().out
    assert f"skipped: sst2, whose files are not there ({tmp_path}/sst2)" in told
