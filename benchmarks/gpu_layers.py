"""What the results of a GPU say about single layers: the tables, and where the time goes.

A rival is whoever computes the layer and is not ours. The floor of a layer is its two or one wide
products by cuBLAS, the fewest bytes of its thin products, and the operations of the LoRA product.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markup import MISSING, SHORT, about, direction, markdown, shape
from timing import Cell, Ratios, label, paired, read_rows

from loradrop.files import read_json
from loradrop.op.costs import MARGIN, SERVING

KERNELS = ("thin", "triton", "cuda")  # backends with kernels of ours
RIVALS = ("peft", "peft_fp32", "peft_compiled", "addmm", "graph_split", "merged")
PRODUCTS = ("gemm_triton", "gemm_cuda", "gemm_cutlass")  # held against cuBLAS
SHOWN_RANK = 16
NOT_SERVED = "–"


def devices(results: Path, name: str) -> list[Path]:
    """The result files of that name, of every device but the CPU."""
    return [path for path in sorted(results.glob(f"*/{name}")) if path.parent.name != "cpu"]


def _shown(cells: Sequence[Ratios]) -> list[Ratios]:
    """Rank 16 alone; of each layer, the most tokens and a single one. The files have everything."""
    of_rank = [c for c in cells if c.cell.r == SHOWN_RANK] or list(cells)
    most: dict[Cell, int] = {}
    for c in of_rank:
        layer = c.cell._replace(M=0)
        most[layer] = max(c.cell.M, most.get(layer, 0))
    return [c for c in of_rank if c.cell.M in (1, most[c.cell._replace(M=0)])]


def ratio_table(cells: Sequence[Ratios], names: Sequence[str]) -> str:
    """Every cell's times over the frozen product."""
    head = ("M×K→N", "dtype", "r", "dropout", "direction", "frozen, µs", *names)
    body = (
        (
            shape(c.cell),
            SHORT[c.cell.dtype],
            str(c.cell.r),
            f"{c.cell.dropout:g}",
            direction(c.cell),
            f"{statistics.median(c.frozen_us):.0f}",
            *(f"{c.median(name):.2f}" if name in c.ratios else NOT_SERVED for name in names),
        )
        for c in cells
    )
    return markdown(head, body)


def lora_linear_gpu(results: Path) -> str | None:
    """Every provider's ratio to the frozen product, and a summary, for each device but the CPU."""
    parts = []
    for path in devices(results, "bench_lora_linear.csv"):
        rows = read_rows(path)
        if not rows:
            continue
        cells = paired(rows)
        names = list(dict.fromkeys(label(row) for row in rows if row["provider"] != "frozen"))
        report = read_json(path.with_suffix(".json")) if path.with_suffix(".json").exists() else {}
        chosen = {Cell(*pick["cell"]): pick["chosen"] for pick in report.get("dispatcher", ())}
        parts += [f"{about(rows)}:", "", ratio_table(_shown(cells), names), ""]
        parts += [f"- {line}" for line in summary(cells, chosen)]
        parts += ["", *_gap(path.with_name("bench_parts.json")), ""]
    return "\n".join(parts).rstrip().replace("\n\n\n", "\n\n") or None


def summary(cells: Sequence[Ratios], chosen: dict[Cell, str]) -> list[str]:
    """How often our kernels serve and what that gains, where the dispatcher is behind, and every
    backend's own figures.
    """
    points = [c for c in cells if "loradrop" in c.ratios]
    served = [c for c in points if chosen.get(c.cell) in KERNELS]
    lines = [f"Our kernels serve {len(served)} of {len(points)} points."]
    gains = [min(rival) / c.median("loradrop") for c in served if (rival := _rivals(c))]
    if gains:
        lines[0] += (
            f" There the best of the others takes {statistics.geometric_mean(gains):.2f} times as "
            f"long as loradrop (geometric mean; {min(gains):.2f} to {max(gains):.2f})."
        )
    lines += [line for name in SERVING if (line := _own_figures(points, f"loradrop_{name}"))]
    lines += [line for name in PRODUCTS if (line := _of_cublas(points, name))]
    lines += _lorafusion(points)
    behind = list(_behind(points))
    lines.append(
        f"The dispatcher is more than {100 * MARGIN:g} % behind the best provider on {len(behind)} "
        f"of {len(points)} points{': ' if behind else '.'}{'; '.join(behind)}"
    )
    return lines


def _rivals(c: Ratios) -> list[float]:
    return [c.median(name) for name in RIVALS if name in c.ratios]


def _own_figures(points: Iterable[Ratios], name: str) -> str | None:
    """Median overhead by direction, and against `addmm`, also where it loses."""
    own = [c for c in points if name in c.ratios]
    if not own:
        return None
    figures = []
    for way in dict.fromkeys(c.cell.direction for c in own):
        ratios = [c.median(name) for c in own if c.cell.direction == way]
        figures.append(f"{way.replace('_', ' + ')} {_range(ratios)}")
    beside = [c for c in own if "addmm" in c.ratios]
    wins = sum(c.median(name) < c.median("addmm") for c in beside)
    ahead = f"; faster than addmm on {wins} of {len(beside)} points" if beside else ""
    return f"{name} over the frozen product, median (range): {', '.join(figures)}{ahead}."


