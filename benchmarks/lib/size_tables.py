"""The tables of small adapters: those that were cut after training, and those trained small."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.markdown import markdown
from loradrop.files import read_json

# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom.
_T = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13),
    *(2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04),
)
SMALL = "LoRA r=1"  # what spectral LoRA-drop at an eighth is compared with
# The README's table: tasks and arms.
SUMMARY = {
    "stdlib, same modules, query and value": "stdlib, query and value",
    "stdlib, same modules": "stdlib, all linear layers",
    "sst2, query and value": "SST-2, query and value",
}
SUMMARY_ARMS = {  # and their sizes
    "LoRA r=8": "1",
    "LoRA-drop, 1/2": "1/2",
    "spectral, 1/2": "1/2",
    "LoRA r=4": "1/2",
    "spectral, 1/4": "1/4",
    "LoRA r=8, cut to 1/4": "1/4",
    "LoRA r=2": "1/4",
    "LoRA r=8, cut to 1/8": "1/8",
    "spectral, 1/8": "1/8",
    SMALL: "1/8",
    "spectral, 1/16": "1/16",
}
# What ablations are compared with, and what they are called.
DROP, SPECTRAL = "LoRA-drop, 1/2", "spectral, 1/8"
ABLATIONS = {
    "LoRA-drop, 1/2, random layers": "random layers keep their adapters",
    "LoRA-drop, 1/2, least important layers": "the least important layers do",
    "LoRA-drop, 1/2, kept adapters continue": "kept adapters go on, not anew",
    "LoRA-drop, 1/2, no sharing": "the other layers have none",
    "one shared LoRA": "all layers of a kind share one",
}
OF_ANSWERS = ("exact", "same")  # columns: the right number, and the uncut model's
SPECTRAL_ABLATIONS = {
    "spectral, 1/8, by output": "by output",
    "spectral, 1/8, by weight": "by weight",
    "spectral, 1/8, one rank for all": "one rank for all targets",
    "spectral, 1/8, from r": "begun at r = 8, not 16",
    "spectral, 1/8, cut late": "cut after 90 %, not 60 %",
}
DEFAULT = "loss"  # what `loradrop compress` does
RIVAL = "weight"  # whose divergence is the unit of `cut_all`
Cell = dict[str, Any]


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half of its 95 % interval, None for one value."""
    n = len(values)
    if n < 2:
        return values[0], None
    point = _T[n - 2] if n - 2 < len(_T) else 1.96
    return statistics.mean(values), point * statistics.stdev(values) / n**0.5


def shown(values: Sequence[float], digits: int, unit: str = "", sign: str = "") -> str:
    """Mean ± half of the 95 % interval."""
    mean, half = interval(values)
    mean = round(mean, digits) + 0.0  # no minus zero
    text = f"{mean:{sign}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
    return (text + unit).replace("-", "−")


def _cells(results: Path, name: str) -> list[Cell]:
    path = results / "cpu" / f"{name}.json"
    return list(read_json(path)["cells"]) if path.exists() else []


def _distinct(cells: Sequence[Cell], key: str) -> list[Any]:
    return list(dict.fromkeys(cell[key] for cell in cells))


def _points(cell: Cell, uncut: dict[tuple[str, int], Cell]) -> float:
    """By how many points its accuracy is above the uncut model's."""
    whole: float = uncut[cell["task"], cell["seed"]]["accuracy"]
    return 100 * (cell["accuracy"] - whole)


def _rise(cell: Cell, uncut: dict[tuple[str, int], Cell]) -> float:
    """By how many percent of the uncut model's loss its own is higher."""
    whole: float = uncut[cell["task"], cell["seed"]]["loss"]
    return 100 * (cell["loss"] / whole - 1)


def _row(
    cells: list[Cell], budgets: Sequence[float], entry: Callable[[list[Cell]], str]
) -> list[str]:
    """An entry for each budget, a dash where there is no cell."""
    found = [[cell for cell in cells if cell["budget"] == part] for part in budgets]
    return [entry(some) if some else "–" for some in found]


