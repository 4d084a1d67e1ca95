"""A JSON file of cells, each measured in a process of its own and written when it is there."""

import argparse
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import environment, workers
from loradrop.files import read_json, write_json

Key = dict[str, Any]


def fill(path: Path, command: list[str], keys: Iterable[Key], patience: float,
         args: argparse.Namespace) -> bool:  # fmt: skip
    """Measures the cells that the file lacks; False where one of them gave no figures.

    `command` starts a worker: it is asked for a key and answers with the figures, or with a
    `fault`. A cell with figures holds for every commit, one with a fault for its own, and with
    `args.fresh` none. Who was lost on the way stands under `lost`.
    """
    facts = environment.facts(args.device, args.commit)
    known = read_json(path)["cells"] if path.exists() else []
    report: dict[str, Any] = {"environment": environment.environment(args.device, facts)}
    report["cells"] = known
    wanted = [key for key in keys if args.fresh or not _holds(key, known, facts["commit"])]
    command = [sys.executable, *command, "--worker", "--device", args.device]
    right = True
    for key, answer in zip(
        wanted, workers.answers(command, wanted, patience, fresh=True), strict=True
    ):
        found = answer.value
        if found is None:
            found = {"fault": "; ".join(filter(None, answer.lost.values()))}
        if answer.lost:
            found["lost"] = answer.lost
        right &= "fault" not in found and not answer.lost
        stamp = {"commit": facts["commit"], "date": datetime.now(UTC).isoformat(timespec="seconds")}
        known[:] = [cell for cell in known if not key.items() <= cell.items()]
        known.append(key | found | stamp)
        write_json(path, report)
        print(*key.values(), found.get("fault", "measured"), *answer.lost.items(), flush=True)
    return right


def _holds(key: Key, cells: list[dict[str, Any]], commit: str) -> bool:
    same = (cell for cell in cells if key.items() <= cell.items())
    return any("fault" not in cell or cell["commit"] == commit for cell in same)
