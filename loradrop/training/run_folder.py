"""The folder of a `fit`: who holds it, with which options, and what lies between its two runs.

A resume goes on from there once `start/`, which is written last, holds the adapters.
"""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loradrop.files import create_json, read_json, replacing, write_json
from loradrop.loading import fill
from loradrop.machine import is_first_rank
from loradrop.native import read, save
from loradrop.optimizers import Known
from loradrop.ranks import is_needed

OPTIONS = "options.json"
ADAPTERS, RECORD, KNOWN = "start", "warmup.json", "optimizer.pt"
RESULT = "result.json"  # of a run that came to its end, or was stopped in its second part
Options = Mapping[str, Mapping[str, Any]]
_log = logging.getLogger(__name__)


@contextmanager
def begun(folder: Path, options: Options, resume: bool) -> Iterator[None]:
    """Takes the folder for a run with these options, by section; one that fails inside with nothing
    to resume frees it again.

    Raises ValueError where it holds another run, or a resume has other options.
    """
    file = folder / OPTIONS
    if is_first_rank() or resume:
        _require_same_run(folder, options, resume)
    if is_first_rank():
        _take(folder, options, resume)
    try:
        yield
    except Exception:
        if is_first_rank() and not resumable(folder):
            file.unlink(missing_ok=True)
        raise


def resumable(folder: Path) -> bool:
    """Whether there is something to go on from."""
    left = folder / ADAPTERS, folder / RESULT
    return any(folder.glob("*/checkpoint-*")) or any(path.exists() for path in left)


def _take(folder: Path, options: Options, resume: bool) -> None:
    """Writes the options; of two runs that start together, one finds the file there."""
    file = folder / OPTIONS
    if resume:
        return write_json(file, options)
    if _left_over(folder):
        file.unlink(missing_ok=True)
    try:
        create_json(file, options)
    except FileExistsError as error:
        raise ValueError(held_by_a_run(folder)) from error


def held_by_a_run(folder: Path) -> str:
    """The error for a folder that a new run cannot have."""
    return f"{folder} holds a run already: resume, or choose another output"


def _require_same_run(folder: Path, options: Options, resume: bool) -> None:
    if not (folder / OPTIONS).exists() or _left_over(folder):
        return
    if not resume:
        raise ValueError(held_by_a_run(folder))
    for section, before in read_json(folder / OPTIONS).items():
        now = options.get(section, {})
        names = {*before, *now}
        changed = sorted(k for k in names if not _equal(before.get(k), now.get(k)))
        if changed:
            raise ValueError(
                f"{folder} was begun with other options ({section}: {', '.join(changed)}): resume "
                "with the same, or choose another output"
            )


def _left_over(folder: Path) -> bool:
    """Whether the file of the options is damaged where there is nothing to resume, as a full disk
    can leave it: it is nobody's.
    """
    try:
        read_json(folder / OPTIONS)
    except FileNotFoundError:
        return False
    except ValueError:
        return not resumable(folder)
    return False


def _equal(before: Any, now: Any) -> bool:
    """Lists of names are sets: their order says nothing."""
    if isinstance(before, list) and isinstance(now, list):
        return sorted(map(str, before)) == sorted(map(str, now))
    return bool(before == now)


@dataclass(frozen=True)
class Boundary:
    """Beside the model: steps and seconds of the first run, what it logged, and what its optimiser
    knew, by the parameter's name, where the second run goes on with that.
    """

    steps: int = 0
    seconds: float = 0.0
    history: Sequence[Mapping[str, Any]] = ()
    known: Mapping[str, Known] = field(default_factory=dict)

    def write(self, model: nn.Module, folder: Path) -> None:
        """This, and the model's adapters; every rank calls it."""
        if is_first_rank():
            file, record = io.BytesIO(), {"steps": self.steps, "seconds": self.seconds}
            torch.save(dict(self.known), file)
            with replacing(folder / KNOWN) as draft:
                draft.write_bytes(file.getvalue())
            more = {"history": [*self.history], "sha256": sha256(file.getvalue()).hexdigest()}
            write_json(folder / RECORD, record | more)
        if is_needed(model):
            save(model, folder / ADAPTERS)


def taken(model: nn.Module, folder: Path) -> Boundary | None:
    """What `write` left, its adapters in the model; None where that is not there or not whole."""
    try:
        adapters = read(folder / ADAPTERS)
        record = read_json(folder / RECORD)
        file = (folder / KNOWN).read_bytes()
        if sha256(file).hexdigest() != record.pop("sha256"):
            raise ValueError(f"{folder / KNOWN} is damaged")
    except FileNotFoundError:
        return None
    except ValueError as error:
        _log.warning("%s. Going on from the warm-up's last checkpoint", error)
        return None
    fill(model, adapters)
    known = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    return Boundary(**record, known=known)
