"""Two processes of torchrun are one process with twice the batch, also after one of them died."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("distributed_fit.py")


def torchrun(*arguments: Any, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), *map(str, arguments)]
    paths = [str(SCRIPT.parent.parent), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def found(folder: Path, rank: int = 0) -> dict[str, Any]:
    with open(f"{folder}.{rank}.json") as file:
        return dict(json.load(file))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = torchrun(SCRIPT, folder, 8, processes=1)
    assert done.returncode == 0, done.stderr
    return found(folder)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("steps", "kept", "tokens", "epoch"):
        assert one[name] == other[name], name
    assert one["scores"] == pytest.approx(other["scores"], rel=1e-5)
    assert one["metrics"]["accuracy"] == other["metrics"]["accuracy"]
    for mine, theirs in zip(one["adapters"], other["adapters"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)


def test_two_ranks_are_one_process_of_twice_the_batch(
    alone: dict[str, Any], tmp_path: Path
) -> None:
    done = torchrun(SCRIPT, tmp_path / "run", 4)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        same(found(tmp_path / "run", rank), alone)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == alone["steps"]
    again = torchrun(SCRIPT, tmp_path / "run", 4)
    assert again.returncode != 0 and "holds a run already" in again.stderr


def test_a_rank_that_died_is_resumed_to_the_same_end(alone: dict[str, Any], tmp_path: Path) -> None:
    done = torchrun(SCRIPT, tmp_path / "run", 4, "kill")
    assert done.returncode != 0 and not (tmp_path / "run" / "result.json").exists()
    assert (tmp_path / "run" / "main" / "checkpoint-4").is_dir()
    done = torchrun(SCRIPT, tmp_path / "run", 4, "resume")
    assert done.returncode == 0, done.stderr
    same(found(tmp_path / "run"), alone)


def test_two_ranks_cut_alike(tmp_path: Path) -> None:
    """The ranks of all targets from what both measured; new parameters would be new to DDP, so in
    one run of a Trainer it is refused.
    """
    done = torchrun(SCRIPT, tmp_path / "run", 4, "spectral")
    assert done.returncode == 0, done.stderr
    one, two = (found(tmp_path / "run", rank) for rank in (0, 1))
    assert one | {"rank": 1} == two
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert sum(map(len, one["adapters"])) == plan["parameters"]
    assert plan["cut"]["ranks"] and len(set(plan["cut"]["ranks"].values())) > 1
    refused = torchrun(SCRIPT, tmp_path / "other", 4, "spectral callback")
    assert refused.returncode != 0 and "which DDP does not know" in refused.stderr


def test_the_callback_in_two_ranks(tmp_path: Path) -> None:
    for processes, batch in ((1, 8), (2, 4)):
        done = torchrun(SCRIPT, tmp_path / str(processes), batch, "callback", processes=processes)
        assert done.returncode == 0, done.stderr
    one, *two = [found(tmp_path / name, rank) for name, rank in (("1", 0), ("2", 0), ("2", 1))]
    for other in two:
        assert other["kept"] == one["kept"] and len(one["kept"]) == 1
        for mine, theirs in zip(one["adapters"], other["adapters"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-6)


def test_a_sharded_model_trains_saves_and_loads(tmp_path: Path) -> None:
    done = torchrun(SCRIPT.with_name("sharded_fit.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["same"] and result["gap"] < 1e-6 and result["moved"] > 1e-3
    assert len(result["gaps"]) == 3 and max(result["gaps"].values()) < 1e-5
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    # torch.distributed.checkpoint goes on bit for bit, and the assignment is in it
    parts = result["checkpoint"]
    assert parts["equal"] and parts["moved"] > 1e-3
    assert "lora_bank._extra_state" in parts["keys"]
    assert not any(key.startswith("bert.") for key in parts["keys"])  # not the frozen base
    assert "Missing key" in parts["refused"] and "lora_bank.pairs.3" in parts["refused"]
    assert len(list((tmp_path / "parts").glob("*.distcp"))) == 2
