"""Builds loradrop._C with nvcc and ninja. setup.py imports this only when it is asked to build.

By hand: python csrc/build.py FOLDER [--debug]
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCES = ("gemm_ext_sm90.cu", "decode_sm90.cu", "tensor_map.cpp", "bindings.cpp")
NAME = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
FLAGS = (
    *("-O3", "-std=c++20", "--expt-relaxed-constexpr"),
    # Not -arch=sm_90a, which in some versions of nvcc also compiles for plain sm_90: wgmma and
    # setmaxnreg do not exist there.
    "-gencode=arch=compute_90a,code=sm_90a",
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-Xptxas", "-v"),
)
NINJA = """\
flags = {flags}
rule compile
  command = nvcc $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = nvcc -shared --cudart=static $in -o $out
"""


def missing() -> list[str]:
    """What a build needs and this machine does not have."""
    lacks = [] if shutil.which("nvcc") else ["nvcc is not on PATH"]
    for package in ("pybind11", "ninja"):
        if importlib.util.find_spec(package) is None:
            lacks.append(f"the package {package} is not installed")
    return lacks


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_file(debug: bool) -> str:
    import pybind11

    includes = (sysconfig.get_path("include"), pybind11.get_include())
    flags = [*FLAGS, *(f'-isystem "{folder}"' for folder in includes)]
    if debug:  # every wait has a deadline, and says where it ran out
        flags += ["-DLORADROP_DEBUG", "-lineinfo"]
    lines = [NINJA.format(flags=" ".join(flags))]
    lines += [f"build {name}.o: compile {_escape(HERE / name)}" for name in SOURCES]
    lines.append(f"build {NAME}: link " + " ".join(f"{name}.o" for name in SOURCES))
    return "\n".join(lines) + "\n"


def build(folder: Path, debug: bool = False) -> tuple[Path, str]:
    """(the extension in `folder`, the compilers' log). Raises SystemExit with their errors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_ninja_file(debug), encoding="utf-8")
    command = [sys.executable, "-m", "ninja", "-C", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        lines = done.stdout.splitlines()
        errors = [line for line in lines if "error" in line or "fatal" in line]
        raise SystemExit(f"{done.stdout}\nloradrop._C does not build: {(errors or lines)[0]}")
    return folder / NAME, done.stdout


def setup_arguments() -> dict[str, Any]:
    """What setup() needs for a wheel with loradrop._C in it. Raises SystemExit where it cannot."""
    from setuptools import Extension
    from setuptools.command.build_ext import build_ext

    if lacks := missing():
        raise SystemExit(
            f"LORADROP_BUILD_CUDA=1 asks for loradrop._C, which cannot be built: "
            f"{'; '.join(lacks)}. Use pip's --no-build-isolation with them installed. "
            "Unset the variable to install loradrop as pure Python."
        )

    class Build(build_ext):
        def build_extension(self, ext: Extension) -> None:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            built, log = build(Path(self.build_temp) / "csrc")
            print(log)  # seen with pip install -v
            shutil.copy(built, target)

    return {"ext_modules": [Extension("loradrop._C", [])], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    (folder,) = (argument for argument in arguments if argument != "--debug")
    if lacks := missing():
        raise SystemExit("; ".join(lacks))
    path, log = build(Path(folder), debug)
    print(log, path, sep="\n")
