"""What mkdocs does beside its own: pages from around the repository, links, our docstrings.

Used by mkdocs.yml, as a hook and as an extension of griffe.
"""

import os
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# A page of the site, and the file of the repository that it is.
OUTSIDE = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "triton.md": "kernels/README.md",
    "cuda.md": "csrc/README.md",
    "benchmarks.md": "benchmarks/README.md",
}
COMMANDS = "<!-- commands -->"
_PAGES = {source: page for page, source in OUTSIDE.items()}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    for page, source in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    return rewritten(markdown, page.file.src_uri)


def rewritten(markdown: str, page: str) -> str:
    """The text of a page, with its links as the site needs them.

    A link to a file that is not on the site becomes its text.
    """
    source = OUTSIDE.get(page, f"docs/{page}")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        if "://" in target or not (ROOT / path).exists():
            return match[0]
        there = _PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else "")
        if not there:
            return text
        return f"[{text}]({os.path.relpath(there, os.path.dirname(page) or '.')}{anchor})"

    return _LINK.sub(link, markdown)


def commands() -> str:
    """Every command with its arguments and options, as the command itself knows them."""
    import typer

    from loradrop.command.cli import app

    parts = []
    for name, command in typer.main.get_command(app).commands.items():
        with command.make_context(name, [], resilient_parsing=True) as context:
            usage = " ".join(command.collect_usage_pieces(context))
            rows = [command_row(parameter, context) for parameter in command.get_params(context)]
        table = ["| | |", "|---|---|", *(f"| `{what}` | {text} |" for what, text in rows)]
        parts += [f"## {name}", command.help, f"    loradrop {name} {usage}", "\n".join(table)]
    return "\n\n".join(parts)


def command_row(parameter: Any, context: Any) -> tuple[str, str]:
    """How an argument or option is written, and what it says of itself."""
    record = parameter.get_help_record(context)
    what, text = record or (parameter.make_metavar(context), "")
    return what, text.replace("|", "\\|").strip()


class Docstrings(Extension):
    """Lists of our docstrings, whose lines are "name   what it is", as lists of Markdown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = laid_out(obj.docstring.value)


def laid_out(text: str) -> str:
    """A docstring as Markdown: each paragraph as it is, as a list, or set in type."""
    return "\n\n".join(map(_paragraph, re.split(r"\n\s*\n", text)))


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if all(line.startswith("    ") for line in lines):
        return text
    first = re.match(r"\S+( \S+)* {2,}(?=\S)", lines[0])
    if first and not any(_is_nested(line, first.end()) for line in lines):
        items: list[list[str]] = []
        for line in lines:
            if line.startswith(" "):
                items[-1][1] += f" {line.strip()}"
                continue
            apart = re.match(r"(\S.*?) {2,}(\S.*)", line)
            at = first.end()
            items.append(list(apart.groups()) if apart else [line[:at].strip(), line[at:]])
        return "\n".join(f"- `{name}`: {what}" for name, what in items)
    if any(re.search(r"^ |\S {2,}\S", line) for line in lines):
        return "\n".join(["```text", *lines, "```"])
    return text


def _is_nested(line: str, at: int) -> bool:
    """Whether a line is neither an item, whose text is at column `at`, nor goes on with one."""
    columns = re.split(r"(?<=\S) {2,}(?=\S)", line.strip())
    if line.startswith(" "):
        return len(line) - len(line.lstrip()) > at or len(columns) > 1
    return len(columns) > 2 or (len(columns) == 1 and line[at - 1 : at] != " ")
