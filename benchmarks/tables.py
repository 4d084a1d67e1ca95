"""The README's tables, from the committed result files.

    python benchmarks/tables.py            writes each between its markers in the README
    python benchmarks/tables.py --check    writes nothing; ends with 1 and a diff where they differ

The markers of a table are <!-- table:NAME --> and <!-- /table:NAME -->.
"""

import argparse
import difflib
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_layers import lora_linear_gpu
from gpu_tables import probe_gpu, train_step_gpu
from markup import MISSING, SHORT, markdown, shape, unique
from timing import Ratios, goal, paired, read_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NO_RUNS = "not shown"
BASELINE = "LoRA r=8"
_BLOCK = re.compile(r"(<!-- table:(\w+) -->\n)(.*?)(<!-- /table:\2 -->)", re.S)


def _goal_lines(cells: Sequence[Ratios]) -> list[str]:
    lines = []
    for r, direction in sorted({(c.cell.r, c.cell.direction) for c in cells}):
        figures = goal(cells, r, direction)
        if figures is None:
            continue
        aims = (
            (" (goal: at most 0.55)", " (goal: at most 3 %)")
            if (r, direction) == (8, "forward")
            else ("", "")
        )
        lines.append(
            f"- r = {r}, {direction.replace('_', ' + ')}, overhead (ratio − 1) summed over "
            f"{figures.cells} rows: PEFT {figures.peft:.2f}, with a hook {figures.hook:.2f}, "
            f"loradrop {figures.loradrop:.2f}, with the norm {figures.loradrop_norm:.2f}. That is "
            f"{figures.of_peft:.3f} of PEFT's{aims[0]}; the norm costs {100 * figures.norm:.1f} % "
            f"of the linear layer on average{aims[1]}."
        )
    return lines


def lora_linear_cpu(results: Path) -> str | None:
    """The forward at r = 8 on a CPU, over the frozen product; below it, overheads summed."""
    rows = read_rows(results / "cpu" / "bench_lora_linear.csv")
    cells = [cell for cell in paired(rows) if cell.cell.dropout == 0.0]
    shown = [c for c in cells if (c.cell.r, c.cell.direction) == (8, "forward")]
    if not shown:
        return None
    names = ("peft", "peft_hook", "loradrop", "loradrop+norm")
    table = markdown(
        ("M×K→N", "dtype", "linear, ms", "PEFT", "PEFT + norm hook", "loradrop", "loradrop + norm"),
        (
            (
                shape(c.cell),
                SHORT[c.cell.dtype],
                f"{statistics.median(c.frozen_us) / 1e3:.1f}",
                *(f"{c.median(name):.2f}" if name in c.ratios else MISSING for name in names),
            )
            for c in shown
        ),
    )
    processes = min(len(c.frozen_us) for c in shown)
    note = (
        f"Forward at r = 8 over `F.linear` alone: medians of {processes} processes, one thread, "
        f"{unique(rows, 'device')}, torch {unique(rows, 'torch')}, "
        f"commit {unique(rows, 'commit')}."
    )
    return "\n".join((note, "", table, "", *_goal_lines(cells)))


def spread(values: Sequence[float]) -> str:
    """mean ± standard deviation (n), of values that are parts of one, in percent."""
    mean = 100 * statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.1f} (n=1)"
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f} (n={len(values)})"


def difference(arm: dict[int, float], base: dict[int, float]) -> str:
    """Mean of arm − base over the seeds both have ± its standard error, in percentage points."""
    pairs = [arm[seed] - base[seed] for seed in sorted(arm.keys() & base.keys())]
    if not pairs:
        return NO_RUNS
    mean = 100 * statistics.mean(pairs)
    if len(pairs) == 1:
        return f"{mean:+.1f} (n=1)".replace("-", "−")
    error = 100 * statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{mean:+.1f} ± {error:.1f} (n={len(pairs)})".replace("-", "−")


def _parameters(runs: Sequence[dict[str, Any]]) -> str:
    counts = sorted({run["parameters"] for run in runs})
    return "–".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))


def quality(results: Path) -> str | None:
    """For every task and arm: size, metric over the seeds, and the paired difference to LoRA."""
    path = results / "cpu" / "bench_quality.json"
    if not path.exists():
        return None
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        runs.setdefault((cell["task"], cell["arm"]), []).append(cell)
    values = {key: {run["seed"]: run["value"] for run in of_key} for key, of_key in runs.items()}
    arms = dict.fromkeys(cell["arm"] for cell in cells)
    parts = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        metric = next(cell["metric"] for cell in cells if cell["task"] == task)
        head = (
            f"{task}",
            "adapter parameters",
            f"dev {metric}, %: mean ± sd (n)",
            f"paired difference to {BASELINE} ± its standard error",
        )
        body = []
        for arm in arms:
            of_arm, found = values.get((task, arm)), runs.get((task, arm))
            if not of_arm or not found:
                body.append((arm, NO_RUNS, NO_RUNS, NO_RUNS))
                continue
            base = values.get((task, BASELINE), {})
            against = "" if arm == BASELINE else difference(of_arm, base)
            body.append((arm, _parameters(found), spread(list(of_arm.values())), against))
        parts += [markdown(head, body), ""]
    return "\n".join(parts).rstrip() or None


TABLES: dict[str, Callable[[Path], str | None]] = {
    "lora_linear_cpu": lora_linear_cpu,
    "lora_linear_gpu": lora_linear_gpu,
    "probe_gpu": probe_gpu,
    "train_step_gpu": train_step_gpu,
    "quality": quality,
}


def fill(text: str, results: Path) -> str:
    """The text with every table made anew. Raises ValueError for a marker that names no table."""
    marked = re.findall(r"<!-- (/?)table:(\w+) -->", text)
    for name in {name for _, name in marked}:
        if name not in TABLES:
            raise ValueError(f"table:{name} is unknown; there are {', '.join(TABLES)}")
        if [slash for slash, of in marked if of == name] != ["", "/"]:
            raise ValueError(f"table:{name} needs its marker once, then its end marker, once")

    def table(match: re.Match[str]) -> str:
        made = TABLES[match[2]](results) or MISSING
        return f"{match[1]}{made}\n{match[4]}"

    return _BLOCK.sub(table, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Ends with 1 where `--check` finds a difference."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--check", action="store_true", help="write nothing, show what differs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    text = args.readme.read_text(encoding="utf-8")
    made = fill(text, args.results)
    if made == text:
        return 0
    if not args.check:
        args.readme.write_text(made, encoding="utf-8")
        return 0
    names = f"{args.readme.name} as it is", f"{args.readme.name} from the result files"
    lines = difflib.unified_diff(text.splitlines(), made.splitlines(), *names, lineterm="")
    print(*lines, "Write them: python benchmarks/tables.py", sep="\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
