"""Whether a checkpoint of a run is whole."""

import logging
import re
import shutil
from hashlib import sha256
from pathlib import Path

from loradrop.files import read_json, write_json

COMPLETE = "complete.json"
WRITING = "checkpoint-is-incomplete.txt"  # of transformers, which takes it away after `seal`
_log = logging.getLogger(__name__)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint. Half-written and damaged ones are named and removed; what has a
    longer name, as a copy, is none.
    """
    named = (p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name))
    found = sorted(named, key=lambda p: int(p.name.rpartition("-")[2]))
    for checkpoint in reversed(found):
        reason = _damage(checkpoint)
        if reason is None:
            return checkpoint
        _log.warning("%s %s; going on from an earlier one", checkpoint, reason)
        shutil.rmtree(checkpoint, ignore_errors=True)  # another rank may do the same
    return None


def seal(folder: Path) -> None:
    """Write down what is in a checkpoint, once all ranks have written their part: it is whole."""
    write_json(folder / COMPLETE, _digests(folder))


def _digests(folder: Path) -> dict[str, str]:
    beside = COMPLETE, WRITING
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in beside]
    return {str(f.relative_to(folder)): sha256(f.read_bytes()).hexdigest() for f in files}


def _damage(checkpoint: Path) -> str | None:
    try:
        expected = read_json(checkpoint / COMPLETE)
    except FileNotFoundError:
        return "was being written when the run ended"
    except ValueError as error:
        return str(error)
    found = _digests(checkpoint)
    wrong = [name for name in expected if found.get(name) != expected[name]]
    return f"is damaged ({', '.join(wrong)})" if wrong else None
