"""Metadata and packages. A plain install is pure Python: no compiler, no torch while it builds.

LORADROP_BUILD_CUDA=1 adds the extension loradrop._C (csrc/build.py).
"""

import os
import re
import runpy
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
TRITON = "triton>=3.6; platform_system == 'Linux'"
PEFT = "peft>=0.21"
SITE = ("mkdocs>=1.6", "mkdocs-material", "mkdocstrings[python]")
NOTEBOOKS = ("nbclient", "nbformat", "ipykernel")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


WINGS = (
    "op", "statistics", "spectral", "methods", "training", "formats", "integrations", "command",
    "text", "report", "measuring",
)  # fmt: skip
packages = ["loradrop", *(f"loradrop.{wing}" for wing in WINGS)]
if any((ROOT / "loradrop" / "kernels").glob("*.py")):  # a link to ../kernels
    packages.append("loradrop.kernels")

extension = {}
asked = os.environ.get("LORADROP_BUILD_CUDA", "0")
if asked not in ("0", "1", ""):
    raise SystemExit(f"LORADROP_BUILD_CUDA={asked!r}: give 1, which builds the CUDA kernels, or 0")
if asked == "1":  # an error, never a silent pure-Python wheel
    build = runpy.run_path(str(ROOT / "csrc" / "build.py"))
    extension = build["setup_arguments"]()

setup(
    name="loradrop",
    version=re.search(r'^__version__ = "(.+)"$', read("loradrop/_version.py"), re.M)[1],
    description="LoRA-drop: keep LoRA where its output matters, share one LoRA elsewhere",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    author="The loradrop contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["LoRA", "LoRA-drop", "fine-tuning", "PEFT", "PyTorch", "transformers"],
    python_requires=">=3.11",
    packages=packages,
    package_data={"loradrop": ["py.typed", "assets/*"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.13",
        "accelerate>=1.1",
        "typer>=0.20",
        *("safetensors", "numpy", "pyyaml", "tqdm", "matplotlib", "jinja2"),
    ],
    extras_require={
        "triton": [TRITON],
        "peft": [PEFT],
        "trl": [PEFT, "trl", "datasets"],
        "data": ["datasets"],
        "cuda": ["ninja", "pybind11"],
        "quantised": ["bitsandbytes", "torchao"],  # not in dev: see the Makefile
        "docs": [*SITE, *NOTEBOOKS],
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML"),
            *("build", "setuptools", "wheel", "pre-commit", TRITON, PEFT, "datasets", "trl"),
            *("ninja", "pybind11", "pandas", *SITE, *NOTEBOOKS),
        ],
    },
    entry_points={"console_scripts": ["loradrop = loradrop.command.cli:main"]},
    **extension,
)
