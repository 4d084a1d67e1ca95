"""What a call would cost on a GPU, measured or predicted, and so which backend should serve it.

What `loradrop tune` measured on this machine comes first (`tuned.py`), then `assets/measured.json`:
medians that `benchmarks/bench_lora_linear.py` measured and `benchmarks/lib/measured.py` took from
its result files. Where neither has anything near, a roofline decides: bytes over bandwidth or
operations over rate, whichever takes longer, and what launching costs the host. Its constants are
data sheets and assumptions; a measurement always outranks them.
"""

import functools
import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from loradrop.files import asset
from loradrop.kernels.tiles import cdiv, rank_tile
from loradrop.op import tuned
from loradrop.op.call import Problem
from loradrop.op.points import MARGIN, SERVING

NEAR = 1.5  # a measurement holds for numbers of tokens up to this factor away
MANY = 2048  # ... or for any from here on, if it was of as many: there the wide product decides


class Rates(NamedTuple):
    """What one GPU does, as far as it is assumed."""

    flops: float  # half-precision multiply-adds by cuBLAS, in FLOP/s, two for each
    bytes: float  # read + written, in bytes/s


# Peaks as they are published: dense bfloat16 with float32 sums in TFLOP/s, memory in TB/s; we have
# measured on an H100 alone. The first whose words are all in the device's name.
_CHIPS = {
    "RTX 3090 Ti": (80, 1.008), "RTX 3090": (71, 0.936), "RTX 4090": (165.2, 1.008),
    "RTX 5090": (209.5, 1.792), "L40S": (362, 0.864), "L4": (121, 0.3),
    "A100 40GB": (312, 1.555), "A100 PCIe": (312, 1.935), "A100": (312, 2.039),
    "H20": (148, 4.0), "H100 PCIe": (756, 2.0), "H100 NVL": (835, 3.9), "H100": (989, 3.35),
    "H200 NVL": (835, 4.8), "H200": (989, 4.8), "B200": (2250, 8.0),
}  # fmt: skip
_PARTIAL = {"MIG", "LAPTOP", "D"}  # words of devices that are less than the chip they name
_REACHED = (0.80, 0.90)  # of those, assumed; for an H200 that is 790 TFLOP/s and 4.3 TB/s
# For other devices: FLOP per clock and multiprocessor, clock in Hz, bytes per FLOP. Of 86, 89 and
# 120 these are GeForce's; professional cards multiply up to twice as fast.
_FAMILIES = {
    80: (2048, 1.3e9, 1 / 170), 86: (512, 1.4e9, 1 / 67), 89: (512, 2.0e9, 1 / 146),
    90: (4096, 1.46e9, 1 / 184), 100: (8192, 1.7e9, 1 / 230), 120: (512, 1.9e9, 1 / 104),
}  # fmt: skip
_FLOAT32 = 1 / 16  # the rate of float32 products outside the matrix units
# µs of the host for each launch, and the rate of the wide product, of cuBLAS's.
_LAUNCH = {"eager": 5.0, "thin": 12.0, "triton": 16.0, "cuda": 12.0, "overlap": 12.0}
_GEMM = {"eager": 1.0, "thin": 1.0, "triton": 0.90, "cuda": 0.99, "overlap": 0.99}
_BESIDE = 0.03  # of the wide product, where `overlap` makes h or t beside it
_STREAM = 0.85  # of the bandwidth that a thin product reaches
_MASK_BYTES = 150  # bytes moved for each element when PyTorch calls draw the mask of dropout
_MASK_LAUNCHES = 100  # for every 2²³ elements of such a mask
# Launches of a forward and of a backward pass, with float32 adapters beside a base of half
# precision: products, sums of planes, copies of A and B, and the memset of `overlap`.
_LAUNCHES = {"eager": (5, 6), "thin": (4, 8), "triton": (2, 6), "cuda": (3, 6), "overlap": (3, 6)}


def rates(arch: int, sms: int, name: str = "") -> Rates:
    """The rates of a device by its name, else assumed by its architecture, or the nearest older."""
    words = {*name.upper().replace("-", " ").split()}
    for chip, (tera_flops, tera_bytes) in _CHIPS.items():
        if words >= {*chip.upper().split()} and not words & _PARTIAL:
            return Rates(_REACHED[0] * tera_flops * 1e12, _REACHED[1] * tera_bytes * 1e12)
    known = max((a for a in _FAMILIES if a <= arch), default=80)
    per_clock, clock, bytes_per_flop = _FAMILIES[known]
    flops = per_clock * clock * max(sms, 1)
    return Rates(flops, flops * bytes_per_flop)


def rates_of(problem: Problem) -> Rates:
    """Those of its device, for its dtype."""
    rate = rates(problem.arch, problem.sms, problem.device_name)
    return rate._replace(flops=rate.flops * _FLOAT32) if problem.dtype == torch.float32 else rate


class Work(NamedTuple):
    """What a call costs by the roofline."""

    us: float  # of the device
    bytes: float  # moved to and from its memory
    launches: int


