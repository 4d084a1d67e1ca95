"""The roofline of a GPU, from the committed result files: docs/roofline-DEVICE.svg.

    python benchmarks/roofline.py

A kernel is a point: its operations over its fewest bytes, and what it computes in a second. The
roof is what the same GPU copied and multiplied at, measured in the same run. Without results of a
GPU it says so and draws nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from gpu_layers import devices

from loradrop.files import read_json, replacing

DOCS = machine.ROOT / "docs"
_MARKERS = {
    "cublas": "s",
    "gemm": "o",
    "gemm+chunk": "^",
    "shrink": "D",
    "outer": "v",
    "addmm_": "P",
}


def kind(variant: str) -> str:
    """The kernel of a part, whichever pass it belongs to."""
    return variant.split(" ")[0]


def points(report: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """By kernel: (FLOP per byte, FLOP/s) of everything that was measured."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in report["rows"]:
        if "median_us" in row:
            at = row["flops"] / row["bytes"], row["flops"] / row["median_us"] * 1e6
            found.setdefault(kind(row["variant"]), []).append(at)
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    """The picture as SVG, the same bytes for the same results."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "loradrop"
    from matplotlib import pyplot

    ceilings, found = report["ceilings"], points(report)
    copy, top = ceilings["copy_bytes_per_s"], ceilings["bf16_flops_per_s"]
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    intensities = [x for at in found.values() for x, _ in at]
    low, high = min(intensities) / 2, max(*intensities, 2 * top / copy) * 2
    roof = [low, top / copy, high]
    axes.plot(roof, [min(top, copy * x) / 1e12 for x in roof], color="black", linewidth=1)
    for name, at in found.items():
        xs, ys = [x for x, _ in at], [y / 1e12 for _, y in at]
        axes.plot(xs, ys, _MARKERS.get(name, "x"), label=name, markersize=5, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.set_title(
        f"{report['environment']['device']}: {copy / 1e12:.1f} TB/s, {top / 1e12:.0f} TFLOP/s"
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    with replacing(path) as fresh:
        figure.savefig(fresh, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws one picture for each GPU that there are results of."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args(argv)
    found = devices(args.results, "bench_parts.json")
    for path in found:
        picture = args.docs / f"roofline-{path.parent.name}.svg"
        draw(read_json(path), picture)
        print(picture.name)
    if not found:
        print("not yet measured: no bench_parts.json of a GPU among the results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
