"""What it was measured on, and the columns that every row of one run shares."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lib import ROOT
from loradrop.command.env import report
from loradrop.machine import processor


def need_cuda(asked_by: str) -> None:
    """Ends the script with 1 and a sentence where there is no CUDA device."""
    if not torch.cuda.is_available():
        sys.exit(f"{asked_by}: PyTorch finds no CUDA device here")


def device_name(device: str) -> str:
    """The name of the GPU, or of the processor and the instructions that PyTorch finds there."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"


def folder(results: Path, device: str) -> Path:
    """Where the results of this machine lie."""
    return results / ("cpu" if device == "cpu" else device_name(device).lower().replace(" ", "-"))


def _output(*command: str) -> str:
    """The first line that a command prints; empty where there is no such command."""
    try:
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    except OSError:
        return ""
    return (text.splitlines() or [""])[0].strip()


def facts(device: str, commit: str | None) -> dict[str, str]:
    """The columns that are the same in every row of one run."""
    driver = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": report()["packages"]["triton"] or "",
        "driver": _output(*driver) if device == "cuda" else "",
        "commit": commit or commit_of(ROOT),
    }


def commit_of(checkout: Path) -> str:
    """Its short hash, marked where its code differs; empty without git."""
    git = "git", "-C", str(checkout)
    code = "--", ".", ":!benchmarks/results", ":!docs", ":!*.md"
    marked = "-dirty" if _output(*git, "diff", "--name-only", "HEAD", *code) else ""
    return _output(*git, "rev-parse", "--short", "HEAD") + marked


def environment(device: str, about: dict[str, str]) -> dict[str, Any]:
    """Everything that is known about the machine, for the JSON beside a result file."""
    known = report() | {"platform": platform.system(), "processors": os.cpu_count()} | about
    return known if device == "cpu" else known | {"chip": chip()}


def chip() -> dict[str, int]:
    """What the dispatcher knows about the GPU, and its L2 cache."""
    of = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "arch": 10 * of.major + of.minor,
        "sms": of.multi_processor_count,
        "l2_bytes": of.L2_cache_size,
    }
