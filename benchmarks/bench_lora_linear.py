"""What LoRA costs over the frozen product alone: PEFT, PEFT with a norm hook, addmm, and loradrop.

Every provider gets the same x, W, A and B, and is compared with the float64 reference before it is timed: a
wrong one gets no number, and the script ends with 1. Several processes each measure every cell, all
providers interleaved; a ratio is formed within one process. A run again does what is missing.

    python benchmarks/bench_lora_linear.py                        the CPU, one thread
    python benchmarks/bench_lora_linear.py --device cuda          one CUDA device

Adapters have x's dtype, except in `peft_fp32` on a half-precision x. There is a bias on the CPU (encoders)
and none on CUDA (Llama). `forward` runs under `no_grad`; in `forward_backward` x needs its gradient.
"""

import argparse
import csv
import io
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from providers import PROVIDERS, Case, Provider, make_case, wrong
from timing import COLUMNS, Cell, Row, goal, measure, paired, read_rows

from loradrop.env import report
from loradrop.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = {  # MxKxN
    "cpu": "4096x384x384 4096x384x1536 2048x768x768 2048x768x3072 512x4096x4096",
    "cuda": "8192x4096x4096 8192x4096x11008 8192x11008x4096 8192x4096x14336 8192x14336x4096 "
    "8192x5120x5120 8192x4096x1024",
}
DTYPES = {"cpu": "float32,bfloat16", "cuda": "bfloat16"}
DIRECTIONS = "forward,forward_backward"


def device_name(device: str) -> str:
    """The model name of the processor or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
