"""Facts of this machine and this process that a result depends on. Importing loads no library."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from loradrop._version import __version__


def version(package: str) -> str | None:
    """The installed version, read without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    names = ("torch", "transformers", "safetensors", "triton", "peft")
    found = {name: known for name in names if (known := version(name))}
    return {"loradrop": __version__, **found}


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


def native_bf16() -> bool:
    """Whether the CPU multiplies in bfloat16, rather than converting at every use."""
    import torch

    if platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN's own answer is also yes for AVX-512 without bf16 instructions.
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_distributed() -> bool:
    """Whether torch.distributed has begun in this process, which nobody loads to find out."""
    distributed = sys.modules.get("torch.distributed")
    return bool(
        distributed is not None and distributed.is_available() and distributed.is_initialized()
    )


def is_first_rank() -> bool:
    """Whether this process prints and writes: the only one of its run, or the one of rank 0."""
    if is_distributed():
        return bool(sys.modules["torch.distributed"].get_rank() == 0)
    return os.environ.get("RANK", "0") == "0"  # as torchrun says it
