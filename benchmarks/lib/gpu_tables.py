"""What the results of the GPUs say: layers, kernels, the norm and a training step.

A rival is whoever computes the layer and is not ours.
"""

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import package
from lib.markdown import SHORT, markdown, signed, unique
from lib.results import FROZEN, Cell, medians, ratios, read_rows
from loradrop.files import read_json

if TYPE_CHECKING:
    from pandas import DataFrame

RIVALS = ("peft", "peft_fp32", "peft_compiled", "addmm", "merged")
OWN = tuple(f"loradrop_{name}" for name in package.BACKENDS)
SHOWN_RANK = 16
MARGIN = 1.02  # the dispatcher is behind where another is faster by more than this
NOTHING = "Not yet measured on a GPU."
NOT_SERVED = "–"


def size(cell: Cell) -> str:
    """M×K→N, and what else tells the cells of a device apart."""
    way = cell.direction.replace("_", " + ")
    return f"{cell.M}×{cell.K}→{cell.N} {SHORT[cell.dtype]} r={cell.r} p={cell.dropout:g} {way}"


def _cells(table: "DataFrame") -> Iterator[tuple[Cell, dict[str, float]]]:
    """Every cell with the figures that it has."""
    for index, figures in table.iterrows():
        yield Cell(*index), figures.dropna().to_dict()


def _shown(cells: "DataFrame") -> "DataFrame":
    """Rank 16 alone; of each layer, the most tokens and a single one. The files have everything."""
    flat = cells.reset_index()
    most = flat.groupby([n for n in Cell._fields if n != "M"])["M"].transform("max")
    shown = (flat["r"] == SHOWN_RANK) & ((flat["M"] == 1) | (flat["M"] == most))
    chosen = cells[shown.to_numpy()]
    return chosen if len(chosen) else cells


def layers(folder: Path) -> list[str]:
    """Every provider over the frozen product, and how the dispatcher does."""
    if not (rows := read_rows(folder / "bench_lora_linear.csv")):
        return []
    cells = medians(ratios(rows))
    names = [name for name in cells.columns if name != FROZEN]
    body = [
        (
            size(cell),
            f"{of[FROZEN]:.0f}",
            *(f"{of[n]:.2f}" if n in of else NOT_SERVED for n in names),
        )
        for cell, of in _cells(_shown(cells))
    ]
    about = ", ".join(
        f"{name} {unique(rows, name)}" for name in ("torch", "triton", "driver", "commit")
    )
    table = markdown(("layer", "frozen, µs", *names), body)
    return [f"Times over the frozen product; {about}:", table, "\n".join(dispatched(cells))]


def dispatched(cells: "DataFrame") -> list[str]:
    """What loradrop gains over the best rival, and where it is behind its own best backend or one
    of the rivals.
    """
    gains, behind = [], []
    for cell, of in _cells(cells):
        rivals, own = ({n: of[n] for n in names if n in of} for names in (RIVALS, OWN))
        if "loradrop" not in of or not rivals:
            continue
        gains.append(min(rivals.values()) / of["loradrop"])
        best = min(rivals | own, key=(rivals | own).__getitem__)
        if of["loradrop"] > MARGIN * of[best]:
            behind.append(f"{size(cell)}: {of['loradrop'] / of[best]:.2f} of {best}")
    if not gains:
        return []
    return [
        f"- The best of the others takes {statistics.geometric_mean(gains):.2f} times as long as "
        f"loradrop (geometric mean of {len(gains)}; {min(gains):.2f} to {max(gains):.2f}).",
        f"- loradrop is more than 2 % behind the best provider on {len(behind)} of {len(gains)}"
        f"{': ' if behind else '.'}{'; '.join(behind)}",
    ]


def norm(folder: Path) -> list[str]:
    """What the norm costs each backend, and forward hooks PEFT, in percent of the layer."""
    if not (rows := read_rows(folder / "bench_probe.csv")):
        return []
    table = ratios(rows)
    costs = {  # with the norm − without, a process at a time
        name: table[f"{name}+norm"] / table[name] - 1.0
        for name in ("loradrop", *OWN)
        if {name, f"{name}+norm"} <= set(table)
    }
    costs |= {h: table[h] / table["peft"] - 1.0 for h in ("peft_hook", "peft_hook_b") if h in table}
    shown = medians(table.assign(**costs)[list(costs)])
    body = [
        (size(cell), *(signed(100 * of[n], " %") if n in of else NOT_SERVED for n in costs))
        for cell, of in _cells(_shown(shown))
    ]
    return ["The squared norm on against off, of the layer:", markdown(("layer", *costs), body)]


def kernels(folder: Path) -> list[str]:
    """Every kernel's time over its floor: operations over rate, or fewest bytes over bandwidth."""
    path = folder / "bench_parts.json"
    cells = read_json(path)["cells"] if path.exists() else []
    rates = next((cell for cell in cells if "copy_bytes_per_s" in cell), None)
    layers = [cell for cell in cells if cell.get("parts")]
    if rates is None or not layers:
        return []
    names = list(dict.fromkeys(name for cell in layers for name in cell["parts"]))

    def over(part: dict[str, Any] | None) -> str:
        if part is None or "fault" in part:
            return NOT_SERVED
        floor = part["flops"] / rates["bf16_flops_per_s"], part["bytes"] / rates["copy_bytes_per_s"]
        return f"{part['median_us'] / (1e6 * max(floor)):.2f}"

    head = ("kernel", *("{M}×{K}→{N} r={r}".format(**cell) for cell in layers))
    body = [(name, *(over(cell["parts"].get(name)) for cell in layers)) for name in names]
    return ["Every kernel over its floor:", markdown(head, body)]


def steps(folder: Path) -> list[str]:
    """Time and peak memory of a training step."""
    path = folder / "bench_train_step.json"
    cells = read_json(path)["cells"] if path.exists() else []
    arms = list(dict.fromkeys(cell["arm"] for cell in cells))
    found = {(cell["size"], cell["checkpointing"], cell["arm"]): cell for cell in cells}
    body = [
        (f"{name}, checkpointing {'on' if kept else 'off'}",
         *(_step(found.get((name, kept, arm))) for arm in arms))
        for name, kept in dict.fromkeys((cell["size"], cell["checkpointing"]) for cell in cells)
    ]  # fmt: skip
    head = ("model", *arms)
    return ["A training step, ms and peak GiB:", markdown(head, body)] if body else []


def _step(cell: dict[str, Any] | None) -> str:
    if cell is None or "fault" in cell:
        return NOT_SERVED if cell is None else str(cell["fault"])
    peak = cell["peak_bytes"]
    return f"{cell['median_ms']:.0f}" + (f", {peak / 2**30:.1f}" if peak is not None else "")


def gpu(results: Path) -> str:
    """All of it for each GPU, or one line."""
    parts = []
    for folder in sorted(results.iterdir()) if results.exists() else ():
        if folder.name != "cpu" and folder.is_dir():
            found = [*layers(folder), *norm(folder), *kernels(folder), *steps(folder)]
            parts += [f"### {folder.name}", *found] if found else []
    return "\n\n".join(part for part in parts if part) or NOTHING


GPU_TABLES: dict[str, Callable[[Path], str | None]] = {"gpu": gpu}
