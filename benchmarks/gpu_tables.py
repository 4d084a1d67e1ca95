"""The tables of a GPU beyond single layers: what the norm costs, and what a training step takes."""

import statistics
from pathlib import Path
from typing import Any

from gpu_layers import SHOWN_RANK, devices
from markup import MISSING, SHORT, about, direction, markdown, shape
from timing import Ratios, paired, read_rows

from loradrop.files import read_json
from loradrop.op.costs import SERVING

_RIVAL = "peft_bf16"


def norm_cost(cell: Ratios, name: str) -> float | None:
    """With the norm − without, as a part of the layer without; the median over processes."""
    on, off = cell.ratios.get(f"{name}+norm"), cell.ratios.get(name)
    if on is None or off is None:
        return None
    return statistics.median(a / b - 1.0 for a, b in zip(on, off, strict=True))


def _percent(part: float | None) -> str:
    return MISSING if part is None else f"{100 * part:+.1f} %".replace("-", "−")


def probe_gpu(results: Path) -> str | None:
    """What the norm costs each backend, and forward hooks PEFT, in percent of the layer."""
    parts = []
    for path in devices(results, "bench_probe.csv"):
        rows = read_rows(path)
        cells = paired(rows)
        shown = [c for c in cells if c.cell.r == SHOWN_RANK] or cells
        if not shown:
            continue
        ours = ["loradrop", *(f"loradrop_{name}" for name in SERVING)]
        ours = [name for name in ours if any(f"{name}+norm" in c.ratios for c in cells)]
        head = ("M×K→N", "dtype", "direction", *ours, "PEFT, hook", "PEFT, hook on lora_B")
        body = []
        for c in shown:
            hooks = [
                c.median(hook) / c.median("peft") - 1.0 if {hook, "peft"} <= set(c.ratios) else None
                for hook in ("peft_hook", "peft_hook_b")
            ]
            costs = [*(norm_cost(c, name) for name in ours), *hooks]
            sizes = (shape(c.cell), SHORT[c.cell.dtype], direction(c.cell))
            body.append((*sizes, *map(_percent, costs)))
        note = f"The squared norm on against off, of the layer at r = {shown[0].cell.r}"
        parts += [f"{note}; {about(rows)}:", "", markdown(head, body), ""]
    return "\n".join(parts).rstrip() or None


def _step(cell: dict[str, Any] | None, rival: dict[str, Any] | None) -> tuple[str, str]:
    """Time, with its ratio to the rival's, and peak memory."""
    if cell is None:
        return MISSING, MISSING
    if "fault" in cell:
        return str(cell["fault"]), ""
    time = f"{cell['median_ms']:.0f}"
    if rival is not None and "median_ms" in rival:
        time += f" ({rival['median_ms'] / cell['median_ms']:.2f}x)"
    peak = cell["peak_bytes"]
    return time, MISSING if peak is None else f"{peak / 2**30:.1f}"


def train_step_gpu(results: Path) -> str | None:
    """Step time, in parentheses PEFT's over it, and peak memory, for each device but the CPU."""
    parts = []
    for path in devices(results, "bench_train_step.json"):
        report = read_json(path)
        cells = report["cells"]
        if not cells:
            continue
        found = {(c["size"], c["checkpointing"], c["arm"]): c for c in cells}
        arms = list(dict.fromkeys(c["arm"] for c in cells))
        head = ["model", "checkpointing"]
        for arm in arms:
            head += [f"{arm}, ms", "GiB"]
        body = []
        for size, kept in dict.fromkeys((c["size"], c["checkpointing"]) for c in cells):
            rival, line = found.get((size, kept, _RIVAL)), [size, "on" if kept else "off"]
            for arm in arms:
                of_arm = found.get((size, kept, arm))
                line += _step(of_arm, None if arm == _RIVAL else rival)
            body.append(line)
        env = report["environment"]
        tokens = ", ".join(dict.fromkeys(str(c["tokens"]) for c in cells if "tokens" in c))
        note = f"{env['device']}, torch {env['torch']}, commit {env['commit']}; {tokens} tokens a "
        note += f"step; in parentheses the time of {_RIVAL} over it:"
        parts += [note, "", markdown(head, body), ""]
    return "\n".join(parts).rstrip() or None
