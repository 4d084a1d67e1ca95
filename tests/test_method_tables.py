"""The benchmark of all methods: its sizes match LoRA's, its study searches and resumes, its tables
say what the cells say.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_methods
import bench_sizes
from lib import method_picture, method_tables, study
from lib.tasks import SETTINGS
from loradrop import methods
from loradrop.scores import Scores, Target
from loradrop.selection import assign

H, WIDE, LAYERS = 384, 1536, 6


def minilm(r: int) -> list[Target]:
    """The linear layers of MiniLM but for its head."""
    shapes = {"query": (H, H), "key": (H, H), "value": (H, H), "attention.output.dense": (H, H)}
    shapes |= {"intermediate.dense": (H, WIDE), "output.dense": (WIDE, H)}
    names = {f"encoder.layer.{i}.{name}": s for i in range(LAYERS) for name, s in shapes.items()}
    names["pooler.dense"] = (H, H)
    return [Target(name, name.rpartition(".")[2], *s, r) for name, s in names.items()]


def size_of(name: str, rank: int, options: dict[str, Any]) -> int:
    """What is left at the end of a run."""
    method, targets = methods.get(name)(**options), minilm(rank)
    full = sum(target.parameters for target in targets)
    if name == "spectral":
        return round(method.budget * full)
    if name == "lora_drop":
        scores = Scores(tuple(targets), torch.ones(1, len(targets)).double(), 1, "online")
        return assign(targets, method.decide(scores)).parameters
    if name == "adalora":
        return full
    bank = method.bank(targets, [1.0] * len(targets), [torch.empty(0)] * len(targets))
    return bank.trainable


@pytest.mark.parametrize("name", bench_methods.SIZES)
def test_sizes_are_those_of_lora(name: str) -> None:
    if name not in methods.available():
        pytest.skip(f"this version has no {name}")
    for budget, (rank, options) in bench_methods.SIZES[name].items():
        lora = sum(target.parameters for target in minilm(budget))
        assert abs(size_of(name, rank, options) / lora - 1) < 0.17, (name, budget)


def test_every_method_is_compared_and_those_that_lack_are_left_out() -> None:
    assert set(methods.available()) <= set(bench_methods.SIZES)
    found = bench_methods.arms(2, ["lora", "vera"])
    assert list(found) == ["lora, 2"] and found["lora, 2"].rank == 2
    assert found["lora, 2"].about == {"method": "lora", "budget": 2}
    assert list(bench_methods.arms(1, ["lora", "vera"])) == ["lora, 1", "vera, 1"]


# The study


def fake(tmp_path: Path, losses: dict[int, float | None], minutes: float = 9.0) -> study.Study:
    """A study whose runs only look up the loss at a rate of the grid."""
    arms = {"a": study.Arm(1, methods.LoRA()), "b": study.Arm(2, methods.LoRA(), like="a")}
    made = study.Study(None, tmp_path / "cells.json", minutes, arms, {})  # type: ignore[arg-type]
    made.started = []  # type: ignore[attr-defined]

    def run(task: str, arm: str, rate: float, seed: int) -> Any:
        made.started.append((rate, seed))  # type: ignore[attr-defined]
        yield arm, {"of": "dev", "loss": losses[study.RATES.index(rate)]}

    made._run = run  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("best", [0, 7, 9, 10, 14])
def test_the_rate_of_the_least_loss_is_found_and_not_looked_up_twice(
    best: int, tmp_path: Path
) -> None:
    losses = {k: 1.0 + abs(k - best) for k in range(15)}
    made = fake(tmp_path, losses)
    made.run([("stdlib", "a")], seeds=2)
    rates = [rate for rate, seed in made.started if seed == study.SEARCH_SEED]
    assert len(set(rates)) == len(rates) <= abs(best - 9) + 3
    final = [(rate, seed) for rate, seed in made.started if seed != study.SEARCH_SEED]
    assert final == [(study.RATES[best], 0), (study.RATES[best], 1)]
    again = fake(tmp_path, losses)
    again.run([("stdlib", "a")], seeds=3)
    assert again.started == [(study.RATES[best], 2)]
    written = json.loads((tmp_path / "cells.json").read_text())
    assert len(written["cells"]) == len(rates) + 3
    assert written["settings"]["rates"] == list(study.RATES)


def test_an_arm_takes_the_rate_of_another(tmp_path: Path) -> None:
    made = fake(tmp_path, {k: 1.0 + abs(k - 8) for k in range(15)})
    made.run([("stdlib", "b")], seeds=2)
    arms = [(cell["arm"], cell["seed"]) for cell in made.cells]
    assert arms == [*[("a", study.SEARCH_SEED)] * 3, ("b", 0), ("b", 1)]
    assert {cell["rate"] for cell in made.cells[3:]} == {study.RATES[8]}
    every = {name for n in bench_methods.BUDGETS for name in bench_methods.arms(n, ["rasa", "mos"])}
    assert every == {"rasa, 2", "rasa, 4", "mos, 1", "mos, 2", "mos, 4"}
    assert bench_methods.arms(4, ["rasa"])["rasa, 4"].like == "rasa, 2"
    assert bench_methods.arms(2, ["rasa"])["rasa, 2"].like is None


def test_a_rate_that_diverges_is_not_chosen_and_time_ends_a_study(tmp_path: Path) -> None:
    losses = {k: 15.0 - k if k < 11 else None for k in range(15)}
    assert fake(tmp_path, losses).search("stdlib", "a") == study.RATES[10]
    ended = fake(tmp_path / "ended", losses, minutes=0.0)
    assert ended.search("stdlib", "a") is None and not ended.started


def test_cells_of_another_s_are_not_taken_for_this_one_s(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    cell = {"task": "stdlib", "arm": "a", "rate": 4e-3, "seed": 0}
    path.write_text(json.dumps({"cells": [cell | {"s": 2.0}, cell | {"arm": "gone", "s": 1.0}]}))
    arms = {"a": study.Arm(1, methods.LoRA(), s=2.0)}
    same = study.Study(cast(Any, None), path, 9.0, arms, {})
    assert same.cell("stdlib", "a", 4e-3, 0) is not None
    arms = {"a": study.Arm(1, methods.LoRA(), s=0.5)}
    with pytest.raises(ValueError, match=r"cells of 'a' with s=2.0, which is s=0.5 now: rename"):
        study.Study(cast(Any, None), path, 9.0, arms, {})


def test_cells_of_another_head_rate_are_not_taken_for_this_one_s(tmp_path: Path) -> None:
    path, task = tmp_path / "cells.json", "stdlib, same modules"
    rate = SETTINGS[task].head_rate
    cell = {"task": task, "arm": "a", "rate": 4e-3, "seed": 0, "head_rate": rate}
    of_search = cell | {"arm": "head", "rate": 0.5, "head_rate": 0.5}
    path.write_text(json.dumps({"cells": [cell, of_search]}))
    arms = {"a": study.Arm(1, methods.LoRA()), "head": study.OF_HEAD}
    same = study.Study(cast(Any, None), path, 9.0, arms, {})
    assert same.cell(task, "a", 4e-3, 0) is not None
    with pytest.raises(ValueError, match=rf"'a' on '{task}' with a head rate of {rate}, .* None"):
        study.Study(cast(Any, None), path, 9.0, {"a": arms["a"]._replace(own=False)}, {})


def test_every_search_begins_on_the_grid() -> None:
    arms = [*bench_sizes.ARMS.values()]
    arms += [
        arm for n in (1, 2, 4) for arm in bench_methods.arms(n, [*bench_methods.SIZES]).values()
    ]
    assert {arm.first for arm in arms} <= set(study.RATES)
    assert set(bench_methods.FIRST) <= set(methods.available())


@pytest.mark.parametrize("task", ["stdlib, same modules", "mrpc"])
def test_a_cell_is_one_run(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run is called with, and what its cell says."""
    seen, head = {}, SETTINGS[task].head_rate
    assert (head is None) == (task == "mrpc")

    def fit(model: Any, rows: Any, dev: Any, lora: Any, *, args: Any, collate: Any) -> None:
        seen.update(lora=lora, args=args)

    given = SimpleNamespace(model=None, train=None, collate=None, missing=("head",))
    monkeypatch.setattr(study, "fit", fit)
    monkeypatch.setattr(study, "plan_of", lambda model: SimpleNamespace(facts={"zeros of A": 0.5}))
    monkeypatch.setattr(study, "judged", lambda given, search: {"of": "dev", "loss": 1.0})
    tasks: Any = SimpleNamespace(prepare=lambda name, train: given)
    (name, arm), *_ = bench_methods.arms(2, ["prilora"]).items()
    arms = {name: arm._replace(own=True)}
    made = study.Study(tasks, tmp_path / "cells.json", 9.0, arms, {})
    cell = made.cell(task, "prilora, 2", 4e-3, 1)
    assert cell is not None and cell.pop("seconds") >= 0
    assert cell == {
        **{"task": task, "arm": "prilora, 2", "rate": 4e-3, "seed": 1, "of": "dev"},
        **{
            "method": "prilora",
            "budget": 2,
            "s": 0.0625,
            "head_rate": head,
            "facts": {"zeros of A": 0.5},
            "loss": 1.0,
        },
    }
    lora = seen["lora"]
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (2, 0.125, "all-linear")
    assert lora.method == methods.get("prilora")() and lora.modules_to_save == ("head",)
    assert (seen["args"].learning_rate, seen["args"].head_learning_rate) == (4e-3, head)
    assert seen["args"].seed == 1
    made = study.Study(tasks, tmp_path / "head.json", 9.0, {"head": study.OF_HEAD}, {})
    cell = made.cell(task, "head", 0.064, 1)
    assert cell is not None and cell["head_rate"] == 0.064
    assert seen["args"].learning_rate == study.FIRST_RATE
    assert seen["args"].head_learning_rate == 0.064


