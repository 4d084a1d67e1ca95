"""Text that every Python installation has: docstrings of the standard library, by area.

The sources are parsed, never imported. ``AREAS`` names only modules that Python 3.11 to 3.14 share
and that distributions do not ship apart (no tkinter, turtle or idlelib), so that the rows differ
little between installations. Each area lists whole modules for train and for dev: no module has
texts on both sides, and a model cannot win by recognising a module's own phrases.
"""

import ast
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

# area -> (modules of train, modules of dev); a private twin stands beside its public name, because
# the docstrings move between the two from version to version (datetime -> _pydatetime in 3.12).
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
    "data formats": (
        "xml configparser",
        "json html _markupbase plistlib tomllib csv netrc",
    ),
    "data structures": (
        "collections _collections_abc functools weakref _weakrefset contextlib dataclasses types "
        "heapq bisect operator copy",
        "enum graphlib",
    ),
    "dates and locales": (
        "datetime _pydatetime _strptime zoneinfo locale gettext",
        "calendar",
    ),
    "files and paths": (
        "pathlib os ntpath posixpath genericpath nturl2path stat glob fnmatch io _pyio",
        "shutil tempfile fileinput filecmp",
    ),
    "imports and packages": (
        "importlib venv compileall py_compile",
        "pkgutil runpy zipimport modulefinder site sysconfig",
    ),
    "mail": (
        "email imaplib smtplib poplib quopri",
        "mailbox",
    ),
    "numbers": (
        "decimal _pydecimal fractions random",
        "statistics numbers",
    ),
    "system and terminal": (
        "platform ctypes uuid argparse optparse getopt curses pty tty rlcompleter _osx_support",
        "subprocess cmd getpass signal",
    ),
    "testing and debugging": (
        "unittest logging pdb bdb cProfile profile pstats warnings _py_warnings",
        "doctest trace traceback tracemalloc timeit linecache",
    ),
    "text": (
        "difflib codecs pprint reprlib shlex base64",
        "textwrap re string stringprep",
    ),
    "web and sockets": (
        "http urllib ftplib socket ssl selectors ipaddress webbrowser mimetypes",
        "wsgiref socketserver xmlrpc",
    ),
}

MIN_CHARS, MIN_WORDS, MIN_TEXTS = 20, 4, 3000


class Doc(NamedTuple):
    """One docstring's first paragraph; ``module`` is top-level, ``split`` is train or dev."""

    text: str
    area: str
    module: str
    split: str


def _first_paragraph(docstring: str) -> str:
    return " ".join(docstring.strip().partition("\n\n")[0].split())


def _docstrings(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _sources(stdlib: Path, module: str) -> list[Path]:
    package = stdlib / module
    if package.is_dir():
        files = sorted(package.rglob("*.py"), key=lambda file: file.relative_to(package).parts)
        return [f for f in files if not {"test", "tests"} & set(f.relative_to(package).parts)]
    file = stdlib / f"{module}.py"
    return [file] if file.is_file() else []


def read_docs(stdlib: Path | None = None) -> list[Doc]:
    """The usable docstrings under ``stdlib`` (default: this Python's) in a fixed order.

    Whitespace is normalised; texts under 20 characters or 4 words are left out; a text that occurs
    more than once counts for its first place, train before dev, and one that occurs in two areas is
    left out, as it has no right label. Raises ``ValueError`` where a stripped installation leaves
    fewer than 3,000 texts.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    docs: dict[str, Doc] = {}
    ambiguous: set[str] = set()
    for area, sides in AREAS.items():
        for split, modules in zip(("train", "dev"), sides, strict=True):
            for module in modules.split():
                for file in _sources(root, module):
                    for docstring in _docstrings(file):
                        text = _first_paragraph(docstring)
                        first = docs.setdefault(text, Doc(text, area, module, split))
                        if first.area != area:
                            ambiguous.add(text)
    rows = [
        doc
        for text, doc in docs.items()
        if len(text) >= MIN_CHARS and len(text.split()) >= MIN_WORDS and text not in ambiguous
    ]
    return rows
