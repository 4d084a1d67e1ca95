"""The CUDA extension as a wheel, without a device: what the compiler made of it, its refusals."""

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE", "loradrop", "csrc")
MAX_SHARED = 232448  # bytes that one block of a Hopper SM may have

MISSING = [name for name in ("pybind11", "ninja") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


class Built(NamedTuple):
    extension: Path
    log: str


@contextlib.contextmanager
def one_process(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of a parallel run, so that they build once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def built(folder: Path) -> Built:
    log = folder / "log"
    with one_process(folder / "lock"):
        if not log.exists():
            source = folder / "source"
            for name in SOURCES:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                copy(ROOT / name, source / name)
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation"),
                    *("--no-deps", "-w", folder, "."),
                ],
                cwd=source,
                env=os.environ | {"LORADROP_BUILD_CUDA": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, done.stdout
            (wheel,) = folder.glob("loradrop-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder / "wheel")
            log.write_text(done.stdout)
    (extension,) = (folder / "wheel" / "loradrop").glob("_C.*")
    return Built(extension, log.read_text())


@pytest.fixture(scope="session")
def kernels(built: Built) -> ModuleType:
    spec = importlib.util.spec_from_file_location("loradrop_built._C", built.extension)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def disassembler() -> Path:
    """cuobjdump comes with Triton; nvcc's reduced toolkits have none."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("cuobjdump comes with triton, which is not installed")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def test_the_wheel_is_for_this_platform(built: Built, folder: Path) -> None:
    (wheel,) = folder.glob("loradrop-*.whl")
    assert not wheel.name.endswith("-none-any.whl")


def test_the_compiler_has_no_complaint(built: Built) -> None:
    assert built.log.count("Compiling entry function") == 15, "the log is not that of the compiler"
    # C7508 and up: setmaxnreg ignored, wgmma serialized.
    complaint = r"C7\d\d\d|(nvcc|nvlink|ptxas|\.\w+)\b.*warning"
    assert not [line for line in built.log.splitlines() if re.search(complaint, line)]


def test_registers_and_spills(built: Built) -> None:
    command = [disassembler(), "--dump-resource-usage", built.extension]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"Function (\S+):\s+(REG:.*)", report))
    assert len(usage) == 15
    for name, line in usage.items():
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        assert used["STACK"] == used["LOCAL"] == 0, (name, line)
        threads = 384 if "gemm_ext_kernel" in name else 288
        assert used["REG"] * threads <= 65536, (name, line)
        if "gemm_ext_kernel" in name:  # what setmaxnreg hands out again
            assert used["REG"] * 384 >= 40 * 128 + 232 * 256, (name, line)


def functions(extension: Path) -> dict[str, str]:
    command = [disassembler(), "-sass", extension]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"\n\s*Function : (\S+)\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def last_of(names: list[str], name: str) -> int:
    return len(names) - 1 - names[::-1].index(name)


def test_instructions(built: Built) -> None:
    code = functions(built.extension)
    gemms = [text for name, text in code.items() if "gemm_ext_kernel" in name]
    decodes = [text for name, text in code.items() if "decode_kernel" in name]
    assert (len(gemms), len(decodes)) == (8, 6)
    for text in gemms:
        found = Counter(re.findall(r"\b[A-Z]+[A-Z0-9]*(?:\.[A-Z0-9]+)*\b", text))
        for name in ("UTMALDG.2D", "UTMALDG.2D.MULTICAST", "UTMASTG.2D", "ACQBULK"):
            assert found[name] > 0, f"{name} is missing"
        assert found["UTMACCTL.PF"] == 6, "each tensor map is prefetched"
        assert found["MEMBAR.ALL.GPU"] == 9, "only the last barrier of the cluster, and making h"
        assert "USETMAXREG" in text and ".tnspB" in text
        # Chunks of four wgmma: in three loops over tiles, and the last one of each, which may have
        # two or one; and in the eight loops that make h. None waits for another within a chunk.
        chunks = [re.split(r"WARPGROUP.DEPBAR|\bBRA\b", c)[0] for c in text.split("P.ARRIVE")[1:]]
        runs = [re.findall(r"\b(?:HGMMA|R2UR)\b", chunk) for chunk in chunks]
        assert Counter(run.count("HGMMA") for run in runs) == {4: 14, 2: 3, 1: 3}
        assert text.count("WARPGROUP.DEPBAR") == 3 * 3 + 8 * 2
        # Between them, nothing is moved into the registers of descriptors.
        assert not any("R2UR" in run[: 1 + last_of(run, "HGMMA")] for run in runs)
        # Which tile it is, and its bias, are found while the last wgmma of a loop runs.
        parts = text.split("WARPGROUP.DEPBAR")
        meanwhile = [part for part in parts[1:-1] if "MUFU.RCP" in part]
        assert [part.count("LDG.E R") in (16, 32) for part in meanwhile] == [True] * 3
        assert "LDG.E.U16" not in text and "I2F.U64" not in text, "pairs, and 32-bit divisions"
        # Letting go of a slot is one arrival, without a fence of all memory.
        loops = "".join(text.split("WARPGROUP.ARRIVE")[1:12])
        assert "MEMBAR" not in loops and "CCTL" not in loops
    for text in decodes:
        assert text.count("UTMACCTL.PF") == 4
        assert "MEMBAR" not in text[: text.index("UTMALDG")], "W waits for a fence"
        assert all(name in text for name in ("HMMA.16816.F32", "LDSM.16.M88.4", "UTMALDG.2D"))
    for name, text in code.items():
        assert not re.search(r"\b(LDL|STL|RED|ATOM\w*)\b", text.replace("TRANS64.RED", "")), name


def test_shared_memory(kernels: ModuleType) -> None:
    for tile_n in (128, 256):
        assert MAX_SHARED - 32768 < kernels.shared_bytes(tile_n) <= MAX_SHARED
    for rows in range(16, 129, 16):
        for m in (1, 8, 9, 16, 17, 32):
            for r in (1, 16, 17, 64, 65, 128):
                stages = kernels.decode_stages(rows, m, r)
                assert stages >= 2
                assert kernels.decode_shared_bytes(rows, m, r, stages) <= MAX_SHARED


def test_what_was_built(kernels: ModuleType) -> None:
    info = kernels.build_info()
    assert (info["arch"], info["debug"]) == ("sm_90a", False)
    release = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    assert f"release {info['cuda']}," in release


ALIGNED = 1 << 20  # an address that is never read
GEMM = {
    "dtype": "bfloat16",
    "p": (ALIGNED, 100, 64, 64, 1),
    "q": (ALIGNED, 64, 40, 40, 1),
    "h": (ALIGNED, 100, 5, 8, 1),
    "l": (ALIGNED, 5, 40, 1, 8),
}


DECODE = {
    "dtype": "float16",
    "x": (ALIGNED, 32, 64, 64, 1),
    "w": (ALIGNED, 37, 64, 64, 1),
    "a": (ALIGNED, 5, 64, 64, 1),
    "b": (ALIGNED, 37, 5, 8, 1),
    "cluster": 8,
}


REFUSALS = [
    (GEMM, {}, None),
    (GEMM, {"h": None, "l": None}, None),
    (GEMM, {"p": (ALIGNED, 1, 64, 3, 1)}, "1 and 100"),  # the stride of a single row is nothing
    (GEMM, {"dtype": "float32"}, "float32"),
    (GEMM, {"p": (ALIGNED + 8, 100, 64, 64, 1)}, "16 bytes"),
    (GEMM, {"p": (ALIGNED, 100, 64, 65, 1)}, "row stride 65"),
    (GEMM, {"p": (ALIGNED, 100, 64, 1, 104)}, "column stride 104"),
    (GEMM, {"p": (ALIGNED, 0, 64, 64, 1)}, "(0, 64)"),
    (GEMM, {"p": (ALIGNED, 1 << 31, 64, 64, 1)}, "2^31"),
    (GEMM, {"q": (ALIGNED, 72, 40, 40, 1)}, "64 and 72"),
    (GEMM, {"q": (ALIGNED, 64, 36, 40, 1)}, "36 columns"),
    (GEMM, {"q": (ALIGNED, 64, 40, 80, 2)}, "column stride"),
    (GEMM, {"h": None}, "together"),
    (GEMM, {"p": (ALIGNED, 1 << 29, 64, 64, 1), "q": (ALIGNED, 64, 1 << 20, 1 << 20, 1)}, "2^30"),
    (GEMM, {"h": (ALIGNED, 99, 5, 8, 1)}, "100 and 99"),
    (GEMM, {"l": (ALIGNED, 5, 48, 1, 8)}, "40 and 48"),
    (GEMM, {"l": (ALIGNED, 5, 40, 1, 5)}, "row stride 5"),
    (DECODE, {}, None),
    (DECODE, {"x": (ALIGNED, 33, 64, 64, 1)}, "33 rows"),
    (DECODE, {"w": (ALIGNED, 37, 64, 1, 40)}, "column stride 40"),
    (DECODE, {"b": (ALIGNED, 37, 5, 5, 1)}, "row stride 5"),
    (DECODE, {"b": (ALIGNED, 37, 6, 8, 1)}, "5 and 6"),
    (DECODE, {"a": (ALIGNED, 136, 64, 64, 1), "b": (ALIGNED, 37, 136, 136, 1)}, "rank is 136"),
    (DECODE, {"cluster": 3}, "cluster=3"),
]


@pytest.mark.parametrize(("operands", "change", "reason"), REFUSALS)
def test_refusals(
    kernels: ModuleType, operands: dict[str, Any], change: dict[str, Any], reason: str | None
) -> None:
    why_not = kernels.why_not_gemm if operands is GEMM else kernels.why_not_decode
    found = why_not(**(operands | change))
    assert found is None if reason is None else reason in found


PLAN = {"n": 4096, "r": 16, "clusters": (132, 66, 33, 16), "cluster": 0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": 0}, "0 rows has no plan"),
        ({"n": -16}, "-16 rows"),
        ({"cluster": -1}, "cluster=-1"),
        ({"cluster": 3}, "cluster=3"),
        ({"clusters": (132, 66, 33, 0), "cluster": 8}, "cannot place a cluster of 8 CTAs"),
        ({"clusters": (7, 0, 0, 0)}, "cannot place a cluster of 2, 4 or 8 CTAs"),
    ],
)
def test_what_has_no_plan(kernels: ModuleType, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        kernels.decode_plan(**(PLAN | change))


def test_a_plan_takes_what_has_room(kernels: ModuleType) -> None:
    assert kernels.decode_plan(**PLAN) == (32, 8, 128)
    assert kernels.decode_plan(**(PLAN | {"clusters": (132, 66, 32, 15)})) == (32, 4, 128)
    assert kernels.decode_plan(**(PLAN | {"cluster": 2})) == (32, 2, 128)
    assert kernels.why_not_placed((132, 66, 33, 16), 0) is None
    assert kernels.why_not_placed((132, 66, 0, 0), 0) is None
    assert "of 4 CTAs" in kernels.why_not_placed((132, 66, 0, 0), 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_launch_without_a_device_is_refused(kernels: ModuleType) -> None:
    launch = {"device": 0, "stream": 0, "bias": 0, "scaling": 2.0}
    gemm = GEMM | launch | {"out": (ALIGNED, 100, 40, 40, 1), "overlap": False}
    gemm |= {"tile_n": 0, "cluster": 0, "a": None, "h_scale": 1.0, "ready": 0}
    wide = {"out": (ALIGNED, 100, 48, 48, 1)}
    maker = {"a": (ALIGNED, 64, 4, 1, 64), "ready": ALIGNED}
    decode = DECODE | launch | {"y": ALIGNED, "h": ALIGNED, "rows": 16}
    decode |= {"weights": 0, "planes": 0, "sqnorm": 0}
    for kernel, change, error, words in (
        (kernels.gemm_ext, gemm, RuntimeError, r"no CUDA device: .*driver"),
        (kernels.gemm_ext, gemm | wide, ValueError, "out's and q's columns"),
        (kernels.gemm_ext, gemm | {"scaling": 0.0}, ValueError, r"2\^-32"),
        (kernels.gemm_ext, gemm | maker, ValueError, "4 and 5 of a's and h's columns"),
        (kernels.gemm_ext, gemm | maker | {"h": None, "l": None}, ValueError, "4 and 0"),
        (kernels.gemm_ext, gemm | {"bias": ALIGNED + 2}, ValueError, "multiple of 4 bytes"),
        (kernels.decode, decode, RuntimeError, r"no CUDA device: .*driver"),
        (kernels.decode, decode | {"rows": 17}, ValueError, "rows=17"),
        (kernels.decode_occupancy, {"device": 0}, RuntimeError, r"no CUDA device: .*driver"),
    ):
        with pytest.raises(error, match=words):
            kernel(**change)


@pytest.mark.every_launch
def test_the_debug_build_has_deadlines(folder: Path) -> None:
    with one_process(folder / "lock-debug"):
        command = [sys.executable, ROOT / "csrc" / "build.py", folder / "debug", "--debug"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (extension,) = (folder / "debug").glob("_C.*")
    assert b"deadlock" in extension.read_bytes()


def test_a_failed_build_ends_with_its_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a caller records is the last line."""
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    said = "[1/5] nvcc\nptx.cuh(3): error: no such thing\nptx.cuh(9): error: nor this\nstopped"
    failed = subprocess.CompletedProcess([], 1, stdout=said)
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit) as ended:
        module.build(tmp_path)
    last = str(ended.value).splitlines()[-1]
    assert last == "loradrop._C does not build: ptx.cuh(3): error: no such thing"
