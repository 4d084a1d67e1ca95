"""Work in processes of its own. Whoever ends or hangs one is named, and the task is done again
without it.

A worker reads one request a task from its input. It answers in lines of JSON: who begins now, who
broke the device, and the result. Needs nothing but Python's own library.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

# One thread, and a C library that keeps freed memory. Otherwise new pages for temporaries cost as
# much as the arithmetic or nothing, by what ran before. Who has most temporaries gains most.
SURROUNDINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}
TASK = ""  # the name under which the task itself is lost: nobody in it can be blamed
START = 60.0  # seconds until a worker begins at least; a cold disk is slow
KILLED = "its process was killed from outside, most likely for want of memory"
STRIKES = 2  # processes that one name may end before it is left out of everything

Work = Callable[[Any, set[str], Callable[[str], None]], Any]


class BrokenDeviceError(Exception):
    """Raised in a worker by what leaves the device unusable: (name, reason)."""


def first_line(error: BaseException) -> str:
    """The kind of an exception and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the host, for which no backend is to blame."""
    said = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    )


def device_survives(device: str) -> bool:
    """Whether the device still works after an exception; a fault of a kernel breaks the process."""
    try:
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
    except Exception:
        return False
    return True


class Answer(NamedTuple):
    """The worker's result, None where the task was given up; and who was lost, with the reason."""

    value: Any
    lost: dict[str, str]


def serve(work: Work) -> None:
    """A worker's life: `work(task, without, begin)` for every request. `begin(name)` says whose
    doing it is if the process ends now, `TASK` for nobody's. What anybody prints goes to the error
    stream.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def send(*event: Any) -> None:
        print(json.dumps(event), file=channel, flush=True)

    for line in sys.stdin:
        task, without = json.loads(line)
        try:
            send("result", work(task, set(without), lambda name: send("begin", name)))
        except BrokenDeviceError as error:
            send("lost", *error.args)
            os._exit(1)  # tidying up a broken device may hang


class _Worker:
    def __init__(self, command: Sequence[str]) -> None:
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - see `stop`
        self.process = subprocess.Popen(
            command,
            env=os.environ | SURROUNDINGS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.events: queue.Queue[list[Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with suppress(ValueError):  # what a library prints before `serve` has begun
                    self.events.put(json.loads(line))
        self.events.put(None)

    def ask(
        self, task: Any, without: Iterable[str], patience: float, own: float
    ) -> tuple[Any, ...]:
        """("result", value) or ("lost", name, reason); the name is None before anybody began."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: the events will say so
            self.process.stdin.write(json.dumps([task, sorted(without)]) + "\n")
            self.process.stdin.flush()
        name, seconds = None, max(patience, START)
        while True:
            try:
                event = self.events.get(timeout=seconds)
            except queue.Empty:
                return "lost", name, f"gave no sign of life for {seconds:g} s and was stopped"
            if event is None:
                return "lost", name, self._end()
            if event[0] != "begin":
                return tuple(event)
            name = event[1]
            seconds = max(patience, own) if name == TASK else patience

    def _end(self) -> str:
        code = self.process.wait()
        if code < 0 and signal.Signals(-code).name == "SIGKILL":  # Windows has none
            return KILLED
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["it printed nothing"])[-1]
        return f"its process ended with {how}: {last[:300]}"

    def stop(self) -> None:
        self.process.kill()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):  # one that hangs in a driver stays
            self.process.wait(10.0)
        self.errors.close()


def answers(
    command: Sequence[str],
    tasks: Iterable[Any],
    patience: float,
    *,
    own: float = START,
    fresh: bool = False,
) -> Iterator[Answer]:
    """One answer a task, in order.

    patience   seconds for each name that begins   own   at least so many for what is nobody's
    fresh      every task gets a process of its own

    A name that is lost in one task is left out of its repetition; one that is lost `STRIKES` times,
    of all further tasks, unless it was killed from outside. Raises RuntimeError where two workers
    in a row end before they begin.
    """
    worker, strikes, unstarted = None, Counter[str](), 0
    try:
        for task in tasks:
            lost: dict[str, str] = {}
            while True:
                worker = worker or _Worker(command)
                out = lost.keys() | {name for name, n in strikes.items() if n >= STRIKES}
                kind, *content = worker.ask(task, out, patience, own)
                if fresh or kind == "lost":
                    worker.stop()
                    worker = None
                if kind == "result":
                    unstarted = 0
                    yield Answer(content[0], lost)
                    break
                name, reason = content
                unstarted = unstarted + 1 if name is None else 0
                if unstarted == 2:
                    raise RuntimeError(f"the worker does not start: {reason}")
                known = name or TASK
                repeat = known != TASK and known not in lost
                lost[known] = reason
                strikes[known] += known != TASK and reason != KILLED
                if not repeat:
                    yield Answer(None, lost)
                    break
    finally:
        if worker is not None:
            worker.stop()
