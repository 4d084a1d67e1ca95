"""Facts of this machine that a measurement depends on. Importing this loads no library."""

import importlib.metadata
import platform
from pathlib import Path


def version(package: str) -> str | None:
    """The installed version, read without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def driver() -> str:
    """The version of NVIDIA's driver, or of the CUDA that it is for; empty where there is none."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        pass
    import torch

    if not torch.cuda.is_available():
        return ""
    return f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]
