"""The tables of `bench_methods.py`: every method beside LoRA of as many parameters."""

import statistics
from collections.abc import Callable
from pathlib import Path

from lib.markdown import markdown
from lib.size_tables import FIGURES, Cell, against, figures, final_cells, over_tasks, shown

RIVAL = "lora"
Key = tuple[str, int]  # a method, and the rank of LoRA whose size it has


def by_method(results: Path) -> dict[str, dict[Key, list[Cell]]]:
    """Task -> (method, budget) -> its cells on dev, one for each seed."""
    found: dict[str, dict[Key, list[Cell]]] = {}
    for (task, _), cells in final_cells(results, "bench_methods").items():
        found.setdefault(task, {})[cells[0]["method"], cells[0]["budget"]] = cells
    return found


def _budgets(found: dict[str, dict[Key, list[Cell]]]) -> list[int]:
    return sorted({budget for of_task in found.values() for _, budget in of_task})


def _facts(cells: list[Cell]) -> str:
    """What the method says of its bank, the mean over the seeds."""
    names = cells[0].get("facts", {})
    means = {name: statistics.mean(cell["facts"][name] for cell in cells) for name in names}
    return ", ".join(f"{name} {value:.3g}" for name, value in means.items())


def _seconds(cells: list[Cell]) -> float:
    """Processor time of a run."""
    return statistics.mean(cell["seconds"] for cell in cells)


def methods(results: Path) -> str | None:
    """For every task, budget and method: the rate that won, parameters, loss and accuracy, and the
    processor time of a run as a ratio to LoRA's.
    """
    parts = []
    for task, found in by_method(results).items():
        body = []
        for budget in _budgets({task: found}):
            rival = found.get((RIVAL, budget), [])
            for (method, of), cells in found.items():
                if of == budget:
                    row = figures(cells, [] if method == RIVAL else rival)
                    time = f"{_seconds(cells) / _seconds(rival):.1f}" if rival else ""
                    body.append([str(budget), method, *row, time, _facts(cells)])
        last = ("loss against LoRA's, paired", "n", "processor time", "at the end")
        head = ("method", *FIGURES, *last)
        parts.append(markdown((f"{task}, size of LoRA r", *head), body))
    return "\n\n".join(parts) or None


def methods_all(results: Path) -> str | None:
    """For every method and budget: its loss against LoRA's of that size, as the mean over tasks;
    the numbers of seeds and tasks where they are not those of most entries.
    """
    found = by_method(results)
    budgets = _budgets(found)
    rows: dict[str, list[tuple[list[float], int]]] = {}
    for method in dict.fromkeys(name for of_task in found.values() for name, _ in of_task):
        for budget in budgets if method != RIVAL else ():
            each = (
                against(of_task.get((method, budget), []), of_task.get((RIVAL, budget), []))
                for of_task in found.values()
            )
            of_task = [pairs for pairs in each if pairs]
            rows.setdefault(method, []).append((over_tasks(of_task), len(of_task)))
    counts = [(len(means), tasks) for row in rows.values() for means, tasks in row if means]
    if not counts:
        return None
    most = statistics.mode(counts)

    def entry(means: list[float], tasks: int) -> str:
        n = f" (n={len(means)}, tasks: {tasks})" if (len(means), tasks) != most else ""
        return shown(means, 1, " %", "+") + n if means else "–"

    head = f"dev loss against LoRA's, paired (n={most[0]}, tasks: {most[1]})"
    body = [[method, *(entry(*cell) for cell in row)] for method, row in rows.items()]
    return markdown((head, *(f"size of LoRA r={budget}" for budget in budgets)), body)


METHOD_TABLES: dict[str, Callable[[Path], str | None]] = {
    "methods": methods,
    "methods_all": methods_all,
}
