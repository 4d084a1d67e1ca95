"""The index arithmetic of csrc/ on the host, and that the checks notice a broken formula."""

import shutil
import subprocess
from pathlib import Path

import pytest
from planted import some

ROOT = Path(__file__).resolve().parent.parent
WALK, LAYOUT = "tile_walk", "smem_layout"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")


def run(check: str, headers: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    program = folder / check
    source = ROOT / "tests" / f"{check}_check.cpp"
    subprocess.run(
        ["g++", "-O1", "-std=c++17", "-Wall", "-Wextra", "-I", headers, source, "-o", program],
        check=True,
    )
    return subprocess.run([program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("check", [WALK, LAYOUT])
def test_check(check: str, tmp_path: Path) -> None:
    done = run(check, ROOT / "csrc", tmp_path)
    assert done.returncode == 0, done.stdout


BROKEN = {
    "sizes round down": (WALK, "(a + b - 1) / b", "a / b"),
    "thin chunks come first": (WALK, "index < wide ?", "index >= wide ?"),
    "a thin chunk is skipped": (WALK, "(index - wide) * kChunk", "(index - wide + 1) * kChunk"),
    "the last group is as high as the others": (WALK, "within % rows", "within % group"),
    "rows are walked column by column": (WALK, "within / rows * g", "within % rows * g"),
    "both CTAs of a cluster take the same rows": (WALK, "g.cluster + rank)", "g.cluster)"),
    "both CTAs load the same share": (WALK, "{rank * count, count}", "{0, count}"),
    "the producer waits for the round to come": (WALK, "return round ^ 1u", "return round"),
    "the parity never changes": (WALK, "round ^= 1u;", ""),
    "the peer's consumers are not waited for": (
        WALK,
        "return cluster * kConsumerWarps",
        "return kConsumerWarps",
    ),
    "a share of h ends beyond K": (WALK, "smaller(share, chunks - first)", "share"),
    "the walk of decode skips a chunk": (
        WALK,
        "first + step - chunks;",
        "first + step - chunks + 1;",
    ),
    "small tiles cost no more": (WALK, "g.tile_n == 128 ? 106 : 100", "100"),
    "no pairs": (WALK, "int cluster = 2; cluster >= 1", "int cluster = 1; cluster >= 1"),
    "pairs run on every SM": (WALK, "1 : sms / g.cluster", "1 : sms"),
    "the widest tile, whatever it costs": (
        WALK,
        "gemm_time(now, sms) < gemm_time(best, sms)",
        "false",
    ),
    "a second wave is as high as the first": (WALK, "16 * waves * slots", "16L * slots"),
    "clusters of 8, whatever they cost": (
        WALK,
        "decode_load(plan, r, occupancy) < decode_load(best, r, occupancy)",
        "false",
    ),
    "a second wave costs nothing": (WALK, "waves * (plan.rows +", "(plan.rows +"),
    "A costs nothing": (WALK, "+ decode_ranks(r) / plan.cluster", ""),
    "clusters without room are planned": (WALK, "if (slots == 0 || (", "if (("),
    "a row block is made by nobody": (WALK, "g.streams * g.cluster}", "g.streams * g.cluster + 1}"),
    "more slots than there is room for": (WALK, "shared_bytes / (bytes + 16)", "kStreamMaxSlots"),
    "a tile of h narrower than a box": (WALK, "64 * ceil_div(r, 64);", "stream_ranks(r);"),
    "the tiles lose a wave to h": (
        WALK,
        "clusters - ceil_div(tiles(g), waves)",
        "clusters - ceil_div(tiles(g), waves + 1)",
    ),
    "single CTAs make h": (WALK, "|| g.cluster != 2) return 0", ") return 0"),
    "half of the last ranks": (WALK, "left <= 32 ? 2 : 4", "2"),
    "no swizzle": (LAYOUT, "unit ^ (row & 7u)", "unit"),
    "boxes of N overlap": (LAYOUT, "? kBoxBytes : 16", "? kAtomBytes : 16"),
    "the stride is one row": (LAYOUT, "(kAtomBytes >> 4)", "(kRowBytes >> 4)"),
    "N-major steps go along the row": (LAYOUT, "kStepK * kRowBytes", "kStepK * 2"),
    "stmatrix swaps its matrices": (LAYOUT, "8 * (matrix & 1)", "8 * (matrix >> 1)"),
    "ldmatrix swaps its matrices": (LAYOUT, "row + lane % 16", "row + lane / 2"),
}


@pytest.mark.parametrize("fault", some(BROKEN))
def test_a_broken_formula_is_noticed(fault: str, tmp_path: Path) -> None:
    check, right, wrong = BROKEN[fault]
    for header in (ROOT / "csrc").glob("*.h"):
        shutil.copy(header, tmp_path)
    broken = tmp_path / f"{check}.h"
    text = broken.read_text(encoding="utf-8")
    assert text.count(right) == 1, f"{right!r} is not one formula of {broken.name}"
    broken.write_text(text.replace(right, wrong), encoding="utf-8")
    assert run(check, tmp_path, tmp_path).returncode != 0