# Tables and the picture


def write(folder: Path) -> Path:
    """Two seeds; one method is 10 % below LoRA of rank 1, and 20 % above LoRA of rank 4."""
    cells: list[dict[str, Any]] = [
        {"task": "t", "arm": "lora, 1", "rate": 0.1, "seed": 100, "of": "held out", "loss": 9.0}
    ]
    for name, budget, loss in (("lora", 1, 1.0), ("mos", 1, 0.9), ("lora", 4, 0.5),
                               ("mos", 4, 0.6), ("prilora", 4, 0.5)):  # fmt: skip
        for seed in (0, 1):
            facts = {"zeros of A": 0.4 + 0.1 * seed} if name == "prilora" else {}
            cells.append(
                {"task": "t", "arm": f"{name}, {budget}", "rate": 0.1, "seed": seed, "of": "dev",
                 "n": 10, "parameters": 1000 * budget, "held_out_loss": 2 * loss, "facts": facts,
                 "loss": loss, "accuracy": 0.5, "method": name, "budget": budget,
                 "seconds": 30 if name == "mos" else 20}
            )  # fmt: skip
    (folder / "cpu").mkdir(parents=True)
    (folder / "cpu" / "bench_methods.json").write_text(json.dumps({"cells": cells}))
    return folder


def test_tables(tmp_path: Path) -> None:
    results = write(tmp_path)
    one, every = method_tables.methods(results), method_tables.methods_all(results)
    assert one is not None and every is not None
    row = "| 1,000 | 0.1 | 1.800 ± 0.000 | 0.900 ± 0.000 | 50.0 ± 0.0 | −10.0 ± 0.0 % | 2 | 1.5 |"
    assert f"| 1 | mos {row}" in one and "| 4 | mos | 4,000 |" in one and "9.0" not in one
    assert "zeros of A 0.45" in one and "| +20.0 ± 0.0 % | 2 |" in one
    assert every.startswith("| dev loss against LoRA's, paired (n=2, tasks: 1) |")
    assert "| mos | −10.0 ± 0.0 % | +20.0 ± 0.0 % |" in every
    assert "| prilora | – | +0.0 ± 0.0 % |" in every and "| lora |" not in every
    file = results / "cpu" / "bench_methods.json"
    file.write_text(json.dumps({"cells": json.loads(file.read_text())["cells"][:-1]}))
    assert "| prilora | – | +0.0 % (n=1, tasks: 1) |" in (method_tables.methods_all(results) or "")


