"""Only `loradrop` gets installed, and the folder kernels/ hides nobody's package."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

ROOT = Path(__file__).resolve().parent.parent
FILES = ("setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE")
WHEEL = ("pip", "wheel", "--no-build-isolation", "--no-deps", "-w")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy to build in, links kept as links."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in ("loradrop", "kernels", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


def python(folder: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of an interpreter started in the folder."""
    command, env = [sys.executable, *arguments], os.environ | variables
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def wheel(folder: Path) -> zipfile.ZipFile:
    (path,) = folder.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(path)


def modules() -> set[str]:
    """Every module of the checkout, those behind the link loradrop/kernels too."""
    folders = os.walk(ROOT / "loradrop", followlinks=True)
    paths = (Path(folder, name) for folder, _, names in folders for name in names)
    return {str(path.relative_to(ROOT)) for path in paths if path.suffix == ".py"}


def test_wheel(source: Path, tmp_path: Path) -> None:
    (source / "kernels" / "a_kernel.py").write_text("")
    status, out, err = python(source, "-m", *WHEEL, str(tmp_path), ".")
    assert status == 0, out + err
    files = set(wheel(tmp_path).namelist())
    (info,) = {name.split("/")[0] for name in files} - {"loradrop"}
    assert info.startswith("loradrop-") and info.endswith(".dist-info")
    built = {name for name in files if name.endswith(".py")}
    assert built == {*modules(), "loradrop/kernels/a_kernel.py"}
    assets = {f"loradrop/assets/{path.name}" for path in (ROOT / "loradrop/assets").iterdir()}
    assert {"loradrop/py.typed", *assets} <= files

    metadata = email.message_from_bytes(wheel(tmp_path).read(f"{info}/METADATA"))
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {"torch", "transformers"} <= {need.name for need in needs if need.marker is None}
    bounds = {bound.operator for need in needs for bound in need.specifier}
    assert bounds == {">="}, "upper bounds belong into constraints.txt"
    assert metadata["Requires-Python"] == ">=3.11"
    scripts = wheel(tmp_path).read(f"{info}/entry_points.txt").decode()
    assert "loradrop = loradrop.command.cli:main" in scripts


@pytest.mark.parametrize("kernels", [[], ["a_kernel.py"]], ids=["no kernels", "a kernel"])
def test_sdist_has_the_extension_and_builds_the_same_modules(
    source: Path, tmp_path: Path, kernels: list[str]
) -> None:
    for name in kernels:
        (source / "kernels" / name).write_text("")
    dist = tmp_path / "dist"
    status, out, err = python(source, "-m", "build", "--no-isolation", "--outdir", str(dist))
    assert status == 0, out + err
    built = {name for name in wheel(dist).namelist() if name.endswith(".py")}
    assert built == modules() | {f"loradrop/kernels/{name}" for name in kernels}
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_file()} <= names


def test_cuda_build_is_refused_with_its_reason(source: Path, tmp_path: Path) -> None:
    asked = {"LORADROP_BUILD_CUDA": "1", "PATH": ""}
    status, out, err = python(source, "-m", *WHEEL, str(tmp_path), ".", **asked)
    said = out + err
    assert status != 0
    assert "asks for loradrop._C, which cannot be built: nvcc is not on PATH" in said
    assert "Unset the variable" in said and "Traceback" not in said


def test_setup_imports_no_torch() -> None:
    code = "import runpy, sys; runpy.run_path('setup.py'); assert 'torch' not in sys.modules"
    assert python(ROOT, "-c", code, "--name")[:2] == (0, "loradrop\n")


LLAMA = """
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
import sys
found = sys.modules.get("kernels")
print(is_kernels_available(), found and found.__file__)
"""


def import_llama(*path: Path) -> str:
    """What transformers makes of `kernels` with the repository's root first on sys.path."""
    status, out, err = python(ROOT, "-c", LLAMA, PYTHONPATH=os.pathsep.join(map(str, path)))
    assert status == 0, err
    return out.strip()


def test_llama_imports_from_the_root_without_kernels_of_hugging_face() -> None:
    assert import_llama() == "False None"


STAND_IN = '''
def __getattr__(name):
    """A class that takes any arguments and, as a decorator, changes nothing."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__new__": lambda cls, *args, **kwargs: lambda wrapped: wrapped})
'''


def test_llama_imports_from_the_root_beside_an_installed_kernels(tmp_path: Path) -> None:
    package, info = tmp_path / "kernels", tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    info.mkdir()
    metadata = ("Metadata-Version: 2.1", "Name: kernels", f"Version: {KERNELS_MIN_VERSION}", "")
    (info / "METADATA").write_text("\n".join(metadata))
    assert import_llama(tmp_path) == f"True {package / '__init__.py'}"


def test_llama_imports_from_the_root_beside_the_real_kernels(tmp_path: Path) -> None:
    needed = f"kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}"
    options = ("--quiet", "--only-binary", ":all:", "--retries", "0", "--timeout", "20")
    options += ("--target", str(tmp_path), "-c", "constraints.txt")
    if python(ROOT, "-m", "pip", "install", *options, needed)[0] != 0:
        pytest.skip(f"{needed} cannot be had here")
    assert import_llama(tmp_path) == f"True {tmp_path / 'kernels/__init__.py'}"


@pytest.mark.parametrize("value", ["true", "yes", "2"])
def test_an_unclear_wish_for_the_kernels_is_no_build_without_them(value: str) -> None:
    status, _, err = python(ROOT, "setup.py", "--version", LORADROP_BUILD_CUDA=value)
    assert status == 1 and f"LORADROP_BUILD_CUDA='{value}': give 1" in err