def _by_arm(
    results: Path, tasks: Sequence[str], entry: Callable[[list[Cell], dict[Any, Cell]], str]
) -> tuple[list[str], list[list[str]], int]:
    """The head, a row for each way to cut with `entry` for each budget, and the number of runs."""
    cells = [cell for cell in _cells(results, "bench_cut") if cell["task"] in tasks]
    uncut = {(c["task"], c["seed"]): c for c in cells if c["arm"] == "uncut"}
    cells = [cell for cell in cells if cell["arm"] != "uncut"]
    budgets, body = _distinct(cells, "budget"), []
    for arm in _distinct(cells, "arm"):
        here = [cell for cell in cells if cell["arm"] == arm]
        body.append([arm, *_row(here, budgets, lambda some: entry(some, uncut))])
    return [f"{part:g} left" for part in budgets], body, len(uncut)


def cut(results: Path) -> str | None:
    """For every task: each way to cut, at every budget, against the uncut model."""

    def entry(cells: list[Cell], uncut: dict[Any, Cell]) -> str:
        kl = statistics.mean(cell["kl"] for cell in cells)
        changes = [statistics.mean(of(cell, uncut) for cell in cells) for of in (_points, _rise)]
        points, loss = (round(change, 1) + 0.0 for change in changes)  # no minus zero
        return f"{kl:.4f}; {points:+.1f}; {loss:+.1f} %".replace("-", "−")

    parts = []
    for task in _distinct(_cells(results, "bench_cut"), "task"):
        head, body, n = _by_arm(results, [task], entry)
        parts.append(markdown((f"{task}, n={n}", *head), body))
    return "\n\n".join(parts) or None


def _span(values: Sequence[float], unit: str = "") -> str:
    """Mean, least and most."""
    mean, least, most = (round(f(values), 1) + 0.0 for f in (statistics.mean, min, max))
    return f"{mean:+.1f} ({least:+.1f} to {most:+.1f}){unit}".replace("-", "−")


def _of_most_settings(cells: Sequence[Cell]) -> dict[str, str]:
    """The ways to cut that every setting has, and how they are called. Of five settings or more one
    may be missing, and then their number is said.
    """
    settings: dict[str, set[str]] = {}
    for cell in cells:
        settings.setdefault(cell["arm"], set()).add(cell["task"])
    every = len(set().union(*settings.values()))
    counts = {arm: len(tasks) for arm, tasks in settings.items()}
    least = every - 1 if every >= 5 else every
    names = {arm: arm if n == every else f"{arm} ({n} settings)" for arm, n in counts.items()}
    return {arm: name for arm, name in names.items() if counts[arm] >= least}


def cut_all(results: Path) -> str | None:
    """Over the settings, each the mean of its runs: the divergence as a part of the rival's, and
    what is lost, of the ways to cut that most settings have; below it the mean of the default cut
    to a quarter with its interval. Runs of one setting are alike, so they are not counted as if
    they were settings.
    """
    cells = _cells(results, "bench_cut")
    rival = {(c["task"], c["seed"], c["budget"]): c["kl"] for c in cells if c["arm"] == RIVAL}
    tasks = _distinct(cells, "task")

    def of_settings(
        some: list[Cell],
        value: Callable[[Cell], float],
        mean: Callable[[list[float]], float] = statistics.mean,
    ) -> list[float]:
        of_task = ([value(c) for c in some if c["task"] == task] for task in tasks)
        return [mean(values) for values in of_task if values]

    def entry(some: list[Cell], uncut: dict[Any, Cell]) -> str:
        parts = of_settings(
            some, lambda c: c["kl"] / rival[c["task"], c["seed"], c["budget"]],
            statistics.geometric_mean,
        )  # fmt: skip
        points = _span(of_settings(some, lambda c: _points(c, uncut)))
        loss = _span(of_settings(some, lambda c: _rise(c, uncut)), " %")
        return f"{statistics.geometric_mean(parts):.2f}; {points}; {loss}"

    if not tasks:
        return None
    head, body, n = _by_arm(results, tasks, entry)
    names = _of_most_settings(cells)
    body = [[names[arm], *row] for arm, *row in body if arm in names]
    table = markdown((f"{len(tasks)} settings, {n} runs", *head), body)
    uncut = {(c["task"], c["seed"]): c for c in cells if c["arm"] == "uncut"}
    quarter = [c for c in cells if (c["arm"], c["budget"]) == (DEFAULT, 0.25)]
    if not quarter:
        return table
    points, loss = (
        shown(of_settings(quarter, lambda c, of=of: of(c, uncut)), 1, unit, "+")  # type: ignore[misc]
        for of, unit in ((_points, " points"), (_rise, " %"))
    )
    mean = f'"{DEFAULT}" at a quarter, mean and 95 % interval: {points}, {loss} of loss.'
    return f"{table}\n\n{mean}"


