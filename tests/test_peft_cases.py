"""PEFT's own cases of LoRA, for `LoraDropConfig` and for `accelerate_peft`: see peft_cases.py.

They are in PEFT's source distribution, which `make test` fetches; without it they are skipped.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("peft", minversion="0.21")

HERE = Path(__file__).parent
VERSION = importlib.metadata.version("peft")
CASES = HERE.parent / ".venv" / f"peft-{VERSION}" / "tests" / "test_custom_models.py"


@pytest.mark.parametrize(
    ("face", "every", "least"),
    [
        ("config", 1, 380),
        ("accelerate", 4, 600),
        pytest.param("accelerate", 1, 2400, marks=pytest.mark.every_case),
    ],
)
def test_cases_of_peft(face: str, every: int, least: int, tmp_path: Path) -> None:
    if not CASES.exists():
        pytest.skip(f"the source distribution of PEFT {VERSION} is not in .venv")
    report = tmp_path / "report.xml"
    flags = ["-q", "-p", "peft_cases", "-p", "no:cacheprovider", "--tb=short", "-c", os.devnull]
    command = [*flags, f"--rootdir={CASES.parent}", f"--junitxml={report}", str(CASES)]
    paths = os.pathsep.join(map(str, (HERE, HERE.parent)))
    environment = os.environ | {"FACE": face, "EVERY": str(every), "PYTHONPATH": paths}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *command], env=environment, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    (suite,) = ElementTree.parse(report).getroot()
    counts = {name: int(suite.attrib[name]) for name in ("tests", "skipped")}
    assert counts["tests"] - counts["skipped"] >= least, counts
