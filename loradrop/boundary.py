"""What the first run of `fit` leaves to the second one, and its files.

A resume goes on from there once `start/`, which is written last, holds the adapters.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loradrop.env import is_first_rank
from loradrop.files import read_json, replacing, write_json
from loradrop.loading import fill
from loradrop.native import read, save
from loradrop.optimizers import Known

ADAPTERS, RECORD, KNOWN = "start", "warmup.json", "optimizer.pt"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Boundary:
    """Beside the model: steps and seconds of the first run, what it logged, and what its optimiser
    knew, by the parameter's name, where the second run goes on with that.
    """

    steps: int = 0
    seconds: float = 0.0
    history: Sequence[Mapping[str, Any]] = ()
    known: Mapping[str, Known] = field(default_factory=dict)

    def write(self, model: nn.Module, folder: Path) -> None:
        """This, and the model's adapters; every rank calls it."""
        if is_first_rank():
            record = {"steps": self.steps, "seconds": self.seconds, "history": [*self.history]}
            write_json(folder / RECORD, record)
            with replacing(folder / KNOWN) as draft:
                torch.save(dict(self.known), draft)
        save(model, folder / ADAPTERS)


def taken(model: nn.Module, folder: Path) -> Boundary | None:
    """What `write` left, its adapters in the model; None where that is not there or not whole."""
    try:
        adapters = read(folder / ADAPTERS)
        record = read_json(folder / RECORD)
        known = torch.load(folder / KNOWN, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except ValueError as error:
        _log.warning("%s. Going on from the warm-up's last checkpoint", error)
        return None
    fill(model, adapters)
    return Boundary(**record, known=known)
