"""What this machine offers: versions, processors, and which backends of the op run here."""

import platform
from typing import Any

from loradrop._version import __version__
from loradrop.machine import native_bf16, version

PACKAGES = (
    *("torch", "triton", "transformers", "peft", "accelerate", "safetensors", "numpy", "datasets"),
)


def _cpu() -> dict[str, Any]:
    import torch

    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return {"capability": capability, "native_bf16": native_bf16(), "threads": threads}


def _cuda() -> list[dict[str, Any]]:
    import torch

    from loradrop.op import cuda

    if not torch.cuda.is_available():
        return []
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory_gib": round(device.total_memory / 2**30, 1),
            "clusters": cuda.occupancy(i),
        }
        for i, device in enumerate(devices)
    ]


def _device(gpu: dict[str, Any]) -> str:
    clusters = "".join(f", {count} clusters of {size}" for size, count in gpu["clusters"].items())
    return f"{gpu['name']}, sm {gpu['capability']}, {gpu['memory_gib']} GiB{clusters}"


def _extension(built: dict[str, Any] | str) -> str:
    if isinstance(built, str):
        return built
    return f"for {built['arch']}, by CUDA {built['cuda']}{', debug' if built['debug'] else ''}"


def report() -> dict[str, Any]:
    """The facts, ready for JSON. None: a package that is not installed, a backend that can run."""
    from loradrop.op import cuda, dispatch

    return {
        "loradrop": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version(package) for package in PACKAGES},
        "cpu": _cpu(),
        "cuda": _cuda(),
        "extension": cuda.built(),
        "backends": {name: backend.missing() for name, backend in dispatch.BACKENDS.items()},
    }


def explain(
    layer: str,
    rank: int = 16,
    dropout: float = 0.0,
    dtype: str = "bfloat16",
    chip: str | None = None,
) -> str:
    """Which backend an unnamed call gets, in training and without gradients, and why.

    layer MxKxN: tokens, in and out features   chip ARCH:SMS, as 90:132 for an H100 or H200; by
    default the first CUDA device, or the CPU. Raises ValueError for a layer or a chip written
    otherwise, a rank below 1, and a dropout that the op would not take.
    """
    import torch

    from loradrop.kernels.tiles import Machine, machine_of
    from loradrop.op import dispatch
    from loradrop.op.call import problem_on
    from loradrop.op.philox import quantize

    if rank < 1:
        raise ValueError(f"--rank {rank}: the rank is a whole number of at least 1")
    quantize(dropout)
    m, k, n = _numbers("layer", layer, "x", 3)
    on_gpu = chip is not None or torch.cuda.is_available()
    if chip is None:
        machine = machine_of(torch.device("cuda:0" if on_gpu else "cpu"))
    else:
        arch, sms = _numbers("chip", chip, ":", 2)
        machine = Machine(arch, sms)
    device = "cuda" if on_gpu else "cpu"
    problem = problem_on(machine, device, getattr(torch, dtype), m, k, n, rank, dropout)
    about = f"{m} tokens, {k} to {n}, rank {rank}, dropout {dropout:g}, {dtype}"
    where = f"sm_{machine.arch} x {machine.sms}" if on_gpu else "this CPU (--chip names a GPU)"
    lines = [f"{about}, {where}"]
    for grad, what in ((True, "forward + backward"), (False, "forward")):
        lines.append(f"  {what:<18} {dispatch.explain(problem._replace(grad=grad))}")
    return "\n".join(lines)


def _numbers(name: str, text: str, between: str, count: int) -> list[int]:
    parts = text.split(between)
    if len(parts) != count or not all(part.isdigit() and int(part) > 0 for part in parts):
        example = {"layer": "8192x4096x4096", "chip": "90:132"}[name]
        raise ValueError(f"--{name} {text!r}: write it as {example}")
    return [int(part) for part in parts]


def _tuned(device: str) -> str:
    """What `loradrop tune` measured on a device."""
    from loradrop.op import tuned

    file = tuned.of_device(device)
    if file.points:
        return f"{len(file.points)} layers of {device} in {file.path}"
    return file.why_not or f"nothing on {device}: loradrop tune measures your model's layers"


def format_report() -> str:
    """`report` as a page to read, or to paste into an issue."""
    facts = report()
    cpu, devices = facts["cpu"], facts["cuda"]
    bf16 = "native" if cpu["native_bf16"] else "not native"
    rows = [
        ("loradrop", facts["loradrop"]),
        ("Python", f"{facts['python']} on {facts['platform']}"),
        *((name, version or "not installed") for name, version in facts["packages"].items()),
        ("CPU", f"{cpu['capability']}, bf16 {bf16}, {cpu['threads']} threads"),
        *((f"CUDA {i}", _device(gpu)) for i, gpu in enumerate(devices)),
        *([] if devices else [("CUDA", "no device")]),
        ("loradrop._C", _extension(facts["extension"])),
        *((f"backend {name}", why or "available") for name, why in facts["backends"].items()),
        *(("tuned", _tuned(device)) for device in dict.fromkeys(gpu["name"] for gpu in devices)),
        *([] if devices else [("tuned", _tuned("cpu"))]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
