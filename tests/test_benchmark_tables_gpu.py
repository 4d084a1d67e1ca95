"""What is made of the result files of a GPU: tables, the dispatcher's own table, the roofline."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_benchmark_tables import cells_of, row

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
CHIP = {"arch": 90, "sms": 132, "l2_bytes": 50 << 20}
HALF = {"dtype": "bfloat16", "device": "GPU", "M": 8192, "K": 4096, "N": 4096}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def cell(us: dict[str, float], date: int = 0, **columns: Any) -> list[dict[str, str]]:
    """The rows of one cell, rank 16; the frozen product takes 100 µs. A name may end in +norm."""
    rows = [row("frozen", 100, date, **HALF | columns, r=0)]
    for name, value in us.items():
        bare = name in ("cublas", "gemm_triton")
        own = {"r": 0, "dropout": 0.0} if bare else {"r": 16}
        own["norm"] = int(name.endswith("+norm") or name.startswith("peft_hook"))
        rows.append(row(name.removesuffix("+norm"), value, date, **HALF | columns | own))
    return rows


def write(
    results: Path, name: str, rows: list[dict[str, str]], chosen: dict[int, str] | None = None
) -> Path:
    """A result file of a GPU, and the JSON beside it; `chosen` by the number of tokens."""
    import timing

    path = results / "gpu" / f"{name}.csv"
    timing.write_rows(path, rows)
    picks = [
        {"cell": list(at), "chosen": chosen[at.M]}
        for at in dict.fromkeys(timing.cell_of(r) for r in rows if r["r"] != "0")
        if chosen
    ]
    report = {"environment": {"chip": CHIP, "device": "GPU"}, "dispatcher": picks}
    path.with_suffix(".json").write_text(json.dumps(report))
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "gpu").mkdir()
    (tmp_path / "cpu").mkdir()
    return tmp_path


def test_a_product_without_adapter_belongs_to_its_cell(results: Path) -> None:
    import timing

    rows = cell({"peft_bf16": 130, "cublas": 99, "gemm_triton": 105})
    (found,) = timing.paired(rows)
    assert found.cell == ("bfloat16", 8192, 4096, 4096, 16, 0.0, "forward")
    assert found.ratios == {"peft": [1.30], "cublas": [0.99], "gemm_triton": [1.05]}


def test_summary_by_hand(results: Path) -> None:
    from gpu_layers import lora_linear_gpu

    assert lora_linear_gpu(results) is None
    both = {"direction": "forward_backward", "dropout": 0.1}
    rows = [
        *cell(
            {"peft_bf16": 130, "addmm": 114, "loradrop": 110, "loradrop_thin": 112}
            | {"loradrop_triton": 109, "cublas": 100, "gemm_triton": 105, "loradrop+norm": 111}
        ),
        *cell({"peft_bf16": 120, "addmm": 110, "loradrop": 100, "loradrop_triton": 120}, 1, M=2048),
        *cell({"peft_bf16": 150, "addmm": 110, "loradrop": 120, "loradrop_thin": 110}, 2, **both),
        *cell({"peft_bf16": 130, "loradrop": 125}, 3, M=2048, **both),
    ]
    write(results, "bench_lora_linear", rows, {8192: "thin", 2048: "eager"})
    said = lora_linear_gpu(results)
    assert "Our kernels serve 2 of 4 points." in said
    # The best of the others over loradrop: 114/110 and 110/120; their geometric mean
    assert "takes 0.97 times as long as loradrop (geometric mean; 0.92 to 1.04)" in said
    assert "loradrop_triton over the frozen product, median (range): forward 1.15 (1.09 to 1.20); "
    assert "faster than addmm on 1 of 2 points." in said
    assert "loradrop_thin over the frozen product" in said and "loradrop_cuda over" not in said
    assert "4096² 1.14" in said  # √(150/120 · 130/125)
    assert "gemm_triton without an adapter reaches 0.95 (0.95 to 0.95) of cuBLAS" in said
    assert "behind the best provider on 1 of 4 points: 8192×4096→4096 r=16 p=0.1" in said
    assert "1.09 of addmm" in said
    assert "goes: not yet measured" in said
    shown = [line for line in said.splitlines() if line.startswith("| 8192×4096→4096")]
    assert len(shown) == 2 and "2048×4096" not in said.split("- Our kernels")[0]


def part(us: float, flops: float = 0.0, moved: float = 0.0) -> dict[str, float]:
    return {"median_us": us, "flops": flops, "bytes": moved}


PARTS = {
    "cublas": part(100, 1000, 10),
    "gemm": part(110, 1000, 10),
    "gemm+chunk": part(115, 1020, 11),
    "shrink": part(20, 20, 8e3),
    "cublas of dx": part(200, 1000, 10),
    "gemm of dx": part(205, 1000, 10),
    "gemm+chunk of dx": part(213, 1010, 11),
    "shrink of dy": part(30, 20, 16e3),
    "outer for dA": part(13, 20, 10e3),
    "outer for dB": part(24, 20, 20e3),
}


def test_the_gap_by_hand() -> None:
    from gpu_layers import gap

    # A copy moves 1 kB/µs. The chunk's floor is 2 % of 100 µs, and 1 % of 200 µs.
    assert gap(PARTS, 1e9, False) == pytest.approx((100 + 2 + 8, 10, 20 - 8, 115 - 110 - 2, 0))
    assert gap(PARTS, 1e9, True) == pytest.approx(
        (110 + 200 + 2 + 16 + 10 + 20, 15, 12 + 14, 3 + 6, 3 + 4)
    )
    assert gap({name: PARTS[name] for name in list(PARTS)[:9]}, 1e9, True) is None


def test_gap_table_and_roofline(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import roofline
    from gpu_layers import lora_linear_gpu

    assert roofline.main(["--results", str(results), "--docs", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("*.svg"))
    write(results, "bench_lora_linear", cell({"loradrop": 110, "addmm": 120}), {8192: "triton"})
    sizes = {"M": 8192, "K": 4096, "N": 4096, "r": 16}
    rows = [{**sizes, "variant": name, **figures} for name, figures in PARTS.items()]
    rows.append({**sizes, "variant": "addmm_", "fault": "relative error 1"})
    ceilings = {"copy_bytes_per_s": 1e9, "bf16_flops_per_s": 1e9}
    report = {"environment": {"device": "GPU"}, "ceilings": ceilings, "rows": rows}
    (results / "gpu" / "bench_parts.json").write_text(json.dumps(report))
    line = "| 8192×4096→4096 | 16 | forward + backward | 358 | 15 | 26 | 9 | 7 |"
    table = lora_linear_gpu(results)
    assert line in table
    assert "shrink reaches 0.47 (0.40 to 0.53) of a copy's bandwidth" in table
    assert "The LoRA chunk costs 4.2 (3.9 to 4.5) % of the product" in table
    pictures = []
    for _ in range(2):
        assert roofline.main(["--results", str(results), "--docs", str(tmp_path)]) == 0
        pictures.append((tmp_path / "roofline-gpu.svg").read_bytes())
    assert pictures[0] == pictures[1] and b"<svg" in pictures[0]
    found = roofline.points(report)
    assert found["cublas"] == [(100.0, 1000 / 100 * 1e6), (100.0, 1000 / 200 * 1e6)]
    assert "addmm_" not in found and len(found["outer"]) == 2


def test_probe_table(results: Path) -> None:
    from gpu_tables import probe_gpu

    assert probe_gpu(results) is None
    hooks = {"peft_bf16": 200, "peft_hook": 300, "peft_hook_b": 220}
    rows = cell({"loradrop": 100, "loradrop+norm": 100.4, **hooks})
    rows += cell({"loradrop": 100, "loradrop+norm": 99.0, "loradrop_thin": 90}, 1, N=1024)
    write(results, "bench_probe", rows)
    table = probe_gpu(results)
    assert cells_of(table, "8192×4096→4096") == ["bf16", "forward", "+0.4 %", "+50.0 %", "+10.0 %"]
    missing = ["not yet measured"] * 2
    assert cells_of(table, "8192×4096→1024") == ["bf16", "forward", "−1.0 %", *missing]


def test_train_step_table(results: Path) -> None:
    from gpu_tables import train_step_gpu

    assert train_step_gpu(results) is None
    about = {"device": "GPU", "torch": "2.0", "commit": "abc"}
    key = {"size": "8b", "checkpointing": True}
    cells = [
        {**key, "arm": "peft_bf16", "median_ms": 1200.0, "peak_bytes": 3 << 30, "tokens": 8192},
        {**key, "arm": "loradrop", "median_ms": 1000.0, "peak_bytes": 2 << 30, "tokens": 8192},
        {**key, "checkpointing": False, "arm": "peft_bf16", "fault": "out of memory"},
    ]
    path = results / "gpu" / "bench_train_step.json"
    path.write_text(json.dumps({"environment": about, "cells": cells}))
    table = train_step_gpu(results)
    assert "8192 tokens" in table and "commit abc" in table
    on, off = (line.split(" | ") for line in table.splitlines() if line.startswith("| 8b |"))
    assert [figure.strip(" |") for figure in on[1:]] == ["on", "1200", "3.0", "1000 (1.20x)", "2.0"]
    assert off[1:3] == ["off", "out of memory"] and "not yet measured" in off[4]


def test_the_measured_points(results: Path, tmp_path: Path) -> None:
    import measured

    asset = tmp_path / "measured.json"
    arguments = ["--results", str(results), "--out", str(asset)]
    assert measured.main([*arguments, "--check"]) == 1  # there is no file
    assert measured.main(arguments) == 0
    assert asset.read_text() == '{"schema": 1, "points": []}\n'
    assert measured.main([*arguments, "--check"]) == 0
    both = {"direction": "forward_backward", "dropout": 0.1}
    rows = cell({"peft_bf16": 130, "loradrop": 110, "loradrop_thin": 112.26, "gemm_triton": 1}, 0)
    rows += cell({"loradrop_thin": 114.26, "loradrop_triton": 109, "loradrop_thin+norm": 1}, 1)
    rows += cell({"loradrop_triton": 300, "loradrop_eager": 200}, 2, **both)
    write(results, "bench_lora_linear", rows)
    assert measured.main([*arguments, "--check"]) == 1
    assert measured.main(arguments) == 0
    assert measured.main([*arguments, "--check"]) == 0
    first, second = json.loads(asset.read_text())["points"]
    layer = {"arch": 90, "sms": 132, "dtype": "bfloat16", "k": 4096, "n": 4096, "m": 8192, "r": 16}
    assert first == {**layer, "dropout": 0, "grad": 0, "us": {"thin": 113.3, "triton": 109.0}}
    assert second == {**layer, "dropout": 1, "grad": 1, "us": {"eager": 200.0, "triton": 300.0}}


def test_the_dispatcher_reads_what_was_measured(results: Path) -> None:
    import measured
    import torch

    from loradrop.op.costs import Problem, fastest, nearest

    both = {"direction": "forward_backward"}
    rows = cell({"loradrop_thin": 112, "loradrop_triton": 109}, 0)
    rows += cell({"loradrop_thin": 105, "loradrop_triton": 109}, 1, **both)
    write(results, "bench_lora_linear", rows)
    points = measured.points(results)
    for grad, best in ((False, "triton"), (True, "thin")):
        layer = Problem("cuda", torch.bfloat16, 7000, 4096, 4096, 8, 0.0, grad, True, 90, 132)
        point = nearest(layer, points)
        assert point is not None and fastest(point["us"]) == best
        assert nearest(layer._replace(arch=80), points) is None


def test_results_without_the_facts_of_their_gpu_are_refused(results: Path) -> None:
    import measured

    path = write(results, "bench_lora_linear", cell({"loradrop_thin": 112}))
    path.with_suffix(".json").unlink()
    with pytest.raises(SystemExit, match=r"bench_lora_linear.json in gpu does not say"):
        measured.main(["--results", str(results), "--check"])


def test_the_shipped_points_are_what_the_results_give() -> None:
    import measured

    assert measured.main(["--check"]) == 0
