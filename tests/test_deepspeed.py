"""DeepSpeed's ZeRO-1 and ZeRO-2 in two processes, where it is installed."""

import json
from pathlib import Path

import pytest
from torchrun import torchrun

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def test_two_ranks_of_zero_are_one_process_of_twice_the_batch(tmp_path: Path) -> None:
    """With a shared adapter; saved by every rank and loaded into a model that is not sharded."""
    done = torchrun(Path(__file__).with_name("zero_fit.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in (1, 2):
        for rank in (0, 1):
            found = json.loads((tmp_path / f"{stage}.{rank}.json").read_text())
            assert found["stage"] == stage
            assert found["off"] == pytest.approx([0.0, 0.0], abs=1e-5)