def work(problem: Problem, backend: str) -> Work:
    """Of one call, with its backward pass where there is one, as the backend is built."""
    m, k, n, r, size = problem.m, problem.k, problem.n, problem.r, problem.dtype.itemsize
    rate, masked = rates_of(problem), problem.dropout > 0
    flops = _GEMM[backend] * rate.flops
    time, moved = 0.0, 0.0

    def stream(amount: float, of_peak: float = 1.0) -> None:
        nonlocal time, moved
        moved += amount
        time += amount / (rate.bytes * of_peak)

    for back, (inner, outer) in enumerate(((k, n), (n, k))[: 1 + problem.grad]):  # y, then dx
        beside = backend == "overlap" and problem.base and not masked
        wide = 0.0
        if problem.base:
            amount = size * (m * inner + k * n + m * outer)
            wide = max(2.0 * m * inner * outer / flops, amount / rate.bytes)
            moved += amount
        time += wide * (1.0 + _BESIDE * beside)
        afterwards = backend in ("eager", "thin") or (masked and back and backend != "triton")
        if problem.base and not afterwards:
            time += 2.0 * m * outer * rank_tile(r) / flops
        else:
            stream(2 * size * m * outer)  # the output is read and written again
        if beside:
            moved += size * m * inner  # in the time of the product
        else:
            stream(size * m * inner, _STREAM)  # shrink
    if problem.grad:
        stream(size * m * (k + n), _STREAM)  # dA and dB
    launches = sum(_LAUNCHES[backend][: 1 + problem.grad])
    if masked and backend == "eager":
        stream(m * k * (_MASK_BYTES + (1 + problem.grad) * 3 * size))
        launches += _MASK_LAUNCHES * cdiv(m * k, 1 << 23)
    elif masked:
        stream((1 + 2 * problem.grad) * m * k / 8)
    return Work(1e6 * time, moved, launches)


def predict(problem: Problem, backend: str) -> float:
    """Microseconds of one call: of the device, or of the host where launching takes longer."""
    found = work(problem, backend)
    return max(found.us, _LAUNCH[backend] * found.launches)


def choose_predicted(problem: Problem, able: Collection[str] = SERVING) -> str:
    """The faster by the roofline, among able backends whose frozen product is cuBLAS's.

    Another GEMM in its place is worth it from 93 % of its rate on, which a guess cannot tell; it is
    taken where neither is able, and the reference where nobody is.
    """
    guessed = {name: predict(problem, name) for name in ("eager", "thin") if name in able}
    return fastest(guessed) or next((name for name in SERVING if name in able), "reference")


def fastest(microseconds: Mapping[str, float]) -> str:
    """The backend to take: a later one of `SERVING` only where it is faster by `MARGIN`.

    Empty where none of `SERVING` has a time.
    """
    best, time = "", math.inf
    for name in SERVING:
        if name in microseconds and microseconds[name] < time * (1.0 - MARGIN * bool(best)):
            best, time = name, microseconds[name]
    return best


@functools.cache
def measurements() -> tuple[dict[str, Any], ...]:
    """The shipped points: device, arch, sms, dtype, m, k, n, r, dropout (0 or 1), grad, and us by
    backend.
    """
    return tuple(json.loads(asset("measured.json"))["points"])


def nearest(problem: Problem, points: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The measured point that holds for the problem: the same layer, about as many tokens.

    An H100 and an H200 have one architecture and as many multiprocessors, and differ in bandwidth:
    where both names are known, a point of another device is never taken.
    """
    if problem.m == 0 or not problem.base or not problem.aligned:
        return None
    best, closest = None, (True, math.inf, math.inf, math.inf)
    for point in points:
        name = point.get("device", "")
        same = (
            (point["arch"], point["dtype"]) == (problem.arch, str(problem.dtype)[6:])
            and (point["k"], point["n"]) == (problem.k, problem.n)
            and rank_tile(point["r"]) == rank_tile(problem.r)
            and bool(point["dropout"]) == (problem.dropout > 0.0)
            and bool(point["grad"]) == problem.grad
            and (name == problem.device_name or not name or not problem.device_name)
        )
        if not same:
            continue
        away = abs(math.log(point["m"] / problem.m))
        # The same device before all, then one of its size, the number of tokens, the rank.
        others = name != problem.device_name
        distance = (others, abs(point["sms"] - problem.sms), away, abs(point["r"] - problem.r))
        holds = away <= math.log(NEAR) or min(point["m"], problem.m) >= MANY
        if holds and distance < closest:
            best, closest = point, distance
    return best


def times_of(point: Mapping[str, Any]) -> dict[str, float]:
    """µs of one call by backend: of the device, or of the host where it takes longer to launch."""
    host = point.get("host_us", {})
    return {name: max(us, host.get(name, 0.0)) for name, us in point["us"].items()}


def _measured(problem: Problem, able: Collection[str]) -> tuple[str, dict[str, Any]] | None:
    """The fastest able backend, and the point that says so: one of this machine's own, if any."""
    for points in (tuned.of_problem(problem).points, measurements()):
        point = nearest(problem, points)
        if point is not None:
            times = {name: us for name, us in times_of(point).items() if name in able}
            if best := fastest(times):
                return best, point
    return None


def choose_measured(problem: Problem, able: Collection[str] = SERVING) -> str | None:
    """The fastest backend among `able` by the nearest measurement, None without one."""
    found = _measured(problem, able)
    return None if found is None else found[0]


def explain(problem: Problem, able: Collection[str] = SERVING) -> str:
    """Why an unnamed call gets its backend, in a sentence."""
    found = _measured(problem, able)
    if found is not None:
        chosen, point = found
        where = f" on {point['device']}" if point.get("device") else ""
        how = "by loradrop tune" if "host_us" in point else f"measured{where}"
        return f"{chosen}: {how} at {point['m']} tokens, in µs: {written(point)}"
    names = [name for name in SERVING if name in able]
    times = ", ".join(f"{name} {predict(problem, name):.0f}" for name in names) or "nothing"
    guess = choose_predicted(problem, able)
    return f"{guess}: not measured; the roofline's guess, in µs: {times}"


def written(point: Mapping[str, Any]) -> str:
    """The times of a point as text: "thin 700, triton 650 (host 812)", the host where it counts."""
    longer = {name: us for name, us in times_of(point).items() if us > point["us"][name]}
    return ", ".join(
        f"{name} {us:.0f}" + (f" (host {longer[name]:.0f})" if name in longer else "")
        for name, us in point["us"].items()
    )
