"""The tables of what was timed on a CPU: a layer, its statistics, composition, whole scripts."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.markdown import SHORT, markdown, unique
from lib.results import FROZEN, Cell, Row, medians, ratios, read_rows
from loradrop.files import read_json
from loradrop.op.points import FORWARD

if TYPE_CHECKING:
    from pandas import DataFrame

SUMS = (
    "The overheads (ratio − 1), summed over the layers; ours as a part of PEFT's (goals: 0.55 at "
    "r = 8, 0.5 forward at r = 64); what the norm adds, in percent of the frozen layer, on average "
    "(goal: 3)."
)
COMPOSE_AIM = 0.02  # of the layer
SHOWN = {"peft": "PEFT", "peft_hook": "PEFT + norm hook", "loradrop": "loradrop",
         "loradrop+norm": "loradrop + norm", "loradrop_grams": "loradrop + both Gram"}  # fmt: skip


def overheads(table: "DataFrame") -> dict[str, float]:
    """Of the processes of some cells: each provider's overhead (ratio − 1), the median over the
    processes, summed over the cells; ours as a part of PEFT's; and what the norm costs, as a mean.
    """
    cells = medians(table.assign(norm=table["loradrop+norm"] - table["loradrop"]))
    sums = {name: float((cells[name] - 1.0).sum(skipna=False)) for name in SHOWN if name in cells}
    return sums | {"of_peft": sums["loradrop"] / sums["peft"], "norm": float(cells["norm"].mean())}


def _overheads(table: "DataFrame") -> str:
    """A row for each dtype, rank, dropout and direction: the overheads, summed over the layers."""
    body = []
    for (dtype, r, p, direction), group in table.groupby(["dtype", "r", "dropout", "direction"]):
        of = overheads(group)
        sums = (of.get(name, float("nan")) for name in SHOWN)
        body.append((
            SHORT[dtype], str(r), str(p), direction.replace("_", " + "), str(len(medians(group))),
            *("–" if isnan(value) else f"{value:.2f}" for value in sums),
            f"{of['of_peft']:.2f}", f"{100 * of['norm']:.1f}".replace("-", "−"),
        ))  # fmt: skip
    head = ("dtype", "r", "dropout", "direction", "layers", *SHOWN.values())
    return markdown((*head, "of PEFT's", "norm, %"), body)


def _places(rows: Sequence[Row]) -> Iterator[str]:
    """Where each dtype was measured, and with what."""
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of = [row for row in rows if row["dtype"] == dtype]
        device, torch, commit = (unique(of, column) for column in ("device", "torch", "commit"))
        yield f"{SHORT[dtype]} on {device}, torch {torch}, commit {commit}"


def lora_linear_cpu(results: Path) -> str | None:
    """The forward at r = 8 on a CPU, over the frozen product; below it, overheads summed."""
    rows = read_rows(results / "cpu" / "bench_lora_linear.csv")
    if not rows:
        return None
    needed = [name for name in SHOWN if name != "loradrop_grams"]
    table = ratios(rows).dropna(subset=needed)
    shown = table.query(f"r == 8 and direction == {FORWARD!r} and dropout == 0.0")
    body = []
    for index, us in medians(shown).iterrows():
        cell = Cell(*index)
        sizes = f"{cell.M}×{cell.K}→{cell.N}", SHORT[cell.dtype], f"{us[FROZEN] / 1e3:.1f}"
        body.append((*sizes, *(f"{us[name]:.2f}" for name in needed)))
    processes = shown.groupby(list(Cell._fields)).size().min()
    note = (
        f"Forward at r = 8 over `F.linear` alone: medians of {processes} processes, one thread; "
        f"{'; '.join(_places(rows))}."
    )
    head = ("M×K→N", "dtype", "linear, ms", *(SHOWN[name] for name in needed))
    return "\n".join((note, "", markdown(head, body), "", SUMS, "", _overheads(table)))


def summary(results: Path) -> str | None:
    """How much longer a layer takes with an adapter of rank 8, without dropout, on average over the
    layers.
    """
    rows = read_rows(results / "cpu" / "bench_lora_linear.csv")
    if not rows:
        return None
    shown = ratios(rows).query("r == 8 and dropout == 0.0")
    named = {name: SHOWN[name] for name in SHOWN if name != "loradrop_grams"}
    body, layers = [], set[int]()
    for (direction, dtype), group in shown.groupby(["direction", "dtype"]):
        of, count = overheads(group), len(medians(group))
        layers.add(count)
        means = (f"{100 * of[name] / count:.0f}" for name in named)
        body.append((f"{direction.replace('_', ' + ')}, {SHORT[dtype]}", *means))
    title = f"% longer, mean of {' or '.join(map(str, sorted(layers)))} layers"
    return markdown((title, *named.values()), body)


def _found(results: Path, name: str) -> dict[str, Any] | None:
    """What a result file of a CPU holds; None where there is none."""
    path = results / "cpu" / name
    return read_json(path) if path.exists() else None


def statistics_cost(results: Path) -> str | None:
    """What a step of training takes with statistics, over one without."""
    if (found := _found(results, "bench_statistics.json")) is None:
        return None
    body = [
        (name, f"{100 * (of['median'] - 1):+.1f}".replace("-", "−"), _spread_of(of))
        for name, of in found["ratio"].items()
    ]
    return markdown(("collected", "a step of training, % longer", "quartiles"), body)


def _spread_of(ratio: dict[str, float]) -> str:
    """The quartiles of a ratio, as percent above 1."""
    ends = (f"{100 * (ratio[end] - 1):+.1f}" for end in ("low", "high"))
    return " to ".join(ends).replace("-", "−")


def compose(results: Path) -> str | None:
    """What composing costs in each method, as a part of the layer that it serves."""
    if (found := _found(results, "bench_compose.json")) is None:
        return None
    sizes, about, rows = found["protocol"], found["environment"], found["rows"]
    body = [
        (
            f"`{row['method']}`",
            f"{row['r']}",
            f"{row['parameters'] / sizes['targets']:,.0f}",
            f"{row['compose_us']:,.0f}",
            f"{100 * row['part']:.2f} ({100 * row['p20']:.2f}–{100 * row['p80']:.2f})",
        )
        for row in rows
    ]
    over = [f"`{row['method']}`" for row in rows if row["part"] > COMPOSE_AIM]
    ms = statistics.median(row["layer_us"] for row in rows) / 1e3
    note = (
        f"{sizes['targets']} targets {sizes['K']}→{sizes['N']}, float32, one thread, "
        f"{about['device']}, torch {about['torch']}, commit {about['commit']}; a layer of LoRA "
        f"takes {ms:.0f} ms forward and backward at M = {sizes['M']}. Medians of "
        f"{sizes['rounds']} pairs, in brackets the 20 % and 80 % quantiles. Above the goal of "
        f"{100 * COMPOSE_AIM:.0f} %: {', '.join(over) or 'none'}."
    )
    head = ("method", "r", "elements a target", "composition, µs", "of the layer, %")
    return "\n".join((note, "", markdown(head, body)))


def host_gpu(results: Path) -> str | None:
    """The host's time of a layer on a GPU that is not there, over PEFT's."""
    if (found := _found(results, "bench_host_gpu.json")) is None:
        return None
    about, protocol, calls = found["environment"], found["protocol"], found["calls"]
    by_backend: dict[str, list[dict[str, Any]]] = {}
    for call in calls:
        by_backend.setdefault(f"`{call['backend']}`, {call['M']} tokens", []).append(call)
    body = [
        (name, *(f"{of['after']['over_peft']:.2f} ({of['after']['launches']})" for of in row))
        for name, row in by_backend.items()
    ]
    note = (
        f"{protocol['dtype']}, float32 adapters, r = {protocol['r']}, {about['cpu']['name']}, "
        f"commit {about['commits']['after']}; medians of {protocol['processes']} processes, in "
        "brackets the kernels that are launched."
    )
    head = (
        "over PEFT's",
        *(call["call"].replace("_", " ") for call in next(iter(by_backend.values()))),
    )
    return "\n".join((note, "", markdown(head, body)))


def side_by_side(results: Path) -> str | None:
    """The same scripts with PEFT's LoRA and with LoRA-drop."""
    if (found := _found(results, "bench_side_by_side.json")) is None:
        return None
    about, protocol, body = found["environment"], found["protocol"], list[tuple[str, ...]]()
    for row in found["rows"]:
        for side, of in row["sides"].items():
            ours = side == "loradrop"
            figures = [
                f"{len(row['lines'])}" if ours else "",
                f"{of['left']:,}",
                f"{of['step_s']:.3f}",
                _spread_of_ratios(row["ratio"]["step"]) if ours else "",
                _spread_of_ratios(row["ratio"]["all"]) if ours else "",
                f"{of['rss_rise'] / 2**20:,.0f}",
                *(f"{of[name] / 1e6:.2f}" for name in ("checkpoint", "optimizer", "adapter")),
            ]
            body.append((f"{row['task']}, {side}", *figures))
    note = (
        f"Batches of {protocol['batch']}, {protocol['steps']} steps, one thread, "
        f"{about['device']}, torch {about['torch']}, commit {about['commit']}; processor time, "
        f"medians of {protocol['rounds']} rounds, ratios with their extremes."
    )
    head = (
        *("script", "lines changed", "parameters at the end", "a step, s", "over PEFT's"),
        *("all steps, over PEFT's", "memory, MiB", "checkpoint, MB", "of it optimiser", "adapter"),
    )
    return "\n".join((note, "", markdown(head, body)))


def _spread_of_ratios(ratios: Sequence[float]) -> str:
    """The median of some ratios, and the least and the largest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


CPU_TABLES: dict[str, Callable[[Path], str | None]] = {
    "lora_linear_cpu": lora_linear_cpu,
    "cpu_summary": summary,
    "statistics": statistics_cost,
    "compose": compose,
    "host_gpu": host_gpu,
    "side_by_side": side_by_side,
}
