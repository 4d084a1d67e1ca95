"""The study of `bench_sizes.py` and `bench_methods.py`: arms trained each at its own learning rate.

The rate is searched on one grid, by the loss on a part of train that no run trains on. At the rate
that won, every seed trains once, and dev is looked at once, at the end. A new head has a rate of
its own, one for all arms of a task (`tasks.SETTINGS`); `OF_HEAD` searches it, beside LoRA
of rank 8 at a fixed rate.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lib.tasks import SETTINGS, Prepared, Tasks, labels_of, predictions, quality, write_cells
from loradrop.config import LoRAConfig, TrainConfig
from loradrop.files import read_json
from loradrop.injection import plan_of
from loradrop.methods import LoRA, LoRADrop, Method
from loradrop.pairs import LoRABank
from loradrop.scores import Assignment
from loradrop.training.fit import fit

RATES = tuple(1e-3 * 2**k for k in range(-4, 11))
ALPHA = 0.125  # LoRA's, at every rank: smaller ones came out better in bench_sizes.py
FIRST_RATE, HEAD_FIRST, SEARCH_SEED = 32e-3, 128e-3, 100
Cell = dict[str, Any]
After = Callable[[str, str, Prepared, Callable[[], Cell]], Iterator[tuple[str, Cell]]]


class Arm(NamedTuple):
    """One way to train.

    rank, method, s   of its configuration; s is α over that rank
    about   what its cells say of it beside that
    first   the rate where its search begins
    like    the arm whose rate it takes without a search of its own
    own     whether the head has a rate of its own; the adapters' if not
    of_head whether the rate that is searched is the head's; the adapters have `FIRST_RATE`
    exclude targets without adapters, as `LoRAConfig.exclude_modules`
    """

    rank: int
    method: Method
    about: Mapping[str, Any] = {}
    s: float = 2.0
    first: float = FIRST_RATE
    like: str | None = None
    own: bool = True
    of_head: bool = False
    exclude: str | None = None


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """No adapter at all: what the head learns from frozen features."""

    name: ClassVar[str] = "head_only"

    def bank(self, *given: Any) -> LoRABank:
        bank = super().bank(*given)
        bank.assign(Assignment(bank.targets, (None,) * len(bank.targets)), [])
        return bank


OF_HEAD = Arm(8, LoRA(), s=ALPHA / 8, first=HEAD_FIRST, of_head=True)
# The rate of a head that learns alone is that of its "adapters".
ALONE = Arm(8, HeadOnly(), s=ALPHA / 8, first=HEAD_FIRST, own=False)


def judged(given: Prepared, search: bool) -> Cell:
    """The loss on the rows held out of train; unless a rate is searched, dev beside it."""
    model, held_out = given.model, given.batches(given.choice)
    found = quality(predictions(model, held_out), labels_of(held_out))
    size = model.lora_bank.trainable
    if search:
        return {"of": "held out", "n": len(given.choice), "parameters": size, **found}
    dev = given.batches(given.dev)
    facts = {"n": len(given.dev), "parameters": size, "held_out_loss": found["loss"]}
    return {"of": "dev", **facts, **quality(predictions(model, dev), labels_of(dev))}


class Study:
    """The cells of one result file.

    minutes    after which no run starts
    settings   what the file says beside the settings of its tasks
    after      other arms and their cells, from a model that was trained: (task, arm, what it was
               trained with, a function that judges it as it is now)

    Raises ValueError where the file has cells of an arm with another s.
    """

    def __init__(
        self,
        tasks: Tasks,
        path: Path,
        minutes: float,
        arms: Mapping[str, Arm],
        settings: Mapping[str, Any],
        after: After | None = None,
    ) -> None:
        self.tasks, self.path, self.arms = tasks, path, arms
        self.after = after
        self.settings = dict(settings) | {"rates": RATES, "search_seed": SEARCH_SEED}
        self.cells: list[Cell] = read_json(path)["cells"] if path.exists() else []
        for cell in self.cells:
            arm = self.arms.get(cell["arm"])
            if arm is not None and cell.get("s", arm.s) != arm.s:
                raise ValueError(
                    f"{path} has cells of {cell['arm']!r} with s={cell['s']}, which is s={arm.s} "
                    "now: rename them in the file, or take them out"
                )
            if arm is not None and "head_rate" in cell:
                _, rate = self._rates(cell["task"], arm, cell["rate"])
                if cell["head_rate"] != rate:
                    raise ValueError(
                        f"{path} has cells of {cell['arm']!r} on {cell['task']!r} with a head rate "
                        f"of {cell['head_rate']}, which is {rate} now: take them out"
                    )
        self._deadline = time.monotonic() + 60 * minutes

    def run(self, chosen: Sequence[tuple[str, str]], seeds: int) -> None:
        """The rate of each (task, arm), and then every seed at it, all arms for each seed."""
        rates = {key: self.search(*key) for key in chosen}
        for seed in range(seeds):
            for key in chosen:
                if (rate := rates[key]) is not None:
                    self.cell(*key, rate, seed)

    def cell(self, task: str, arm: str, rate: float, seed: int) -> Cell | None:
        """The cell, measured now if it is new; None where the time is over."""
        key = {"task": task, "arm": arm, "rate": rate, "seed": seed}
        for cell in self.cells:
            if key.items() <= cell.items():
                return cell
        if time.monotonic() > self._deadline:
            return None
        self.cells += [key | {"arm": of} | found for of, found in self._run(task, arm, rate, seed)]
        write_cells(self.path, self.cells, self.settings)
        print(json.dumps(self.cells[-1]), flush=True)
        return self.cell(task, arm, rate, seed)

    @staticmethod
    def _rates(task: str, arm: Arm, rate: float) -> tuple[float, float | None]:
        """Of the adapters, and of the head where it has its own."""
        if arm.of_head:
            return FIRST_RATE, rate
        return rate, SETTINGS[task].head_rate if arm.own and task in SETTINGS else None

    def _run(self, name: str, arm: str, rate: float, seed: int) -> Iterator[tuple[str, Cell]]:
        """The arm and its cell, and those that come `after` it."""
        setting, (rank, method, about, s, *_) = SETTINGS[name], self.arms[arm]
        adapters, head = self._rates(name, self.arms[arm], rate)
        if isinstance(method, LoRADrop) and method.selection == "random":
            method = replace(method, selection_seed=seed)
        train = TrainConfig(
            steps=setting.steps, batch_size=setting.batch_size, learning_rate=adapters, seed=seed,
            save_every=10**6, head_learning_rate=head,
        )  # fmt: skip
        given = self.tasks.prepare(name, train)
        lora = LoRAConfig(
            r=rank, lora_alpha=s * rank, target_modules=setting.target_modules,
            exclude_modules=self.arms[arm].exclude, modules_to_save=given.missing, method=method,
        )  # fmt: skip
        search = seed == SEARCH_SEED
        started = time.process_time()
        try:
            fit(given.model, given.train, None, lora, args=train, collate=given.collate)
        except ValueError as error:  # a rate at which the loss is not finite any more
            if "finite" not in str(error):
                raise
            yield arm, {**about, "s": s, "head_rate": head, "loss": None}
            return
        seconds = round(time.process_time() - started, 1)
        found = {"head_rate": head, "seconds": seconds, "facts": plan_of(given.model).facts}
        yield arm, {**about, "s": s, **found, **judged(given, search)}
        if self.after is not None and not search:
            for of, cell in self.after(name, arm, given, lambda: judged(given, search)):
                yield of, {"s": s, "head_rate": head, **cell}

    def search(self, task: str, arm: str) -> float | None:
        """The rate of the least loss on the rows held out of train: down from the first on either
        side, as far as it falls. None where the time is over.
        """
        if (other := self.arms[arm].like) is not None:
            return self.search(task, other)
        losses: dict[int, float] = {}

        def loss(k: int) -> float | None:
            if not 0 <= k < len(RATES):
                return math.inf
            if k not in losses:
                cell = self.cell(task, arm, RATES[k], SEARCH_SEED)
                if cell is None:
                    return None
                losses[k] = math.inf if cell["loss"] is None else cell["loss"]
            return losses[k]

        best = RATES.index(self.arms[arm].first)
        for step in (-1, 1):
            while True:
                here, there = loss(best), loss(best + step)
                if here is None or there is None:
                    return None
                if there >= here:
                    break
                best += step
        return RATES[best]
