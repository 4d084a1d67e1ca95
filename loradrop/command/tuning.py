"""`loradrop tune`: the layers of a model, what every backend takes for them here, and the table.

Each layer is checked and timed in a process of its own (`measuring/child.py`). Whoever crashes or
hangs there is named and left out of the next try, and never serves such a layer here again.
"""

import math
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import loradrop
from loradrop.config import LoRAConfig
from loradrop.files import require_writable
from loradrop.kernels.tiles import machine_of
from loradrop.measuring import workers
from loradrop.measuring.child import PEFT, Measured
from loradrop.op import dispatch, tuned
from loradrop.op.costs import fastest, times_of
from loradrop.op.philox import quantize
from loradrop.op.points import DIRECTIONS, SERVING, Cell, key_of, point_of

ROOT = Path(loradrop.__file__).parent.parent
CHILD = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom loradrop.measuring import child\n"
COMMAND = (sys.executable, "-P", "-c", CHILD + "child.main()")
RANK = 16
LIMIT = 120.0
TOKENS = {"cuda": (1024, 2048, 4096, 8192), "cpu": (512,)}  # each holds up to 1.5 times away
DEFAULT_DTYPE = {"cuda": "bfloat16", "cpu": "float32"}
_ELSEWHERE = "it was lost at two layers before, and was not tried here"


class Layer(NamedTuple):
    """A linear layer: weight (n, k) and the rank of its adapter."""

    k: int
    n: int
    r: int


class Tried(NamedTuple):
    """What came of one cell.

    point   None where nothing is known
    peft    µs of PEFT's calls, of the device or of the host, whichever is longer; None without
    notes   who failed or was left out, and why
    """

    cell: Cell
    point: dict[str, Any] | None
    peft: float | None
    notes: tuple[str, ...]


