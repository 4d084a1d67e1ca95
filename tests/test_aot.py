"""The kernels compiled ahead of time for sm_80, sm_90 and sm_100, by two versions of Triton.

What is compiled is what the launchers launch (`launches.py`). A launch in `known_good.txt` was
compiled before, from the same source by the same compiler, and found good. The others are compiled
here, up to 40 of them; more call for the whole set. A line of the file is a version, an
architecture and a hash.

    python -m pytest tests/test_aot.py --all-launches        compiles everything, for half an hour
    python -m pytest tests/test_aot.py --all-launches --note-good    and notes what is good
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
KNOWN = HERE / "known_good.txt"
OLDER = ROOT / ".venv" / "triton-3.6.0"  # made by `make test`
DEVICES = {80: 108, 90: 132, 100: 148}  # sm_90 is the H100 and the H200
MOST = 40


def compiled(arch: int, path: list[str], *options: str) -> list[dict[str, Any]]:
    """What `aot.py` found in a process of its own: first its summary, then a line a launch."""
    done = subprocess.run(
        [sys.executable, HERE / "aot.py", str(arch), str(DEVICES[arch]), *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", DEVICES, ids="sm_{}".format)
@pytest.mark.parametrize("version", ["installed", "3.6.0"])
def test_every_launch_compiles_well(
    version: str, arch: int, request: pytest.FixtureRequest
) -> None:
    path = [] if version == "installed" else [str(OLDER)]
    if path and not OLDER.exists():
        pytest.skip("Triton 3.6.0 is not at hand: `make test` installs it beside the other")
    everything = request.config.getoption("--all-launches")
    options = ["--full"] if everything else ["--known", str(KNOWN), "--most", str(MOST)]
    summary, *found = compiled(arch, path, *options)
    assert version in ("installed", summary["triton"])
    assert summary["launches"] > 30
    assert summary["new"] <= MOST or everything, (
        f"{summary['new']} launches are not known to be good, more than {MOST}: compile all of "
        "them once with --all-launches --note-good"
    )
    wrong = [f"{facts['launch']}: {facts['faults']}" for facts in found if facts["faults"]]
    assert not wrong, "\n".join(wrong)
    assert len(found) == summary["compiled"]
    if everything and request.config.getoption("--note-good"):
        mine = f"{summary['triton']} {arch} "  # what stood here for it before is replaced
        others = {line for line in KNOWN.read_text().splitlines() if not line.startswith(mine)}
        good = {mine + facts["hash"] for facts in found}
        KNOWN.write_text("\n".join(sorted(others | good)) + "\n")


def test_the_judge_sees_faults() -> None:
    """The rules of `aot.faults`, on figures that are wrong in one respect each."""
    sys.path.insert(0, str(HERE))
    from aot import faults
    from launches import Launch

    constants = (("TMA", True), ("BM", 128), ("PRECISION", "tf32"))
    launch = Launch("_gemm_ext", (), constants, ("spm",), 8, 4)
    good = {
        **{"registers": 168, "spilled": 0, "shared": 229408, "serialised": False},
        "instructions": {"HGMMA": 5, "UTMALDG": 8, "UTMASTG": 2},
    }
    assert faults(90, launch, good) == []
    for change, word in (
        ({"spilled": 8}, "spilled"),
        ({"shared": 232449}, "shared memory"),
        ({"serialised": True}, "serialises"),
        ({"instructions": {}}, "no matrix instruction"),
        ({"instructions": {"HMMA": 4, "UTMALDG": 8, "UTMASTG": 2}}, "no HGMMA"),
        ({"instructions": {"HGMMA": 5, "LDGSTS": 8}}, "tensor memory"),
        ({"error": "it does not compile"}, "does not compile"),
    ):
        assert any(word in fault for fault in faults(90, launch, good | change)), word
    plain = launch._replace(constants=(("TMA", False), *constants[1:]))
    no_copies = good | {"instructions": {"HMMA": 4}}
    assert faults(80, plain, no_copies | {"shared": 1000}) == ["loads are not asynchronous"]


def test_a_model_needs_few_compilations() -> None:
    """Training Llama-3 8B with LoRA on all linear layers: at most eight binaries."""
    sys.path.insert(0, str(HERE))
    from launches import LLAMA, Layer, call, record

    from loradrop.kernels.tiles import Machine
    from loradrop.op import fused

    for backend in (fused.TRITON, fused.THIN):
        with record(Machine(90, 132)) as found:
            for k, n in LLAMA:
                call(backend, Layer(8192, k, n, 16))
        assert len(found) <= 8, Counter(launch.kernel for launch in found)
        with record(Machine(90, 132)) as again:  # other lengths bring none
            for m in (8192, 8191, 7168, 5000):
                for k, n in LLAMA:
                    call(backend, Layer(m, k, n, 16))
        assert len(again) <= 8, Counter(launch.kernel for launch in again)
