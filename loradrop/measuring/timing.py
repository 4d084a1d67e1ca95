"""Clocks: what a call costs on a CPU, on a GPU with a cold L2, in a CUDA graph, and on the host.

On a CPU the clock counts the processor time of one thread, so that a busy machine disturbs little.
On a CUDA device, events time the work alone: before every call L2 is filled with other data, which
is only read, so that the call need not write it back; and the stream sleeps while Python launches.
Calls of a few microseconds are captured in a graph, over so many copies of their inputs that none
is found in L2.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

ROUNDS = (7, 51)  # at least, at most
FLUSH_BYTES = 256 << 20  # several times any L2
_SLEEP_CYCLES = 10_000_000  # some milliseconds, longer than launching takes

Work = Callable[[], object]


class Sample(NamedTuple):
    """The time of one call over all rounds, and its peak of memory on a GPU (None elsewhere)."""

    median_us: float
    p20_us: float
    p80_us: float
    peak_bytes: int | None


class Graph:
    """Calls over several copies of their inputs, one after another in a CUDA graph."""

    def __init__(self, calls: Sequence[Work]) -> None:
        import torch

        self.count = len(calls)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is compiled or cached at a first call
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()

    def __call__(self) -> None:
        self._graph.replay()


def copies(bytes_of_one: int) -> int:
    """How many copies of the inputs a graph goes through so that L2 holds none of them."""
    return max(2, -(-FLUSH_BYTES // max(1, bytes_of_one)))


def cpu_clock(calls: Sequence[Work]) -> list[float]:
    """Microseconds of processor time of each call, in the order given."""
    times = []
    for call in calls:
        start = time.process_time_ns()
        call()
        times.append((time.process_time_ns() - start) / 1e3)
    return times


def cuda_clock(calls: Sequence[Work]) -> list[float]:
    """Microseconds of device time of each call, L2 cold, in the order given; a `Graph` by call."""
    import torch

    other = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    events = []
    for call in calls:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        other.amax()
        torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    counts = [call.count if isinstance(call, Graph) else 1 for call in calls]
    times = (1e3 * start.elapsed_time(end) for start, end in events)
    return [us / count for us, count in zip(times, counts, strict=True)]


def host_clock(calls: Sequence[Work]) -> list[float]:
    """Microseconds until each call returns, on an idle GPU: what Python and launching take."""
    import torch

    times = []
    for call in calls:
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    torch.cuda.synchronize()
    return times


CLOCKS = {"cpu": cpu_clock, "cuda": cuda_clock, "host": host_clock}


def peak_bytes(call: Work) -> int:
    """What a call allocates on the GPU at most, beyond what was there before."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def fifths(values: Sequence[float]) -> tuple[float, float]:
    """The 20 % and the 80 % quantile."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], cuts[3]


def measure(calls: Mapping[str, Work], clock_of: str, seconds: float) -> dict[str, Sample]:
    """Times all calls in rounds, each round in an order of its own, for about `seconds`.

    `clock_of` one of `CLOCKS`: the device where they run, or the host that launches them.
    """
    clock = CLOCKS[clock_of]
    names, draw = list(calls), random.Random(0)
    clock([calls[name] for name in names])  # warm-up
    times: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.monotonic() + seconds
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.monotonic() > deadline:
            break
        draw.shuffle(names)
        for name, value in zip(names, clock([calls[name] for name in names]), strict=True):
            times[name].append(value)
    samples = {}
    for name, values in times.items():
        timed_alone = clock_of == "cuda" and not isinstance(calls[name], Graph)
        peak = peak_bytes(calls[name]) if timed_alone else None
        samples[name] = Sample(statistics.median(values), *fifths(values), peak)
    return samples
