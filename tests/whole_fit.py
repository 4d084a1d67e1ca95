"""Two ranks train a model of which FSDP2 shards the base alone: FOLDER. Run by torchrun."""

import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import training_runs as tiny
from sharded_fit import batch, shard
from torch import distributed, nn
from torchrun import leave

import loradrop
from loradrop.ranks import is_sharded

Micro = list[dict[str, torch.Tensor]]
HEAD = replace(tiny.PLAIN, modules_to_save=["classifier"])


def made(dtype: torch.dtype = torch.float32) -> Any:
    """The model, whose adapters are float32 and begin with the numbers of this rank."""
    model = tiny.make_model().to(dtype).eval()
    torch.manual_seed(int(os.environ["RANK"]))
    loradrop.inject(model, HEAD)
    return model


def whole(model: Any) -> Any:
    """The model, sharded but for what it trains."""
    return shard(model, ignored_params=loradrop.keep_whole(model))


def parts(step: int, first: int, last: int) -> Micro:
    """Quarters of the rows of a step."""
    quarters = zip(*(value.chunk(4) for value in batch(step).values()), strict=True)
    return [dict(zip(batch(step), values, strict=True)) for values in quarters][first:last]


def train(model: Any, micro: Callable[[int], Micro]) -> list[float]:
    """Three steps over micro-batches, with clipped gradients; their norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, norms = torch.optim.AdamW(trained, lr=1e-2), []
    for step in range(3):
        given = micro(step)
        for part in given:
            (model(**part).loss / len(given)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def run(model: Any, micro: Callable[[int], Micro]) -> dict[str, Any]:
    """The run shares in the middle, by a draw that differs from rank to rank."""
    norms = train(model, micro)
    torch.manual_seed(10 + int(os.environ["RANK"]))
    loradrop.share(model, [model.lora_bank.targets[0].name])
    norms += train(model, micro)
    trained = [p for p in model.parameters() if p.requires_grad]
    return {"norms": norms, "trained": [p.detach().double().flatten().tolist() for p in trained]}


class Sometimes(nn.Module):
    """Two layers, of which rank 1 calls the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(x) if distributed.get_rank() == 0 else x


def unequal() -> dict[str, list[Any]]:
    """The gradients of each B where a layer is called on one rank, and one on none: of this rank,
    and where they are averaged.
    """
    torch.manual_seed(0)
    model = Sometimes()
    loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules="all-linear"))
    found, x = {}, torch.arange(8.0).view(2, 4)
    for name in ("own", "averaged"):
        if name == "averaged":
            loradrop.keep_whole(model)
        model.zero_grad()
        model(x).sum().backward()
        found[name] = [None if B.grad is None else B.grad.tolist() for B in model.lora_bank.B]
    return found


def main(folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()

    def halves(step: int) -> Micro:
        return parts(step, 2 * rank, 2 * rank + 2)

    found: dict[str, Any] = {"sharded": run(whole(made()), halves)}
    distributed.barrier()
    os.environ["RANK"] = "0"  # what one process does with all rows
    found["alone"] = run(made(), lambda step: parts(step, 0, 4))
    os.environ["RANK"] = str(rank)
    half = whole(made(torch.bfloat16))
    found["half"] = run(half, halves)
    bank = half.lora_bank
    unsharded = made()
    loradrop.keep_whole(unsharded)
    found["changed"] = [
        m.lora_bank.changed is not None for m in (unsharded, copy.deepcopy(unsharded))
    ]
    found["dtypes"] = sorted({str(p.dtype) for p in bank.parameters()})
    found["in parts"] = [any(map(is_sharded, m.parameters())) for m in (half, bank)]
    loradrop.save(half, f"{folder}/native")
    distributed.barrier()
    again = tiny.make_model().to(torch.bfloat16).eval()
    loradrop.inject(again, HEAD)
    loradrop.load(again, f"{folder}/native")
    train(half, halves)
    loradrop.load(half, f"{folder}/native")
    with torch.no_grad():
        found["logits"] = [m(**batch(0)).logits.float().tolist() for m in (half, again)]
    found["unequal"] = unequal()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
