"""Files that are whole or not there: written beside their place, flushed, then moved into it.

And the package's own: texts and Jinja2 templates in `assets/`.
"""

import errno
import json
import os
import re
import secrets
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(path)
    draft.touch()
    mode = draft.stat().st_mode
    try:
        yield draft
        if draft.stat().st_mode != mode:  # safetensors lets no other user read what it writes
            with suppress(OSError):
                draft.chmod(mode)
        with open(draft, "r+b") as file:  # Windows flushes no file that is open to read alone
            os.fsync(file.fileno())
        try:
            os.replace(draft, path)
        except PermissionError as error:
            raise PermissionError(
                f"{path} cannot be replaced ({error}): close what has it open, or write into "
                "another folder"
            ) from error
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk, where its file system can do that: many that are
    mounted from elsewhere cannot.
    """
    cannot = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOSYS, errno.ENOTSUP)
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in cannot:
            raise


def _draft(path: Path) -> Path:
    """A new name beside `path`, from which `draft_of` finds it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def draft_of(path: Path) -> str | None:
    """The name of the file that `path` was to become; None where it is not a draft."""
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.tmp", path.name)
    return found and found[1]


def require_writable(folder: Path, remedy: str, path: Path | None = None) -> None:
    """Raises OSError, with the remedy, where nothing can be written into the folder, or it cannot
    be made. It names `path`, if not the folder.
    """
    if folder.is_symlink() and not folder.exists():
        raise OSError(f"{path or folder} cannot be written (it is a link to nowhere): {remedy}")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(f"{path or folder} cannot be written ({error}): {remedy}") from error


def clear_drafts(folder: Path, names: Container[str]) -> None:
    """Removes what a process that was killed left of the files of these names in `folder`."""
    for file in folder.iterdir():
        if draft_of(file) in names:
            file.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replaces the file with `text`, atomically."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Replaces the file with `data` as JSON, atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def create_json(path: str | os.PathLike[str], data: Any) -> None:
    """Makes the file with `data` as JSON, atomically; of several that try, one does.

    Raises FileExistsError where it is there.
    """
    path = Path(path)
    draft = _draft(path)
    write_json(draft, data)
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: for a moment the file is empty
        open(path, "x").close()
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON in the file.

    Raises ValueError naming a file that is damaged, FileNotFoundError for one not there.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or half-written ({error}): restore it from a copy, "
            "or run the step that writes it again"
        ) from error


def asset(name: str) -> str:
    """The text of a file in `assets/`."""
    return resources.files("loradrop").joinpath("assets", name).read_text("utf-8")


def rendered(name: str, **values: Any) -> str:
    """The template in `assets/` with these values, escaped where it is HTML.

    Raises `jinja2.UndefinedError` for a value that it lacks.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=name.endswith(".html"), trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters["quoted"] = json.dumps
    return environment.from_string(asset(name)).render(values)
