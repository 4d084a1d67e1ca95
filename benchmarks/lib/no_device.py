"""A CUDA device that is not there: the op and Triton do all their work on the host, and launch
nothing.

Triton's own driver and launcher run, linked to a library in the driver's place whose every function
answers at once. CPU tensors stand for a GPU's: the op is told that they lie on an H100. PyTorch's
own products run on the CPU, so operands must be tiny. The extension `loradrop._C` is a stand-in of
Python functions. The values are garbage. A process that did this cannot do anything else.
"""

import functools
import os
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

NAME, ARCH, SMS = "NVIDIA H100 80GB HBM3", 90, 132
LAUNCHED: Counter[str] = Counter()  # what the stand-in of the extension was asked for

_DRIVER = """
#define F(name) int name() { return 0; }
F(cuCtxGetCurrent) F(cuCtxGetLimit) F(cuCtxSetCurrent) F(cuCtxSetLimit) F(cuDeviceGet)
F(cuDevicePrimaryCtxRetain) F(cuFuncSetAttribute) F(cuFuncSetCacheConfig) F(cuModuleLoadData)
F(cuModuleGetFunction) F(cuPointerGetAttributes) F(cuTensorMapEncodeTiled)
F(cuTensorMapEncodeIm2col) F(cuOccupancyMaxActiveClusters) F(cuGetErrorString)
static long launches = 0;
int cuLaunchKernelEx() { ++launches; return 0; }
long loradrop_launches() { return launches; }
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuDeviceGetAttribute(int* v, int a, int d) { *v = 232448; return 0; }
int cuFuncGetAttribute(int* v, int a, void* f) { *v = 1024 * (a == 0); return 0; }
typedef unsigned long long Pointer;
int cuPointerGetAttribute(Pointer* v, int a, Pointer p) { *v = p; return 0; }
"""


def _library() -> Path:
    folder = Path(tempfile.mkdtemp())
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(_DRIVER, encoding="utf-8")
    command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", source, "-o", library]
    subprocess.run(command, check=True)
    return library


def _extension() -> Any:
    """In the place of loradrop._C: it counts, and does nothing."""

    def called(name: str) -> Any:
        def run(*given: object, **named: object) -> None:
            LAUNCHED[name] += 1

        return run

    return SimpleNamespace(
        gemm_ext=called("gemm_ext"),
        decode=called("decode"),
        why_not_placed=lambda clusters, cluster: None,
        decode_occupancy=lambda device: (132, 66, 32, 16),
        decode_plan=lambda n, r, clusters, cluster: (32, 8, 128),
    )


@functools.cache
def pretend(backend: str) -> Any:
    """From here on, a call of the op is one on an H100 that `backend` serves.

    Returns a function that says how many kernels Triton launched so far.
    """
    import ctypes

    from loradrop.kernels import tiles
    from loradrop.op import call, cuda, dispatch

    library = _library()
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    os.environ["LD_LIBRARY_PATH"] = str(library.parent)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device: divmod(ARCH, 10)
    driver.utils.get_device_properties = lambda device: {"max_shared_mem": 232448}
    load = driver.utils.load_binary
    driver.utils.load_binary = lambda *a: (load, 1, 128, 0, 1024)
    triton.runtime.driver.set_active(driver)
    machine = tiles.Machine(ARCH, SMS, NAME)

    for module in (tiles, call):
        module.machine_of = functools.cache(lambda device: machine)
    dispatch._trusts_cpu = functools.cache(lambda: False)
    dispatch.choose = functools.lru_cache(lambda problem: backend)
    stand_in = _extension()
    cuda._extension = functools.cache(lambda: stand_in)
    cuda._why_not_on = functools.cache(lambda device: None)
    cuda._why_not = lambda *given: None
    cuda.streams = functools.lru_cache(lambda *sizes: 4)
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    return loaded.loradrop_launches