def foretold(results: Path) -> str | None:
    """The divergence that came, as a part of the rise of the loss that was predicted, of the ways
    to cut that most settings have.
    """
    cells = [c for c in _cells(results, "bench_cut") if c.get("predicted")]

    def entry(some: list[Cell]) -> str:
        parts = [cell["kl"] / cell["predicted"] for cell in some]
        return f"{statistics.median(parts):.1f} ({min(parts):.1f} to {max(parts):.1f})"

    budgets, body = _distinct(cells, "budget"), []
    for arm, name in _of_most_settings(cells).items():
        body.append([name, *_row([c for c in cells if c["arm"] == arm], budgets, entry)])
    runs = len({(cell["task"], cell["seed"]) for cell in cells})
    head = (f"n={runs}", *(f"{part:g} left" for part in budgets))
    return markdown(head, body) if body else None


def step_time(results: Path) -> str | None:
    """What a step of training takes with what is left, and what it costs to leave that."""
    cells = [c for c in _cells(results, "bench_cut") if c.get("step") is not None]

    def entry(some: list[Cell]) -> str:
        steps = shown([cell["step"] for cell in some], 2)
        return f"{steps}; {statistics.mean(cell['kl'] for cell in some):.4f}"

    budgets = _distinct(cells, "budget")
    body = []
    for task in _distinct(cells, "task"):
        for arm in _distinct(cells, "arm"):
            here = [c for c in cells if (c["task"], c["arm"]) == (task, arm)]
            if here:
                body.append([task, arm, *_row(here, budgets, entry)])
    return markdown(("task", "", *(f"{part:g} left" for part in budgets)), body) if body else None


def answers(results: Path) -> str | None:
    """Of the models that wrote answers: how many were right, and had the uncut model's number."""
    cells = [c for c in _cells(results, "bench_cut") if "answers" in c]

    def entry(some: list[Cell]) -> str:
        return "; ".join(f"{100 * statistics.mean(c[of] for c in some):.0f}" for of in OF_ANSWERS)

    parts = []
    for task in _distinct(cells, "task"):
        here = [cell for cell in cells if cell["task"] == task]
        budgets, body = _distinct(here, "budget"), []
        for arm in _distinct(here, "arm"):
            body.append([arm, *_row([c for c in here if c["arm"] == arm], budgets, entry)])
        counts = [c["answers"] for c in here if c["arm"] == "uncut"]
        title = f"{task}, {sum(counts)} answers"
        parts.append(markdown((title, *(f"{part:g} left" for part in budgets)), body))
    return "\n\n".join(parts) or None


def final_cells(results: Path, name: str = "bench_sizes") -> dict[tuple[str, str], list[Cell]]:
    """(task, arm) -> its cells on dev, one for each seed."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in _cells(results, name):
        if cell.get("of") == "dev":
            found.setdefault((cell["task"], cell["arm"]), []).append(cell)
    return found


def against(cells: Sequence[Cell], rival: Sequence[Cell]) -> dict[int, float]:
    """By how many percent its loss on dev is above the rival's, for each seed that both have."""
    losses = {cell["seed"]: cell["loss"] for cell in rival}
    both = (cell for cell in cells if cell["seed"] in losses)
    return {c["seed"]: 100 * (c["loss"] / losses[c["seed"]] - 1) for c in both}


def over_tasks(of_task: Sequence[dict[int, float]]) -> list[float]:
    """The mean over the tasks, for each seed that all of them have: what two tasks make of one seed
    is not two draws, for they begin with the same adapters.
    """
    seeds = sorted(set.intersection(*map(set, of_task))) if of_task else []
    return [statistics.mean(pairs[seed] for pairs in of_task) for seed in seeds]