def test_the_frontier(tmp_path: Path) -> None:
    (cells,) = method_tables.by_method(write(tmp_path)).values()
    points = method_picture.points_of(cells)
    assert [(point.name, point.parameters) for point in points] == [
        *(("mos", 1000), ("lora", 1000), ("lora", 4000), ("prilora", 4000), ("mos", 4000)),
    ]
    best = method_picture.frontier(reversed(points))
    assert [(point.name, point.loss) for point in best] == [("mos", 0.9), ("lora", 0.5)]
    worse = method_picture.Point(8000, 0.5, 0.0, "as good, with more")
    assert method_picture.frontier([worse, *points]) == best
    assert method_picture.frontier([]) == []


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    method_picture.draw(write(tmp_path), tmp_path / "methods.png")
    assert (tmp_path / "methods.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_measured_is_no_table(tmp_path: Path) -> None:
    assert {table(tmp_path) for table in method_tables.METHOD_TABLES.values()} == {None}


def test_a_colour_is_one_size_in_every_panel(tmp_path: Path) -> None:
    """Also where a task lacks a size that another one has."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    (cells,) = method_tables.by_method(write(tmp_path)).values()
    colors = []
    for axes, of in zip(
        figure.subplots(2), (cells, {k: v for k, v in cells.items() if k[1] == 4}), strict=True
    ):
        handles: dict[str, Any] = {}
        method_picture._beside_lora(axes, of, ["mos"], [1, 4], handles)
        colors.append({name: bars.lines[0].get_color() for name, bars in handles.items()})
    assert set(colors[0]) == {"size of LoRA r=1", "size of LoRA r=4"}
    assert colors[1] == {"size of LoRA r=4": colors[0]["size of LoRA r=4"]}
