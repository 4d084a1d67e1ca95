"""Importing does nothing: no heavy library, output, random number or environment variable."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import loradrop

EVERY_MODULE = """
import importlib, os, pkgutil, random, sys
import numpy, torch
import loradrop

def states():
    return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()

touched = set()

def spy(method):
    def spied(self, *args):
        frame = sys._getframe(1)
        while frame.f_globals["__name__"] in ("os", "collections.abc", "_collections_abc"):
            frame = frame.f_back
        if frame.f_globals["__name__"].partition(".")[0] == "loradrop":
            touched.add((frame.f_globals["__name__"], args[0]))
        return method(self, *args)
    return spied

for name in ("__getitem__", "__setitem__", "__delitem__"):
    setattr(type(os.environ), name, spy(getattr(type(os.environ), name)))

noise, real = os.open(os.devnull, os.O_WRONLY), os.dup(2)
os.dup2(noise, 2)  # what other libraries say when they are imported is not ours
try:
    import peft.tuners.lora
except ImportError:
    peft = None
os.dup2(real, 2)

before = states()
names = [module.name for module in pkgutil.walk_packages(loradrop.__path__, "loradrop.")]
assert "loradrop.op.linear" in names, names
for name in names:
    if peft is None and name.startswith("loradrop.integrations.peft"):
        continue
    importlib.import_module(name)
    assert states() == before, f"{name} draws random numbers"
assert not touched, f"environment variables: {touched}"
for name in ("inject", "probe", "select", "share", "fit", "export", "merge", "save", "verify"):
    assert callable(getattr(loradrop, name)), f"the module hides the function {name}"
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """`code` in an interpreter of its own, which does not look into the current folder."""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_import_loads_nothing_heavy() -> None:
    run(
        "import sys, loradrop\n"
        "heavy = {'torch', 'triton', 'peft', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_the_api_loads_no_optional_library() -> None:
    run(
        "import sys, loradrop\n"
        "loradrop.lora_linear, loradrop.inject, loradrop.probe, loradrop.select, loradrop.share\n"
        "heavy = {'triton', 'peft', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_importing_every_module_has_no_effect() -> None:
    done = run(EVERY_MODULE)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("name", loradrop.__all__)
def test_public_name(name: str) -> None:
    if name.endswith("_peft"):
        pytest.importorskip("peft", minversion="0.21")
    assert getattr(loradrop, name) is not None
    assert name in dir(loradrop)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = loradrop.no_such_name


def imports() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, anywhere in its text."""
    root = Path(loradrop.__file__).parent
    places = {file: file.relative_to(root.parent).with_suffix("") for file in root.rglob("*.py")}
    files = {".".join(p.parts).removesuffix(".__init__"): file for file, p in places.items()}
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        found = set[str]()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (whole & files.keys()) or {node.module}
        graph[name] = (found & files.keys()) - {name}
    return graph


def test_modules_are_attributes_as_soon_as_the_package_is_imported() -> None:
    run(
        "import loradrop\n"
        "assert loradrop.methods.get('vera').name == 'vera'\n"
        "assert callable(loradrop.fit) and not hasattr(loradrop, 'nothing')\n"
        "assert not hasattr(loradrop, '_nothing') and not hasattr(loradrop, '__wrapped__')"
    )


def test_no_import_circle() -> None:
    """Counted over imports in functions and under TYPE_CHECKING too."""
    graph = imports()
    assert {"loradrop.bank", "loradrop.config"} <= graph["loradrop.layers"]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle
