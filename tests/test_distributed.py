"""Two processes of torchrun are one process with twice the batch, also after one of them died."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from run_cases import write_model, write_table
from torchrun import script_in_ranks, torchrun
from training_runs import ARGS, PLAIN, make_model, make_rows

from loradrop import fit

SCRIPT = "distributed_fit.py"
CALLBACKS = ["callback", *["peft callback"] * bool(importlib.util.find_spec("peft"))]


def found(folder: Path, mode: str, rank: int = 0) -> dict[str, Any]:
    return dict(json.loads((folder / f"{mode}.{rank}.json").read_text()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one process's runs."""
    folder = tmp_path_factory.mktemp("alone")
    done = script_in_ranks(SCRIPT, folder, 8, "fit", *CALLBACKS, processes=1)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two processes' runs, one after the other; in the last one of them dies."""
    folder = tmp_path_factory.mktemp("together")
    modes = (*CALLBACKS, "spectral", "spectral callback", "fit", "kill")
    done = torchrun(SCRIPT, folder, 4, *modes)
    assert done.returncode != 0 and (folder / "fit.1.json").exists(), done.stderr
    return folder


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("steps", "kept", "tokens", "epoch"):
        assert one[name] == other[name], name
    assert one["scores"] == pytest.approx(other["scores"], rel=1e-5)
    assert one["metrics"]["accuracy"] == other["metrics"]["accuracy"]
    for mine, theirs in zip(one["adapters"], other["adapters"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)


def test_two_ranks_are_one_process_of_twice_the_batch(alone: Path, together: Path) -> None:
    expected = found(alone, "fit")
    for rank in (0, 1):
        same(found(together, "fit", rank), expected)
    result = json.loads((together / "fit" / "result.json").read_text())
    assert result["steps"] == expected["steps"]


def test_a_rank_that_died_is_resumed_to_the_same_end(alone: Path, together: Path) -> None:
    """And what ended well is not begun again."""
    assert not (together / "kill" / "result.json").exists()
    assert (together / "kill" / "main" / "checkpoint-4").is_dir()
    done = script_in_ranks(SCRIPT, together, 4, "resume", "fit")
    assert done.returncode != 0 and "holds a run already" in done.stderr, done.stderr
    same(found(together, "resume"), found(alone, "fit"))


def test_two_ranks_cut_alike(together: Path) -> None:
    """The ranks of all targets from what both measured; new parameters would be new to DDP, so in
    one run of a Trainer it is refused.
    """
    one, two = (found(together, "spectral", rank) for rank in (0, 1))
    assert one | {"rank": 1} == two
    plan = json.loads((together / "spectral" / "plan.json").read_text())
    assert sum(map(len, one["adapters"])) == plan["parameters"]
    assert plan["cut"]["ranks"] and len(set(plan["cut"]["ranks"].values())) > 1
    for rank in (0, 1):
        refused = found(together, "spectral callback", rank)["refused"]
        assert "which DDP does not know" in refused


@pytest.mark.parametrize("mode", CALLBACKS)
def test_the_callback_in_two_ranks(mode: str, alone: Path, together: Path) -> None:
    one = found(alone, mode)
    for rank in (0, 1):
        other = found(together, mode, rank)
        assert other["kept"] == one["kept"] and len(one["kept"]) == 1
        for mine, theirs in zip(one["adapters"], other["adapters"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-6)


def test_the_command_in_two_processes(tmp_path: Path) -> None:
    """It says everything once, writes one run, and leaves no group to Python's own end."""
    model, table = write_model(tmp_path / "base"), write_table(tmp_path / "films.csv")
    settings = (
        *(f"model={model}", f"data.source={table}", "data.max_length=16", f"output={tmp_path}/run"),
        *("lora.r=4", "lora.method.probe_steps=2", "train.steps=4", "train.batch_size=3"),
        *("arms={LoRA: {method: lora}}",),
    )
    done = torchrun("command_in_ranks.py", "train", *settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1 and "LoRA-drop" in done.stdout
    assert "LOAD REPORT" not in done.stderr  # of transformers, about the head
    arms = [tmp_path / "run" / arm / "result.json" for arm in ("lora", "lora-drop")]
    assert [json.loads(arm.read_text())["steps"] for arm in arms] == [4, 4]


def test_the_verbs_in_two_processes(tmp_path: Path) -> None:
    """Whatever each rank draws: one model, no hanging, and what DDP cannot know is an error."""
    fit(make_model(), make_rows(), None, PLAIN, args=ARGS, output_dir=tmp_path / "alone")
    done = torchrun("distributed_verbs.py", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for rank in (first, second):
        assert rank["probe False"] == pytest.approx(rank["probe True"], rel=1e-9)
        assert min(rank["probe False"].values()) > 0
        assert "batches is empty" in rank["nothing"]
        assert rank["shared"] == rank["trained"] == rank["cut"] == 0.0
        for verb in ("truncate", "load"):
            assert f"{verb} is done, and made parameters that Distributed" in rank[verb]
        assert "begun with other options (train: processes)" in rank["resume"]
    assert first["probe False"] == second["probe False"]
    assert (tmp_path / "merged" / "model.safetensors").exists()
