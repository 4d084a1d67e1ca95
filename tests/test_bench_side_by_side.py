"""The twins of the side-by-side benchmark: few lines apart, with the same start."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import trainer

import bench_side_by_side as bench

datasets = pytest.importorskip("datasets")


@pytest.mark.parametrize("task", bench.TASKS)
def test_at_most_three_lines_are_changed(task: str) -> None:
    peft, ours = (bench.code(folder / f"{task}.py") for folder in bench.SIDES.values())
    new = bench.changed(peft, ours)
    assert len(new) == 3 and all("loradrop" in line for line in new)
    assert len(bench.changed(ours, peft)) <= 3 and len(peft) > 30


def test_changed_lines() -> None:
    assert bench.changed(["a", "b", "c"], ["a", "x", "c", "d"]) == ["x", "d"]
    assert bench.changed(["a"], ["a"]) == []


@pytest.mark.parametrize("task", bench.TASKS)
def test_twins_begin_alike_and_ours_ends_with_half(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of memory is read, and forgotten, by Linux's /proc")
    pytest.importorskip("peft")
    if task == "sft_trl":
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = bench.arguments_of(task, tmp_path, steps=6, tiny_sizes=True)
    sides: dict[str, dict[str, Any]] = {}
    for side, folder in bench.SIDES.items():
        monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS[:1]])
        sides[side] = bench.run(folder / f"{task}.py", arguments, tmp_path / side)
        assert len(sides[side]["steps"]) == 5 and min(sides[side]["steps"]) > 0
    bench.require_equal(task, sides)
    peft, ours = sides["PEFT"], sides["loradrop"]
    assert peft["left"] == peft["trained"] and ours["left"] < 0.75 * ours["trained"]
    assert ours["adapter"] < peft["adapter"] and ours["optimizer"] < peft["optimizer"]
    with pytest.raises(ValueError, match=rf"{task}: PEFT begins with"):
        bench.require_equal(task, sides | {"PEFT": peft | {"loss": peft["loss"] + 1.0}})


def test_figures_of_some_rounds() -> None:
    def made(*steps: float) -> dict[str, Any]:
        keys = ("trained", "left", "checkpoint", "optimizer", "adapter", "rss_rise")
        return dict.fromkeys(keys, 7) | {"steps": [*steps]}

    runs = {
        "PEFT": [made(9.0, 2.0, 2.0, 2.0, 3.0), made(9.0, 2.0, 2.0, 4.0, 4.0)],
        "loradrop": [made(9.0, 3.0, 5.0, 1.0, 1.0), made(9.0, 3.0, 5.0, 2.0, 2.0)],
    }
    ratio = bench.ratios(runs, warm=3)
    assert ratio["step"] == [1.0 / 2.5, 2.0 / 4.0] and ratio["all"] == [19 / 18, 21 / 21]
    found = bench.summary(runs["loradrop"], warm=3)
    assert found["step_s"] == 1.5 and found["all_s"] == 20.0 and found["left"] == 7
