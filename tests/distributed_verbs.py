"""The verbs in two processes of torchrun that draw other random numbers: FOLDER; what each rank
found is in FOLDER/RANK.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import training_runs as tiny
from models import IDS, llama
from torch.nn.parallel import DistributedDataParallel
from torchrun import leave

import loradrop
from loradrop import LoraDropConfig

CONFIG = LoraDropConfig(r=4, target_modules=["q_proj", "v_proj"])


def apart(model: Any) -> float:
    """The largest difference of what the model trains between the ranks."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    other = flat.clone()
    torch.distributed.broadcast(other, 0)
    return float((flat - other).abs().max())


def adapted() -> Any:
    model = llama()
    loradrop.inject(model, CONFIG)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.lora_bank.parameters():
            parameter.normal_(0, 0.1)
    return model


def train(model: Any, rank: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(3):
        ids = IDS.roll(2 * step + rank, 1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def why_not(verb: Any) -> str:
    try:
        verb()
    except ValueError as error:
        return str(error)
    return ""


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, found = torch.distributed.get_rank(), dict[str, Any]()
    model = adapted()
    outer = DistributedDataParallel(model, find_unused_parameters=True)
    torch.manual_seed(100 + rank)
    train(outer, rank)
    batches = [{"input_ids": IDS}] if rank == 0 else []
    for gram in (False, True):
        found[f"probe {gram}"] = dict(loradrop.probe(outer, batches, gram=gram))
    found["nothing"] = why_not(lambda: loradrop.probe(outer, []))
    scores = loradrop.probe(outer, [{"input_ids": IDS}])
    loradrop.share(outer, loradrop.select(scores, keep=1))
    found["shared"] = apart(model)
    train(outer, rank)
    found["trained"] = apart(model)
    cut = adapted()
    wrapped = DistributedDataParallel(cut)
    ranks = {target.name: 2 for target in cut.lora_bank.targets}
    found["truncate"] = why_not(lambda: loradrop.truncate(wrapped, ranks, metric="weight"))
    wrapped = DistributedDataParallel(cut)
    train(wrapped, rank)
    found["cut"] = apart(cut)
    loradrop.save(cut, Path(folder) / f"cut-{rank}")
    whole = DistributedDataParallel(adapted())
    found["load"] = why_not(lambda: loradrop.load(whole, Path(folder) / f"cut-{rank}"))
    loradrop.export(cut, Path(folder) / "merged", "merged")
    again = {"model": tiny.make_model(), "output_dir": Path(folder) / "alone", "dev": None}
    found["resume"] = why_not(
        lambda: loradrop.fit(
            train=tiny.make_rows(), config=tiny.PLAIN, args=tiny.ARGS, resume=True, **again
        )
    )
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
