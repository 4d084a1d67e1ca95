"""The kernels compiled ahead of time for every architecture, by two versions of Triton.

What is compiled is what the launchers launch (`launches.py`): in the usual run some launches that
have names there, with `-m every_launch` all of them, which takes an hour.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.aot
pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OLDER = ROOT / ".venv" / "triton-3.6.0"  # made by `make test`
ARCHS, VERSIONS = (80, 86, 89, 90, 100, 120), ("installed", "3.6.0")
# Those of the usual run: each takes a minute.
USUAL = {(80, "installed"), (90, "installed"), (120, "installed"), (100, "3.6.0")}


def each_target(usual: set[tuple[int, str]]) -> pytest.MarkDecorator:
    """Every architecture with both versions: what is not usual, only with -m every_launch."""
    rare = pytest.mark.every_launch
    pairs = [(arch, version) for arch in ARCHS for version in VERSIONS]
    return pytest.mark.parametrize(
        ("arch", "version"),
        [pytest.param(*pair, marks=() if pair in usual else rare) for pair in pairs],
        ids=[f"sm_{arch}-{version}" for arch, version in pairs],
    )


def compiled(version: str, arch: int, *options: str) -> list[dict[str, Any]]:
    """What `aot.py` found in a process of its own, a dict for each launch; all of them are good."""
    if version != "installed" and not OLDER.exists():
        pytest.skip("Triton 3.6.0 is not installed: `make test` puts it beside the other")
    path = [ROOT] if version == "installed" else [OLDER, ROOT]
    done = subprocess.run(
        [sys.executable, HERE / "aot.py", str(arch), *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary, *found = map(json.loads, done.stdout.splitlines())
    assert version in ("installed", summary["triton"])
    wrong = [f"{facts['name']}: {facts['faults']}" for facts in found if facts["faults"]]
    assert not wrong, "\n".join(wrong)
    assert len(found) == summary["launches"] > 0
    return found


@each_target(USUAL)
def test_named_launches_compile_well(version: str, arch: int) -> None:
    sys.path.insert(0, str(HERE))
    from launches import NAMED

    assert [facts["name"] for facts in compiled(version, arch)] == list(NAMED[arch])


@each_target(set())
def test_every_launch_compiles_well(version: str, arch: int) -> None:
    assert len(compiled(version, arch, "--every")) > 130


def test_the_names_cover_all_kernels_and_their_variants() -> None:
    """Each kernel, and of each constant that switches something on or off both sides."""
    sys.path.insert(0, str(HERE))
    from launches import MACHINES, launches, named

    def variants(some: Any) -> set[tuple[str, str, Any]]:
        return {
            (launch.kernel, name, value)
            for launch in some
            for name, value in launch.constants
            if isinstance(value, bool | str)
        }

    wanted = variants(launch for machine in MACHINES.values() for launch in launches(machine))
    covered = variants(launch for arch in MACHINES for launch, _ in named(arch).values())
    assert len(wanted) > 40 and wanted == covered, wanted ^ covered


def test_the_judge_sees_faults() -> None:
    """The rules of `aot.faults`, on figures that are wrong in one respect each."""
    sys.path.insert(0, str(HERE))
    from aot import faults
    from launches import Launch

    constants = (("TMA", True), ("BM", 128), ("PRECISION", "tf32"))
    launch = Launch("_gemm_ext", (), constants, ("spm",), 8, 4)
    good = {
        **{"registers": 168, "spilled": 0, "shared": 229408, "serialised": False, "early": 0},
        "instructions": {"HGMMA": 5, "UTMALDG": 8, "UTMASTG": 2},
    }
    assert faults(90, launch, good) == []
    for change, word in (
        ({"spilled": 8}, "spilled"),
        ({"shared": 232449}, "shared memory"),
        ({"serialised": True}, "serialises"),
        ({"early": 1}, "another warpgroup"),
        ({"instructions": {}}, "nothing is stored"),
        ({"instructions": {"UTMALDG": 8, "UTMASTG": 2}}, "no matrix instruction"),
        ({"instructions": {"HMMA": 4, "UTMALDG": 8, "UTMASTG": 2}}, "no HGMMA"),
        ({"instructions": {"HGMMA": 5, "LDGSTS": 8, "STG": 2}}, "tensor memory"),
        ({"error": "it does not compile"}, "does not compile"),
    ):
        assert any(word in fault for fault in faults(90, launch, good | change)), word
    plain = launch._replace(constants=(("TMA", False), *constants[1:]))
    no_copies = good | {"instructions": {"HMMA": 4, "STG": 2}}
    assert faults(80, plain, no_copies | {"shared": 1000}) == ["loads are not asynchronous"]


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [("_shrink", {"sar": 1}), ("_gemm_ext", {"Q_T": True}), ("_outer", {"sor": 1})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rank_8_is_loaded_as_wide_as_rank_16(kernel: str, constants: dict[str, Any]) -> None:
    """Rows of eight numbers begin at whole 16 bytes, but not at whole 16 numbers."""
    sys.path.insert(0, str(HERE))
    from aot import compile_launch
    from launches import Layer, Pick, the_launch

    loads = []
    for r in (8, 16):
        pick = Pick(Layer(8192, 4096, 4096, r), kernel, constants)
        loads.append(compile_launch(*the_launch(pick, 90), 90)["loads"])
    assert loads[0] == loads[1] and any(name.endswith(".128") for name in loads[1]), loads


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (["WARPGROUP.DEPBAR.LE gsb0, 0x1", "BAR.SYNC 0x0", "UTMALDG.2D [UR4], [UR8]"], 0),
        (["BAR.SYNC 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "@UP2 UTMALDG.2D [UR4], [UR8]"], 1),
        (["WARPGROUP.DEPBAR.LE gsb0, 0x1", "@P0 BRA `(.L_x_0)", "BAR.SYNC 0x0", ".L_x_0:",
          "UTMALDG.2D [UR4], [UR8]"], 1),  # one way goes past the barrier
        ([".L_x_1:", "UTMALDG.2D [UR4], [UR8]", "WARPGROUP.DEPBAR.LE gsb0, 0x1",
          "@!P1 BRA `(.L_x_1)", "EXIT"], 1),  # round the loop
        (["WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT", "UTMALDG.2D [UR4], [UR8]"], 0),  # no way there
    ],
)  # fmt: skip
def test_the_judge_sees_memory_that_is_filled_early(lines: list[str], count: int) -> None:
    sys.path.insert(0, str(HERE))
    from aot import early_refills

    code = [line if line.endswith(":") else f"        /*0a10*/   {line} ;" for line in lines]
    assert early_refills("\n".join(code)) == count


def test_the_overlap_backend_is_recorded() -> None:
    """Beside one launch for x and h: the Gram matrices of that h, and the gradients of A and B."""
    sys.path.insert(0, str(HERE))
    from launches import MACHINES, Layer, call, extension, record

    from loradrop.op import fused

    with record(MACHINES[90]) as found, extension() as called:
        call(fused.OVERLAP, Layer(8192, 4096, 4096, 16, norm=True))
    assert called == ["gemm_lora", "gemm_lora"]
    kernels = {"_cast", "_gram", "_add_blocks", "_sqnorm", "_outer", "_add_planes"}
    assert {launch.kernel for launch in found} == kernels
    with record(MACHINES[90]) as found, extension() as called:
        call(fused.OVERLAP, Layer(8, 4096, 4096, 16, norm=True))
    assert called == ["decode", "gemm_lora"]


def test_a_model_needs_few_compilations() -> None:
    """Training Llama-3 8B with LoRA on all linear layers: at most eight binaries."""
    sys.path.insert(0, str(HERE))
    from launches import LLAMA, MACHINES, Layer, call, record

    from loradrop.op import fused

    for backend in (fused.TRITON, fused.THIN):
        with record(MACHINES[90]) as found:
            for k, n in LLAMA:
                call(backend, Layer(8192, k, n, 16))
        assert len(found) <= 8, Counter(launch.kernel for launch in found)
        with record(MACHINES[90]) as again:  # other lengths bring none
            for m in (8192, 8191, 7168, 5000):
                for k, n in LLAMA:
                    call(backend, Layer(m, k, n, 16))
        assert len(again) <= 8, Counter(launch.kernel for launch in again)
