"""What `loradrop tune` does in a process of its own with one layer: every backend is checked
against float64, then those that are right are timed in turn, on the device and on the host.

PEFT's way to compute the layer is timed beside them. Adapters are float32, as layers have them.
"""

import gc
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import torch

from loradrop.kernels.tiles import machine_of
from loradrop.measuring import timing, workers
from loradrop.measuring.cases import MASKED, Case, as_peft, make_case, ours, run_once
from loradrop.measuring.correct import check_backend, forget, prepare
from loradrop.op import dispatch
from loradrop.op.call import Problem, problem_on
from loradrop.op.points import BACKWARD, SERVING, Cell

PEFT = "PEFT"
_NO_MEMORY = "out of memory"


class Measured(NamedTuple):
    """What came of one layer, by backend, and by `PEFT`."""

    us: dict[str, float]
    host_us: dict[str, float]  # of a GPU alone: on a CPU the host is the device
    refused: dict[str, str]  # why it must not serve such a layer here
    left_out: dict[str, str]  # why it cannot serve, or is not timed; `workers.TASK` for the layer


def _asked(cell: Cell, device: str) -> Problem:
    """What the dispatcher is asked about the cell on the current device."""
    machine, dtype = machine_of(torch.device(device)), getattr(torch, cell.dtype)
    sizes, backward = (cell.M, cell.K, cell.N, cell.r), cell.direction == BACKWARD
    return problem_on(machine, device, dtype, *sizes, cell.dropout, backward)


def _why_left_out(name: str, cell: Cell, device: str) -> str | None:
    backend = dispatch.BACKENDS[name]
    if reason := backend.missing() or backend.why_not(_asked(cell, device)):
        return reason
    if name == "eager" and device == "cuda" and cell.dropout and cell.M * cell.K >= MASKED:
        return "not timed: its mask takes thousands of launches"
    return None


def measure(
    cell: Cell, device: str, seconds: float, without: Collection[str], begin: Callable[[str], None]
) -> Measured:
    """Checks and times one layer, for about `seconds` once on each clock.

    without: those that were lost here before   begin(name): whose doing it is if the process ends

    Want of memory is nobody's fault. Raises `workers.BrokenDeviceError` where a backend leaves the
    device unusable.
    """
    backward = cell.direction == BACKWARD
    calls: dict[str, Callable[[], None]] = {}
    found = Measured({}, {}, {}, {})
    begin(workers.TASK)
    try:
        case = make_case(cell, device).widened()
        prepare(case, backward)
    except Exception as error:
        if not workers.out_of_memory(error):
            raise
        forget()
        found.left_out[workers.TASK] = _NO_MEMORY
        return found
    for name in (PEFT, *SERVING):
        if name in without:
            found.left_out[name] = "lost"
            continue
        begin(name)
        why = None if name == PEFT else _why_left_out(name, cell, device)
        if why is not None:
            found.left_out[name] = why
            continue
        try:
            calls[name] = _ready(name, case, backward)
        except AssertionError as error:
            found.refused[name] = f"wrong: {error}"
        except Exception as error:
            why = workers.first_line(error)
            if not workers.device_survives(device):
                raise workers.BrokenDeviceError(name, why) from None
            if workers.out_of_memory(error):
                found.left_out[name] = _NO_MEMORY
            elif name == PEFT:
                found.left_out[name] = why
            else:
                found.refused[name] = why
    forget()
    for clock, into in ((device, found.us), *([("host", found.host_us)] * (device == "cuda"))):
        begin(workers.TASK)  # from here on nobody can be blamed
        samples = timing.measure(calls, clock, seconds) if calls else {}
        into |= {name: round(sample.median_us, 1) for name, sample in samples.items()}
    return found


def _ready(name: str, case: Case, backward: bool) -> Callable[[], None]:
    """The call to time, of a backend that is right. Raises AssertionError for one that is not."""
    run = as_peft(case) if name == PEFT else ours(case, backend=name)
    if name == PEFT:
        run_once(run, case, backward)
    else:
        check_backend(case, name, backward)
    return partial(run_once, run, case, backward)


def main() -> None:
    """The life of the process: a request is [cell, device, seconds]."""
    torch.set_num_threads(1)

    def work(task: list[object], without: set[str], begin: Callable[[str], None]) -> Measured:
        cell, device, seconds = task
        found = measure(Cell(*cell), device, seconds, without, begin)  # type: ignore
        gc.collect()
        return found

    workers.serve(work)