def numbers(option: str, text: str) -> tuple[int, ...]:
    """From "1024,2048". Raises ValueError naming the option."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} {text!r}: write whole numbers as 1024,2048")
    return tuple(dict.fromkeys(map(int, parts)))


def layers_written(text: str, ranks: Iterable[int]) -> list[Layer] | None:
    """The layers of "4096x4096,4096x14336", K x N each; None for the name of a model."""
    if not re.fullmatch(r"[\dx,]*\d+x\d+[\dx,]*", text):
        return None
    parts = [part.split("x") for part in text.split(",")]
    if any(len(part) != 2 or not all(p.isdigit() and int(p) > 0 for p in part) for part in parts):
        raise ValueError(f"{text!r}: write layers as KxN,KxN, such as 4096x4096,4096x14336")
    return list(dict.fromkeys(Layer(int(k), int(n), r) for k, n in parts for r in ranks))


def layers_of_model(
    model_id: str, configs: Iterable[LoRAConfig], revision: str | None = None
) -> list[Layer]:
    """The distinct layers that `inject` would adapt, by size and rank; no weight is read.

    Raises ValueError for a model that cannot be had, and for targets as `inject` does.
    """
    from loradrop.command.base_models import without_weights
    from loradrop.layers import shape_of
    from loradrop.matching import find_targets

    remedy = "give layer sizes instead, such as 4096x4096"
    model, found = without_weights(model_id, revision, remedy), dict[Layer, None]()
    for config in configs:
        for name, module in find_targets(model, config):
            k, n = shape_of(module) or (0, 0)
            found[Layer(k, n, config.rank(name))] = None
    return list(found)


def layers_to_tune(
    source: str, ranks: Sequence[int] | None, targets: str | None
) -> tuple[list[Layer], float]:
    """The layers that a user names, and the dropout that goes with them.

    source    layers as KxN,KxN; a model of transformers; or the YAML file of a run
    ranks     16 where none is given, or the file's
    targets   "all-linear", or names as a,b; query and value projections by default, or the file's

    Raises ValueError for what cannot be read or matches nothing.
    """
    if (written := layers_written(source, ranks or (RANK,))) is not None:
        if targets is not None:
            raise ValueError(f"--targets {targets!r} needs a model, and {source!r} names layers")
        return written, 0.0
    from loradrop.command.run_config import configured

    model, config = configured(source, targets, LoRAConfig(r=RANK))
    configs = [replace(config, r=r) for r in ranks] if ranks else [config]
    return layers_of_model(model.id, configs, model.revision), config.lora_dropout


def cells_of(
    layers: Iterable[Layer], tokens: Iterable[int], dtype: str, dropout: float, train: bool
) -> list[Cell]:
    """What is to be measured, one layer after another.

    Raises ValueError for a dropout that the op would not take.
    """
    quantize(dropout)
    tokens = list(tokens)
    return [Cell(dtype, m, *layer, dropout, DIRECTIONS[train]) for layer in layers for m in tokens]


def measured(
    cells: Sequence[Cell],
    device: str,
    seconds: float,
    limit: float = LIMIT,
    command: Sequence[str] = COMMAND,
) -> Iterator[Tried]:
    """What comes of every cell, in order.

    seconds   of timing, for a cell on each clock
    limit     seconds for a backend, its compilation included; the truth and timing may take longer
    command   starts the process, which serves as `measuring.child.main` does

    Raises RuntimeError where the processes do not start.
    """
    machine = machine_of(torch.device(device))
    name = machine.name if device == "cuda" else tuned.header(tuned.CPU)["device"]
    tasks = [[cell, device, seconds] for cell in cells]
    answers = workers.answers(command, tasks, limit, own=workers.START + seconds)
    for cell, answer in zip(cells, answers, strict=True):
        found = Measured(*answer.value) if answer.value else Measured({}, {}, {}, {})
        key = key_of(cell, name, machine.arch, machine.sms)
        yield _tried(cell, key, found, answer.lost)


def _tried(cell: Cell, key: tuple[Any, ...], found: Measured, lost: dict[str, str]) -> Tried:
    """The point of a cell: `lost` are those that ended or hung their process, with the reason."""
    absent = {name: why for name, why in found.left_out.items() if why != "lost"}
    before = [name for name, why in found.left_out.items() if why == "lost" and name not in lost]
    failed = {name: why for name, why in lost.items() if why != workers.KILLED}
    refused = found.refused | {name: why for name, why in failed.items() if name in SERVING}
    refused |= {name: _ELSEWHERE for name in before if name in SERVING}
    us = {name: us for name, us in found.us.items() if name != PEFT}
    host = {name: us for name, us in found.host_us.items() if name != PEFT}
    point = point_of(key, us, host_us=host, refused=refused) if us or refused else None
    notes = [f"{name} failed, and is not used for such layers: {refused[name]}" for name in refused]
    timeless = {name or "this layer": why for name, why in lost.items() if name not in refused}
    notes += [f"{name} has no time: {why}" for name, why in timeless.items()]
    notes += [f"{name or 'this layer'} is left out: {why}" for name, why in absent.items()]
    peft = max(found.us[PEFT], found.host_us.get(PEFT, 0.0)) if PEFT in found.us else None
    return Tried(cell, point, peft, tuple(notes))


def about(cells: Sequence[Cell], device: str) -> str:
    """What is measured, in a sentence above the table."""
    cell = cells[0]
    where = torch.cuda.get_device_name() if device == "cuda" else tuned.header(tuned.CPU)["device"]
    host = "; in brackets what the host takes, where it is longer" if device == "cuda" else ""
    passes = "forward + backward" if cell.direction == DIRECTIONS[True] else "forward"
    dropout = f", dropout {cell.dropout:g}" if cell.dropout else ""
    return f"{where}: {passes}, {cell.dtype}{dropout}, in µs{host}"


def head() -> str:
    """The first line of the table."""
    names = "".join(f"{name:>16}" for name in (PEFT, *SERVING))
    return f"{'tokens':>7}{'K':>7}{'N':>7}{'r':>5}{names}   fastest"


def row(tried: Tried) -> str:
    """A line of the table, in µs; beside a time of the device, in brackets, the longer of the host.

    The last column: the fastest, and how many times as fast as PEFT's calls.
    """
    cell, point = tried.cell, tried.point or {"us": {}, "host_us": {}, "refused": {}}
    times = times_of(point)
    line = f"{cell.M:>7}{cell.K:>7}{cell.N:>7}{cell.r:>5}"
    line += f"{'–' if tried.peft is None else f'{tried.peft:.0f}':>16}"
    for name in SERVING:
        text = "failed" if name in point["refused"] else "–"
        if name in times:
            us, longest = point["us"][name], times[name]
            text = f"{us:.0f}" + f" ({longest:.0f})" * (longest > us)
        line += f"{text:>16}"
    best = fastest(times)
    if not best:
        return f"{line}   none"
    return f"{line}   {best}" + (f", {tried.peft / times[best]:.2f} x" if tried.peft else "")


def _name(device: str) -> str:
    """Under which `tuned` keeps the points of the current device."""
    return torch.cuda.get_device_name() if device == "cuda" else tuned.CPU


def destination(device: str, out: Path | None = None) -> Path:
    """The file of this device, or `out`, once it is clear that it can be written.

    Raises ValueError for an `out` that is a folder, or holds anything but what `tune` measured, and
    OSError for a path that cannot be written.
    """
    path = out or tuned.path_of(_name(device))
    remedy = "name another file by --out"
    if out is None:
        remedy = "point XDG_CACHE_HOME to a folder where loradrop may write, and looks afterwards"
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file, such as {path / 'tuned.json'}")
        if out is not None and path.exists() and not tuned.is_tuned(path):
            raise ValueError(
                f"--out {path} is not a file that loradrop tune wrote: name another, or delete it"
            )
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): {remedy}") from error
    require_writable(path.parent, remedy, path)
    return path


def keep(points: Iterable[dict[str, Any]], device: str, out: Path | None = None) -> Path:
    """Writes the points into the file of this device, or into `out`: the path.

    Points that are there already stay, unless they were measured again or the file holds no more.
    """
    of = _name(device)
    path, here = out or tuned.path_of(of), tuned.header(of)
    tuned.write(path, here, tuned.merged(tuned.read(path, of).points, list(points)))
    dispatch.forget()
    return path


def tune(
    cells: Sequence[Cell],
    device: str,
    say: Callable[[str], None],
    *,
    seconds: float = 1.0,
    limit: float = LIMIT,
    out: Path | None = None,
    command: Sequence[str] = COMMAND,
) -> Path | None:
    """Measures, prints the table and writes the file as results come, each note once.

    Arguments as `measured` and `keep` have them. Returns the file, None where nothing came. Raises
    ValueError for seconds or a limit that are not times, and as `destination` and `measured` do.
    """
    if not 0.0 <= seconds < math.inf:
        raise ValueError(f"--seconds {seconds:g}: choose a number from 0 up, such as 1")
    if not 0.0 < limit <= threading.TIMEOUT_MAX:
        raise ValueError(f"--limit {limit:g}: choose a positive number of seconds, such as 120")
    before = tuned.read(destination(device, out), _name(device))
    say(about(cells, device))
    if before.why_not is not None:
        say(f"{before.why_not.removesuffix(tuned.AGAIN)}: what it holds is replaced")
    path, notes = None, set[str]()
    say(head())
    for one in measured(cells, device, seconds, limit, command):
        say(row(one))
        for note in one.notes:
            if note not in notes:
                say(f"    {note}")
        notes |= set(one.notes)
        if one.point is not None:
            path = keep([one.point], device, out)
    return path
