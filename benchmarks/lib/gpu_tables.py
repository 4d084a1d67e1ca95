"""What the results of the GPUs say: layers, kernels and a training step.

A rival is whoever computes the layer and is not ours.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import package
from lib.grids import BOTH
from lib.markdown import markdown, unique
from lib.results import Cell, medians, ratios, read_rows
from loradrop.files import read_json
from loradrop.op.points import MARGIN

if TYPE_CHECKING:
    from pandas import DataFrame

RIVALS = ("peft", "peft_fp32", "peft_compiled", "addmm")
OWN = tuple(f"loradrop_{name}" for name in package.BACKENDS)
FILES = {
    "bench_lora_linear": "Layers",
    "bench_probe": "Layers with their norm",
    "bench_parts": "Single kernels",
}
SHOWN_RANK = 16
NOTHING = "Not yet measured on a GPU."
NOT_SERVED = "–"


def _markdown(table: "DataFrame") -> str:
    """A table with its index; what was not measured is a dash."""
    table = table.astype(object).where(table.notna(), NOT_SERVED).reset_index()
    return markdown([str(name) for name in table], table.astype(str).to_numpy())


def _shown(cells: "DataFrame") -> "DataFrame":
    """Rank 16 alone; of each layer, the most tokens and a single one. The files have everything."""
    flat = cells.reset_index()
    most = flat.groupby([n for n in Cell._fields if n != "M"])["M"].transform("max")
    shown = (flat["r"] == SHOWN_RANK) & ((flat["M"] == 1) | (flat["M"] == most))
    chosen = cells[shown.to_numpy()]
    return chosen if len(chosen) else cells


def layers(folder: Path, name: str, title: str) -> list[str]:
    """Every provider over the frozen product, which is in µs."""
    if not (rows := read_rows(folder / f"{name}.csv")):
        return []
    cells = medians(ratios(rows))
    versions = ("torch", "triton", "driver", "commit")
    about = ", ".join(f"{column} {unique(rows, column)}" for column in versions)
    table = _markdown(_shown(cells).round(2))
    return [f"{title}, over the frozen product; {about}:", table, *dispatched(cells)]


def dispatched(cells: "DataFrame") -> list[str]:
    """What loradrop gains over the best rival, and where it is behind its own best backend or one
    of the rivals.
    """
    gains, behind = [], []
    for cell, figures in cells.iterrows():
        of = figures.dropna()
        rivals, own = ({n: of[n] for n in names if n in of} for names in (RIVALS, OWN))
        if "loradrop" not in of or not rivals:
            continue
        gains.append(min(rivals.values()) / of["loradrop"])
        best = min(rivals | own, key=(rivals | own).__getitem__)
        if of["loradrop"] > (1.0 + MARGIN) * of[best]:
            size = " ".join(map(str, cell))
            behind.append(f"{size}: {of['loradrop'] / of[best]:.2f} of {best}")
    if not gains:
        return []
    return [
        f"The best of the others takes {statistics.geometric_mean(gains):.2f} times as long as "
        f"loradrop (geometric mean of {len(gains)}; {min(gains):.2f} to {max(gains):.2f}). "
        f"It is more than {100 * MARGIN:g} % behind the best provider on {len(behind)} of "
        f"{len(gains)}"
        f"{': ' if behind else '.'}{'; '.join(behind)}",
    ]


def steps(folder: Path) -> list[str]:
    """Time and peak memory of a training step."""
    import pandas as pd

    path = folder / "bench_train_step.json"
    cells = read_json(path)["cells"] if path.exists() else []
    if not cells:
        return []
    flat = pd.DataFrame([cell | {"figures": _step(cell)} for cell in cells])
    table = flat.pivot(index=["size", "checkpointing"], columns="arm", values="figures")
    said = "ms (with those until the host had launched it, and those in which the device was busy)"
    title = f"A training step, {said if 'host_ms' in flat else 'ms'} and peak GiB:"
    return [title, _markdown(table), *_left_out(cells)]


def _left_out(cells: list[dict[str, Any]]) -> list[str]:
    """A sentence where a dispatcher had to do without a backend."""
    names = dict.fromkeys(name for cell in cells for name in cell.get("without", ()))
    return [f"The dispatcher did without {' and '.join(names)} in some steps."] if names else []


def _step(cell: dict[str, Any]) -> str:
    if "fault" in cell:
        return str(cell["fault"])
    peak, host, busy = cell["peak_bytes"], cell.get("host_ms"), cell.get("busy_ms")
    parts = "" if host is None else f" ({host:.0f}, {'?' if busy is None else f'{busy:.0f}'})"
    return f"{cell['median_ms']:.0f}{parts}" + ("" if peak is None else f", {peak / 2**30:.1f}")


def gpu(results: Path) -> str:
    """All of it for each GPU, or one line."""
    parts = []
    for folder in sorted(results.iterdir()) if results.exists() else ():
        if folder.name != "cpu" and folder.is_dir():
            found = [part for name, title in FILES.items() for part in layers(folder, name, title)]
            found += steps(folder)
            parts += [f"### {folder.name}", *found] if found else []
    return "\n\n".join(parts) or NOTHING


# K, N and the dropout of layers of a Llama.
SUMMARY = ((4096, 4096, 0.0), (4096, 14336, 0.0), (4096, 4096, 0.1))


def summary(results: Path) -> str | None:
    """Of each GPU, the layers of a Llama at r = 16: PEFT and loradrop over the frozen product.

    loradrop as the dispatcher served it; where it had no measurement to go by then, the fastest
    backend, which it takes by these figures now.
    """
    tables = []
    for csv in sorted(results.glob("*/bench_lora_linear.csv")):
        if csv.parent.name == "cpu" or not (rows := read_rows(csv)):
            continue
        cells, lines = medians(ratios(rows)), []
        for k, n, dropout in SUMMARY:
            line = [f"{k}→{n}" + (f", dropout {dropout:g}" if dropout else "")]
            for direction in BOTH:
                cell = Cell("bfloat16", 8192, k, n, SHOWN_RANK, dropout, direction)
                if cell in cells.index:
                    of = cells.loc[cell].dropna()
                    fastest = min(of[name] for name in OWN if name in of)
                    line += [f"{of['peft']:.2f}", f"{of.get('loradrop', fastest):.2f}"]
            if len(line) == 5:
                lines.append(line)
        title = unique(rows, "device").removeprefix("NVIDIA ")
        columns = [title, "forward: PEFT", "loradrop", "with backward: PEFT", "loradrop"]
        tables.append(markdown(columns, lines))
    return "\n\n".join(tables) or None


GPU_TABLES: dict[str, Callable[[Path], str | None]] = {"gpu": gpu, "gpu_summary": summary}
