"""Text that every Python installation has: docstrings of the standard library, by area.

The sources are parsed, never imported. assets/stdlib_areas.yaml names modules that Python 3.11 to
3.14 have in common and that distributions do not ship apart (so no tkinter, turtle, idlelib), which
keeps the rows nearly the same everywhere. Each area gives whole modules to train and others to dev,
so a model cannot win by recognising a module's own phrases.
"""

import ast
import functools
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from loradrop.files import asset

MIN_CHARS, MIN_WORDS = 20, 4
MIN_TEXTS = 3000
ENOUGH_CHARS = 200
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def areas() -> Mapping[str, Mapping[str, str]]:
    """Area -> the modules of "train" and of "dev", separated by spaces."""
    found: dict[str, dict[str, str]] = yaml.safe_load(asset("stdlib_areas.yaml"))
    return found


class Doc(NamedTuple):
    """The leading paragraphs of one docstring; `module` is top-level, `split` train or dev."""

    text: str
    area: str
    module: str
    split: str


def _leading_paragraphs(docstring: str) -> str:
    """Whole paragraphs up to `ENOUGH_CHARS` characters or the first doctest, on one line."""
    text = ""
    for paragraph in docstring.strip().split("\n\n"):
        if len(text) >= ENOUGH_CHARS or paragraph.lstrip().startswith(">>>"):
            break
        text = " ".join([*text.split(), *paragraph.split()])
    return text


def _sources(stdlib: Path, module: str) -> list[Path]:
    package = stdlib / module
    if package.is_dir():
        inside = sorted(file.relative_to(package).parts for file in package.rglob("*.py"))
        return [package.joinpath(*parts) for parts in inside if not {"test", "tests"} & set(parts)]
    file = stdlib / f"{module}.py"
    return [file] if file.is_file() else []


def _all_docs(stdlib: Path) -> Iterator[Doc]:
    for area, sides in areas().items():
        for split, modules in sides.items():
            for module in modules.split():
                for file in _sources(stdlib, module):
                    for node in ast.walk(ast.parse(file.read_bytes(), filename=str(file))):
                        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
                            yield Doc(_leading_paragraphs(text), area, module, split)


def read_docs(stdlib: Path | None = None) -> list[Doc]:
    """The usable docstrings under `stdlib` (default: this Python's), in a fixed order.

    Whitespace is normalised and texts under 20 characters or 4 words are left out. A text that
    occurs more than once counts at its first place, train before dev; one that occurs in two areas
    has no right label and is left out. Raises `ValueError` where the sources are missing or
    stripped, so that fewer than 3,000 texts or an area without train or dev texts remain.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    first: dict[str, Doc] = {}
    ambiguous: set[str] = set()
    for doc in _all_docs(root):
        if first.setdefault(doc.text, doc).area != doc.area:
            ambiguous.add(doc.text)
    docs = [
        doc
        for text, doc in first.items()
        if len(text) >= MIN_CHARS and len(text.split()) >= MIN_WORDS and text not in ambiguous
    ]
    filled = {(doc.area, doc.split) for doc in docs}
    if len(docs) < MIN_TEXTS or len(filled) < 2 * len(areas()):
        raise ValueError(
            f"data.source='stdlib' needs the sources of Python's standard library, but {root} has "
            f"only {len(docs)} usable docstrings in {len(filled)} of {2 * len(areas())} parts (a "
            "zipped or stripped installation?): use a full Python, or set data.source to a file, "
            "a folder or a hub id"
        )
    return docs
