"""The roofline sheet, and the counts that it and the dispatcher go by."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loradrop.op import costs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import roofline


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA L4"])
def test_no_backend_is_below_the_floor(device: str) -> None:
    for problem in roofline.problems(device):
        least, frozen = roofline.floor(problem), roofline.frozen(problem)
        assert frozen.us < least.us < 1.2 * frozen.us
        for name in roofline.backends(problem):
            work = costs.work(problem, name)
            assert least.us < work.us and least.bytes < work.bytes
            assert least.launches < work.launches


def test_the_sheet_has_the_layout_of_the_measured_table() -> None:
    sheet = roofline.sheet("NVIDIA H100 80GB HBM3")
    results = (Path(__file__).parent.parent / "docs" / "results.md").read_text(encoding="utf-8")
    measured = next(line for line in results.splitlines() if line.startswith("| dtype | M | K"))
    head, *lines = [line for line in sheet.splitlines() if line.startswith("| ")]
    of, there = ([cell.strip() for cell in row.split("|")[1:-1]] for row in (head, measured))
    assert of[:8] == there[:8] and set(of[9:]) <= set(there)
    count = len(roofline.SHAPES) * len(roofline.RANKS) * len(roofline.DROPOUTS) * 2
    assert len(lines) == 2 * count + 3  # the second head, and a line of dashes for each
    assert "| bfloat16 | 8192 | 4096 | 14336 | 16 | 0.0 | forward | 1216 | 1.01 |" in sheet


@pytest.mark.parametrize("name", ["triton", "overlap"])
def test_the_launches_are_those_of_the_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from launches import MACHINES, Layer, call, extension
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.runtime.jit import JITFunction

    from loradrop.kernels import tiles
    from loradrop.op import fused

    ran: list[Any] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            if function is torch.ops.aten._to_copy.default:
                ran.append(function)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: ran.append(self))
    monkeypatch.setattr(tiles, "machine_of", lambda _: MACHINES[90])
    with extension() as called, Copies():
        layer = Layer(8192, 4096, 4096, 16)
        call(getattr(fused, name.upper()), layer)
    memsets = called.count("gemm_lora")
    problem = roofline.problems("NVIDIA H100")[1]
    assert len(ran) + len(called) + memsets == costs.work(problem, name).launches
