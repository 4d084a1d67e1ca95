"""What `loradrop tune` measured on this machine: a file of points in the user's cache.

The file of each device says on what it was measured: the device, its driver, the versions, a hash
of the kernels. It holds only while all of that is the same. Reading it is the dispatcher's; only
the command writes.
"""

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loradrop._version import __version__
from loradrop.files import read_json, write_json
from loradrop.kernels.tiles import rank_tile
from loradrop.machine import driver, processor, version
from loradrop.op.call import Problem
from loradrop.op.points import KEYS

SCHEMA = 1
CPU = "cpu"
AGAIN = ": run loradrop tune again, or delete the file"
# Of each backend, in a point.
_BY_BACKEND: dict[str, Any] = {"us": (int, float), "host_us": (int, float), "refused": str}
# Beside the kernels: what is timed.
_SOURCES = ("eager", "fused", "cuda", "function", "philox", "replay")


class Tuned(NamedTuple):
    """The file of one device: its points, or why it is not used; neither without a file."""

    path: Path
    points: tuple[dict[str, Any], ...] = ()
    why_not: str | None = None


def folder() -> Path:
    """loradrop's folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "loradrop"


def path_of(device: str) -> Path:
    """Where the points of a device lie: `CPU`, or a GPU as its driver calls it."""
    return folder() / f"tuned-{re.sub('[^a-z0-9]+', '-', device.lower())}.json"


@functools.cache
def kernels_hash() -> str:
    """Of the sources of the backends and of the built extension."""
    root = Path(__file__).parent.parent
    files = [*root.glob("kernels/*.py"), *(root / "op" / f"{name}.py" for name in _SOURCES)]
    found = hashlib.sha256()
    for file in [*sorted(files), *sorted(root.glob("_C.*"))]:
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:16]


def header(device: str) -> dict[str, str]:
    """What a measurement on that device depends on."""
    return {
        "device": processor() if device == CPU else device,
        "driver": "" if device == CPU else driver(),
        "loradrop": __version__,
        "torch": version("torch") or "",
        "triton": version("triton") or "",
        "kernels": kernels_hash(),
    }


def _require_point(point: Mapping[str, Any]) -> None:
    """Raises LookupError or TypeError naming what a point lacks, or has otherwise than written."""
    for name in KEYS:
        value, least = point[name], 1 if name in ("k", "n", "m", "r") else 0
        fits = isinstance(value, str if name in ("device", "dtype") else int)
        if not fits or (isinstance(value, int) and value < least):
            raise TypeError(f"{name} of a point is {value!r}")
    for name, kind in _BY_BACKEND.items():
        if not isinstance(by := point[name], dict):
            raise TypeError(f"{name} of a point is {by!r}")
        for backend, value in by.items():
            if not isinstance(value, kind):
                raise TypeError(f"{name} of {backend} is {value!r}")


def read(path: Path, device: str) -> Tuned:
    """The file at `path`, if it is there, and holds for that device as it is now."""
    try:
        data = read_json(path)
        if data["schema"] != SCHEMA:
            return Tuned(path, why_not=f"{path} has schema {data['schema']}, not {SCHEMA}{AGAIN}")
        of, points, here = data["header"], tuple(data["points"]), header(device)
        there = {name: of.get(name) for name in (*here, *of)}
        for point in points:
            _require_point(point)
    except (FileNotFoundError, NotADirectoryError):
        return Tuned(path)
    except PermissionError as error:
        remedy = "set XDG_CACHE_HOME to a folder of your own, or allow reading it"
        return Tuned(path, why_not=f"{path} cannot be read ({error!r}): {remedy}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return Tuned(path, why_not=f"{path} cannot be read ({error!r}){AGAIN}")
    differs = [name for name, value in there.items() if value != here.get(name)]
    if not differs:
        return Tuned(path, points)
    told = "; ".join(f"{n} was {there[n] or 'none'}, is {here.get(n) or 'none'}" for n in differs)
    return Tuned(path, why_not=f"{path} was measured on something else ({told}){AGAIN}")


def is_tuned(path: Path) -> bool:
    """Whether `write` wrote the file at `path`, of whatever version and on whatever machine."""
    try:
        data = read_json(path)
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.keys() >= {"schema", "header", "points"}


@functools.cache
def of_device(device: str) -> Tuned:
    """The file of `CPU` or of a GPU by its name, read once."""
    return read(path_of(device), device)


def of_problem(problem: Problem) -> Tuned:
    """The file of the device of a call; nothing for a device whose name is not known."""
    device = CPU if problem.device == CPU else problem.device_name
    return of_device(device) if device else Tuned(Path())


def write(path: Path, here: Mapping[str, str], points: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file, atomically. `dispatch.forget` makes it count in this process."""
    write_json(path, {"schema": SCHEMA, "header": dict(here), "points": list(map(dict, points))})


def merged(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The new points, and those of the old that were not measured again."""
    again = [tuple(point[key] for key in KEYS) for point in new]
    return [*new, *(p for p in old if tuple(p[key] for key in KEYS) not in again)]


def refusals(problem: Problem, points: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Backend -> how it failed on such a layer, at any number of tokens, in training or not."""
    found: dict[str, str] = {}
    for point in points:
        if (
            (point["dtype"], point["k"], point["n"])
            == (str(problem.dtype)[6:], problem.k, problem.n)
            and rank_tile(point["r"]) == rank_tile(problem.r)
            and bool(point["dropout"]) == (problem.dropout > 0.0)
        ):
            found |= point["refused"]
    return found
