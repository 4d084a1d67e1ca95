"""The site is built without a warning and loads nothing from elsewhere; links lead somewhere."""

import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import loradrop
from loradrop import methods

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / name / "README.md" for name in ("kernels", "csrc", "benchmarks")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]+)?\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """docs/site.py."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs" / "site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_loads_only_what_is_beside_it(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|link|img|iframe|object)\b[^>]*>", text)
        for address in re.findall(r'(?:src|href|data)="([^"]+)"', " ".join(tags)):
            assert "//" not in address, f"{page.name} loads {address}"
            there = page.parent / html.unescape(address).partition("#")[0].partition("?")[0]
            assert address.startswith("data:") or there.exists(), f"{page.name}: {address}"


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links are from the root of a server
            continue
        text = page.read_text(encoding="utf-8")
        for address in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text):
            path, _, anchor = html.unescape(address).partition("#")
            if "//" in path or path.startswith("mailto:"):
                continue
            there = (page.parent / path).resolve() if path else page
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), f"{page.name} links to {address}"
            if anchor and not anchor.startswith("__"):
                found = f'id="{anchor}"' in there.read_text(encoding="utf-8")
                assert found, f"{page.name} links to {address}"


def test_the_reference_has_every_public_name(site: Path) -> None:
    pages = (site / "reference").glob("*.html")
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    names = [f"loradrop.{name}" for name in loradrop.__all__]
    for method in methods.available().values():
        public = method.__qualname__ in loradrop.__all__
        names.append(f"{'loradrop' if public else method.__module__}.{method.__qualname__}")
    assert [name for name in names if f'id="{name}"' not in text] == []


@pytest.mark.parametrize("page", ["python", "methods", "op"])
def test_the_reference_reads_without_the_site(page: str) -> None:
    """Each name has a line of its own."""
    text = (ROOT / "docs" / "reference" / f"{page}.md").read_text(encoding="utf-8")
    for name in re.findall(r"^::: (\S+)$", text, re.M):
        assert f"\n- `{name}` " in text, f"{page}.md says nothing of {name}"


def test_the_reference_has_every_command(site: Path) -> None:
    from typer.main import get_command

    from loradrop.command.cli import app

    text = html.unescape((site / "reference" / "command.html").read_text(encoding="utf-8"))
    for name, command in get_command(app).commands.items():
        _, found, after = text.partition(f'<h2 id="{name}">')
        part = after.partition("<h2 ")[0]
        assert found and command.help in part
        for option in command.params:
            assert option.help, f"{name}: {option.opts[0]} says nothing"
            if option.opts[0].startswith("--"):
                assert f"<code>{option.opts[0]}" in part, f"{name}: {option.opts[0]}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_files_of_the_repository(source: Path) -> None:
    """What a reader of the repository follows, without any site."""
    text = source.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.S | re.M)
    for path, _ in LINK.findall(text):
        if "://" not in path:
            assert (source.parent / path).exists(), f"{source.name} links to {path}"


def test_the_map_names_every_module() -> None:
    """But for folders of like files: methods, kernels, and what measures."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "loradrop"
    folders = ["", "op", "report", "text", "formats", "integrations"]
    for path in (path for folder in folders for path in (package / folder).glob("*.py")):
        is_named = path.name.startswith("_") or f"`{path.name}`" in text
        assert is_named, f"the map lacks {path.relative_to(package)}"


def test_links_are_rewritten(hook: ModuleType) -> None:
    was = "[map](../CONTRIBUTING.md#the-map), [x](https://a.b/c), [tiles](../kernels/tiles.py)"
    now = "[map](contributing.md#the-map), [x](https://a.b/c), tiles"
    assert hook.rewritten(was, "decisions.md") == now
    assert hook.rewritten("[speed](../docs/results.md)", "cuda.md") == "[speed](results.md)"
    up = hook.rewritten("[map](../../CONTRIBUTING.md)", "how-to/fit.md")
    assert up == "[map](../contributing.md)"


@pytest.mark.parametrize(
    ("text", "page"),
    [
        ("r     rank;\n      more\nalpha, p   of it", "- `r`: rank; more\n- `alpha, p`: of it"),
        ("steps    of all\nmeasured the part", "- `steps`: of all\n- `measured`: the part"),
        ("    code()", "    code()"),
        ("plain\ntext", "plain\ntext"),
        ("a   of\n    b   nested", "```text\na   of\n    b   nested\n```"),
        ("Exactly one of\n  a   x", "```text\nExactly one of\n  a   x\n```"),
    ],
)
def test_docstrings_are_laid_out(text: str, page: str, hook: ModuleType) -> None:
    assert hook.laid_out(f"First.\n\n{text}\n\nLast.") == f"First.\n\n{page}\n\nLast."


def test_the_pains_name_tests_that_there_are() -> None:
    text = (ROOT / "docs" / "pains.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*$", text, re.M)
    assert rows == [str(number) for number in range(1, 16)]
    named = re.findall(r"(test_\w+\.py)((?:,? `\w+`)*)", text)
    assert len(named) > 15
    for file, names in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert f"def test_{name}(" in source or f'"{name}"' in source, f"{file}: {name}"
