"""The rival from CUTLASS's headers: its refusals, and what the compiler makes of it."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
P, Q = torch.zeros(16, 64, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16).T


@pytest.fixture
def cutlass(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cutlass_gemm

    return cutlass_gemm


@pytest.fixture
def hopper(cutlass: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a device, and no library."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(cutlass, "_library", lambda: "no library")


def refusal(cutlass: ModuleType, *operands: torch.Tensor) -> str | None:
    """Of stand-ins: what `why_not` looks at, of such operands on a device."""
    names = "dtype", "shape", "stride", "numel", "data_ptr"
    device = SimpleNamespace(type="cuda")
    stand_ins = (
        SimpleNamespace(device=device, **{name: getattr(operand, name) for name in names})
        for operand in operands
    )
    found: str | None = cutlass.why_not(*stand_ins)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(cutlass: ModuleType) -> None:
    assert cutlass.why_not(P, Q) == "there is no CUDA device"
    with pytest.raises(ValueError, match="CUTLASS cannot serve this call: there is no CUDA device"):
        cutlass.gemm(P, Q)


def test_what_a_build_needs(
    cutlass: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(RuntimeError, match="pip install --no-deps nvidia-cutlass==4"):
            cutlass.build(tmp_path)
        spec = SimpleNamespace(submodule_search_locations=["there"])
        patch.setattr(importlib.util, "find_spec", lambda _: spec)
        patch.setattr(shutil, "which", lambda _: None)
        with pytest.raises(RuntimeError, match="nvcc, which builds it, is not on PATH"):
            cutlass.build(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("p", "q", "reason"),
    [
        (P, Q, "no library"),
        (P, Q.contiguous(), "no library"),
        (P.float(), Q, "built for bfloat16"),
        (P.half(), Q.half(), "built for bfloat16"),
        (P[:0], Q, "empty"),
        (P.T.contiguous().T, Q, "p is not row-major"),
        (P, Q[:, ::2].T.repeat(1, 2)[:, ::2].T, "neither q nor"),
        (P[:, 4:60], Q[:56], "16 bytes"),
        (P[:, :60], Q[:60], "multiple of 8"),
        (P, Q[:, :20], "multiple of 8"),
    ],
)
def test_operands(
    cutlass: ModuleType, hopper: None, p: torch.Tensor, q: torch.Tensor, reason: str
) -> None:
    found = refusal(cutlass, p, q)
    assert found is not None and reason in found


def test_other_devices(cutlass: ModuleType, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cutlass.why_not(P, Q) == "p is on cpu and q on cpu, not on one CUDA device"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert refusal(cutlass, P, Q) == "it is built for compute capability 9.0 alone"


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.skipif(
    importlib.util.find_spec("cutlass_library") is None, reason="nvidia-cutlass is not installed"
)
def test_what_the_compiler_makes_of_it(cutlass: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    library = cutlass.build(tmp_path)
    assert [*tmp_path.iterdir()] == [library] and cutlass.build(tmp_path) == library
    # It loads where there is no driver, and says there that it cannot launch.
    call = "cutlass_gemm(*[None] * 4, 16, 16, 16, 16, 16, 1, 0, 1, None)"
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).{call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) != 0, done.stderr

    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    command = [tools / "cuobjdump", "-sass", library]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kernels = re.split(r"\n\s*Function : \S+\n", text)[1:]
    assert len(kernels) == 2  # q in either layout
    for kernel in kernels:
        for name in ("HGMMA.64x256x16.F32.BF16", "UTMALDG", "MULTICAST", "UTMASTG", "USETMAXREG"):
            assert name in kernel, f"{name} is missing"
        assert not re.search(r"\b(LDL|STL)\b", kernel)
    assert sum(".tnspB" in kernel for kernel in kernels) == 1


@pytest.mark.gpu
def test_values(cutlass: ModuleType) -> None:
    p, w = (torch.randn(rows, 200, device="cuda").bfloat16() for rows in (300, 520))
    if reason := cutlass.why_not(p, w.T):
        pytest.skip(reason)
    for q in (w.T, w.T.contiguous()):
        torch.testing.assert_close(cutlass.gemm(p, q), p @ q)
