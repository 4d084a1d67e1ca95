"""Text that every Python installation has: docstrings of the standard library, by area.

The sources are parsed, never imported. `AREAS` names modules that Python 3.11 to 3.14 have in
common and that distributions do not ship apart (so no tkinter, turtle, idlelib), which keeps the
rows nearly the same everywhere. Each area gives whole modules to train and others to dev: no module
has texts on both sides, and a model cannot win by recognising a module's own phrases.
"""

import ast
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

# area -> (modules of train, modules of dev). Private twins stand beside the public name, because
# docstrings move between the two from version to version (datetime -> _pydatetime in 3.12).
AREAS: Mapping[str, tuple[str, str]] = {
    "archives and storage": (
        "tarfile pickle pickletools copyreg gzip bz2 lzma _compression compression shelve dbm",
        "zipfile zipapp sqlite3",
    ),
    "code inspection": (
        "inspect dis opcode tokenize token typing annotationlib pyclbr code codeop tabnanny",
        "ast _ast_unparse symtable",
    ),
    "concurrency": (
        "asyncio multiprocessing contextvars",
        "threading _threading_local concurrent queue sched",
    ),
    "data structures": (
        "_collections_abc functools weakref _weakrefset contextlib dataclasses types enum "
        "operator copy bisect",
        "collections heapq graphlib",
    ),
    "dates and locales": ("datetime _pydatetime _strptime zoneinfo locale gettext", "calendar"),
    "files and paths": (
        "pathlib os ntpath posixpath genericpath nturl2path stat glob fnmatch io _pyio",
        "shutil tempfile fileinput filecmp",
    ),
    "imports and packages": (
        "importlib venv compileall py_compile",
        "pkgutil runpy zipimport modulefinder site sysconfig",
    ),
    "mail": ("email imaplib smtplib poplib quopri base64", "mailbox"),
    "numbers": ("decimal _pydecimal fractions random", "statistics numbers"),
    "system and terminal": (
        "platform ctypes uuid optparse getopt subprocess signal curses rlcompleter _osx_support",
        "argparse cmd pty tty getpass",
    ),
    "testing and debugging": (
        "unittest logging pdb bdb cProfile profile pstats warnings _py_warnings",
        "doctest trace traceback tracemalloc timeit linecache",
    ),
    "text and data formats": (
        "xml configparser difflib codecs re reprlib shlex",
        "json html _markupbase plistlib tomllib csv netrc textwrap string stringprep pprint",
    ),
    "web and sockets": (
        "http ftplib socket ssl selectors ipaddress socketserver xmlrpc wsgiref",
        "urllib webbrowser mimetypes",
    ),
}

MIN_CHARS, MIN_WORDS = 20, 4
MIN_TEXTS = 3000
ENOUGH_CHARS = 200


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


def _docstrings(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes(), filename=str(file))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _sources(stdlib: Path, module: str) -> list[Path]:
    package = stdlib / module
    if package.is_dir():
        inside = sorted(file.relative_to(package).parts for file in package.rglob("*.py"))
        return [package.joinpath(*parts) for parts in inside if not {"test", "tests"} & set(parts)]
    file = stdlib / f"{module}.py"
    return [file] if file.is_file() else []


def _all_docs(stdlib: Path) -> Iterator[Doc]:
    for area, sides in AREAS.items():
        for split, modules in zip(("train", "dev"), sides, strict=True):
            for module in modules.split():
                for file in _sources(stdlib, module):
                    for docstring in _docstrings(file):
                        yield Doc(_leading_paragraphs(docstring), area, module, split)


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
    if len(docs) < MIN_TEXTS or len(filled) < 2 * len(AREAS):
        raise ValueError(
            f"data.source='stdlib' needs the sources of Python's standard library, but {root} has "
            f"only {len(docs)} usable docstrings in {len(filled)} of {2 * len(AREAS)} parts (a "
            "zipped or stripped installation?): use a full Python, or set data.source to a file, "
            "a folder or a hub id"
        )
    return docs