def _range(values: Sequence[float], form: str = ".2f") -> str:
    """The median, and in parentheses from the least to the greatest."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


def _of_cublas(points: Iterable[Ratios], name: str) -> str | None:
    both = [c for c in points if {name, "cublas"} <= set(c.ratios)]
    if not both:
        return None
    parts = _range([c.median("cublas") / c.median(name) for c in both])
    return f"{name} without an adapter reaches {parts} of cuBLAS."


def _lorafusion(points: Iterable[Ratios]) -> list[str]:
    """PEFT over loradrop on LoRAFusion's configuration: square, r = 16, p = 0.1, both passes."""
    by_size: dict[int, list[float]] = {}
    for c in points:
        at = c.cell
        its = (at.K, at.r, at.dropout, at.direction) == (at.N, 16, 0.1, "forward_backward")
        if its and "peft" in c.ratios:
            by_size.setdefault(at.K, []).append(c.median("peft") / c.median("loradrop"))
    if not by_size:
        return []
    means = (f"{k}² {statistics.geometric_mean(by_size[k]):.2f}" for k in sorted(by_size))
    return [f"LoRAFusion's configuration, PEFT's time over loradrop's: {', '.join(means)}."]


def _behind(points: Iterable[Ratios]) -> Iterable[str]:
    for c in points:
        others = {name: c.median(name) for name in RIVALS if name in c.ratios}
        backends = (f"loradrop_{name}" for name in SERVING)
        others |= {name: c.median(name) for name in backends if name in c.ratios}
        if not others:
            continue
        best = min(others, key=others.__getitem__)
        ratio = c.median("loradrop") / others[best]
        if ratio > 1.0 + MARGIN:
            size = f"{shape(c.cell)} r={c.cell.r} p={c.cell.dropout:g} {direction(c.cell)}"
            yield f"{size}: {ratio:.2f} of {best}"


def _gap(path: Path) -> list[str]:
    """The time of `triton` that the floor does not explain, by kernel, in µs."""
    if not path.exists():
        return [f"Where the time beyond the floor goes: {MISSING}."]
    report = read_json(path)
    sizes: dict[tuple[int, ...], dict[str, Any]] = {}
    for row in report["rows"]:
        if "median_us" in row:
            key = tuple(row[name] for name in ("M", "K", "N", "r"))
            sizes.setdefault(key, {})[row["variant"]] = row
    body = []
    copy = report["ceilings"]["copy_bytes_per_s"]
    for (m, k, n, r), rows in sizes.items():
        for way in ("forward", "forward + backward"):
            split = gap(rows, copy, way != "forward")
            figures = [MISSING] * 5 if split is None else [f"{us:.0f}" for us in split]
            body.append((f"{m}×{k}→{n}", str(r), way, *figures))
    head = ("M×K→N", "r", "direction", "floor, µs", "GEMM", "shrink", "chunk", "outer")
    table = markdown(head, body)
    rates = [f"- {line}" for line in reached(sizes.values(), copy)]
    return ["What the kernels of `triton` take beyond the floor, µs:", "", table, "", *rates]


def reached(sizes: Iterable[dict[str, Any]], copy: float) -> list[str]:
    """Which part of the bandwidth the thin kernels reach, and what the LoRA chunk costs."""
    of_copy: dict[str, list[float]] = {}
    chunk = []
    for rows in sizes:
        for name, row in rows.items():
            kind = name.split(" ")[0]
            if kind in ("shrink", "outer", "addmm_"):
                part = 1e6 * row["bytes"] / copy / row["median_us"]
                of_copy.setdefault(kind, []).append(part)
            if kind == "gemm+chunk" and (bare := rows.get(name.replace("+chunk", ""))):
                chunk.append(100 * (row["median_us"] / bare["median_us"] - 1.0))
    lines = [
        f"{kind} reaches {_range(parts)} of a copy's bandwidth." for kind, parts in of_copy.items()
    ]
    return lines + (
        [f"The LoRA chunk costs {_range(chunk, '.1f')} % of the product."] if chunk else []
    )


def gap(
    rows: dict[str, Any], copy: float, backward: bool
) -> tuple[float, float, float, float, float] | None:
    """The floor, and the excess of wide products, shrink, LoRA chunk and outer, in µs.

    None where a part was not measured.
    """
    ends, outers = ("", " of dx") if backward else ("",), ("outer for dA", "outer for dB")
    wides = [[f"{name}{end}" for name in ("cublas", "gemm", "gemm+chunk")] for end in ends]
    thins = ["shrink", "shrink of dy"][: len(ends)]
    tall = outers if backward else ()
    if any(name not in rows for names in (*wides, thins, tall) for name in names):
        return None

    def us(name: str) -> float:
        return float(rows[name]["median_us"])

    def read(name: str) -> float:
        return 1e6 * float(rows[name]["bytes"]) / copy

    floor = product = chunk = 0.0
    for cublas, gemm, extended in wides:
        # The operations of the chunk, at the rate of cuBLAS.
        more = us(cublas) * (rows[extended]["flops"] / rows[gemm]["flops"] - 1.0)
        floor += us(cublas) + more
        product += us(gemm) - us(cublas)
        chunk += us(extended) - us(gemm) - more
    floor += sum(map(read, (*thins, *tall)))
    shrink = sum(us(name) - read(name) for name in thins)
    return floor, product, shrink, chunk, sum(us(name) - read(name) for name in tall)
