"""The GEMM of CUTLASS's headers. As a script, builds it, which takes a minute or two."""

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from ctypes import CDLL, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).resolve().with_name("cutlass_gemm.cu")
FLAGS = (
    *("-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr"),
    *("-DNDEBUG", "-Xcompiler", "-fPIC", "-shared"),
)


def build(folder: Path = SOURCE.parent / "build") -> Path:
    """The library, built unless `folder` has it. Raises RuntimeError where that is impossible."""
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:12]
    library = folder / f"cutlass_gemm-{key}.so"
    if library.exists():
        return library
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("no headers of CUTLASS: pip install --no-deps nvidia-cutlass==4.2.0.0")
    if shutil.which("nvcc") is None:
        raise RuntimeError("nvcc, which builds it, is not on PATH")
    folder.mkdir(parents=True, exist_ok=True)
    part = library.with_suffix(f".{os.getpid()}")  # nobody loads half a library
    include = f"-I{spec.submodule_search_locations[0]}/source/include"
    command = ["nvcc", *FLAGS, include, str(SOURCE), "-o", str(part)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"it does not build: {done.stdout}")
    return part.replace(library)


@functools.cache
def _library() -> CDLL | str:
    """The library, or why there is none."""
    try:
        return CDLL(str(build()))
    except (RuntimeError, OSError) as error:
        return str(error)


def why_not(p: Tensor, q: Tensor) -> str | None:
    """None where `gemm` takes p (M, K) and q (K, N), or why not. Builds what is not built yet."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if p.device.type != "cuda" or q.device != p.device:
        return f"p is on {p.device} and q on {q.device}, not on one CUDA device"
    if torch.cuda.get_device_capability(p.device) != (9, 0):
        return "it is built for compute capability 9.0 alone"
    if {p.dtype, q.dtype} != {torch.bfloat16}:
        return f"p is {p.dtype} and q {q.dtype}, and it is built for bfloat16"
    if p.numel() * q.numel() == 0 or p.stride(1) != 1 or 1 not in q.stride():
        return "an operand is empty, or p is not row-major, or neither q nor its transpose is"
    starts = p.data_ptr(), q.data_ptr(), 2 * p.stride(0), 2 * max(q.stride())
    if any(start % 16 for start in starts) or p.shape[1] % 8 or q.shape[1] % 8:
        return "a row does not begin at a multiple of 16 bytes, or K or N is no multiple of 8"
    return found if isinstance(found := _library(), str) else None


def gemm(p: Tensor, q: Tensor) -> Tensor:
    """p·q. Raises ValueError with the reason for operands that `why_not` refuses."""
    if reason := why_not(p, q):
        raise ValueError(f"CUTLASS cannot serve this call: {reason}")
    library, m, (k, n), transposed = _library(), p.shape[0], q.shape, q.stride(0) == 1
    workspace = p.new_empty(library.cutlass_gemm_workspace(m, n, k, transposed), dtype=torch.uint8)
    out = p.new_empty(m, n)
    if status := library.cutlass_gemm(
        *(c_void_p(tensor.data_ptr()) for tensor in (out, p, q, workspace)),
        *(m, n, k, c_int64(p.stride(0)), c_int64(max(q.stride())), transposed, p.device.index),
        torch.cuda.get_device_properties(p.device).multi_processor_count,
        c_void_p(torch.cuda.current_stream(p.device).cuda_stream),
    ):
        raise RuntimeError(f"CUTLASS returns status {status}")
    return out


if __name__ == "__main__":
    print(build())