FIGURES = ("parameters", "learning rate", "held-out loss", "dev loss", "dev accuracy, %")


def figures(cells: Sequence[Cell], rival: Sequence[Cell]) -> list[str]:
    """One arm at the rate that won: `FIGURES`, its loss against the rival's, and n."""
    size = statistics.mean(cell["parameters"] for cell in cells)
    head = cells[0].get("head_rate")
    row = [f"{size:,.0f}", f"{cells[0]['rate']:g}" + (f"; head {head:g}" if head else "")]
    row += [shown([c[which] for c in cells], 3) for which in ("held_out_loss", "loss")]
    row += [shown([100 * c["accuracy"] for c in cells], 1)]
    pairs = [*against(cells, rival).values()]
    return [*row, shown(pairs, 1, " %", "+") if pairs else "", str(len(cells))]


def sizes(results: Path) -> str | None:
    """For every arm of the tasks that have LoRA r = 1: the rates that won, parameters, loss and
    accuracy on dev.
    """
    final = final_cells(results)
    parts = []
    for task in dict.fromkeys(task for task, arm in final if arm == SMALL):
        arms = {arm: cells for (of, arm), cells in final.items() if of == task}
        body = [
            [arm, *figures(cells, [] if arm == SMALL else arms[SMALL])]
            for arm, cells in arms.items()
        ]
        parts.append(markdown((task, *FIGURES, f"loss against {SMALL}, paired", "n"), body))
    return "\n\n".join(parts) or None


def sizes_summary(results: Path) -> str | None:
    """The README's: the size and the loss on dev of a few arms; n where it is not its task's."""
    final = final_cells(results)
    n = {task: len(final[task, SMALL]) for task in SUMMARY if (task, SMALL) in final}

    def entry(task: str, arm: str) -> str:
        losses = [cell["loss"] for cell in final.get((task, arm), [])]
        other = f" (n={len(losses)})" if len(losses) != n[task] else ""
        return shown(losses, 3) + other if losses else "–"

    body = [[arm, size, *(entry(task, arm) for task in n)] for arm, size in SUMMARY_ARMS.items()]
    head = ("dev loss", "size", *(f"{SUMMARY[task]} (n={of})" for task, of in n.items()))
    return markdown(head, body) if n else None


def ablations(results: Path) -> str | None:
    """What a part of LoRA-drop is worth."""
    return _ablations(results, DROP, ABLATIONS)


def spectral_ablations(results: Path) -> str | None:
    """What a part of spectral LoRA-drop is worth."""
    return _ablations(results, SPECTRAL, SPECTRAL_ABLATIONS)


def _ablations(results: Path, whole: str, without: Mapping[str, str]) -> str | None:
    """The loss without each part, against that of the whole, paired; on each task, and as the mean
    over the tasks.
    """
    final = final_cells(results)
    tasks = [task for task in SUMMARY if any((task, arm) in final for arm in without)]
    body = []
    for arm, name in without.items():
        of_task = [against(final.get((t, arm), []), final.get((t, whole), [])) for t in tasks]
        together = over_tasks([pairs for pairs in of_task if pairs])
        if together:
            cells = next(final[t, arm] for t in tasks if (t, arm) in final)
            every = [*([*pairs.values()] for pairs in of_task), together]
            row = [shown(values, 1, " %", "+") if values else "–" for values in every]
            size = statistics.mean(cell["parameters"] for cell in cells)
            body.append([name, f"{size:,.0f}", *row, str(len(together))])
    titles = (SUMMARY[task] for task in tasks)
    head = (f"dev loss against {whole}, paired", "parameters", *titles, "together", "n")
    return markdown(head, body) if body else None


SIZE_TABLES: dict[str, Callable[[Path], str | None]] = {
    "cut": cut,
    "cut_all": cut_all,
    "foretold": foretold,
    "step_time": step_time,
    "answers": answers,
    "sizes": sizes,
    "sizes_summary": sizes_summary,
    "ablations": ablations,
    "spectral_ablations": spectral_ablations,
}
