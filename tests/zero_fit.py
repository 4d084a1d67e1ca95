"""Two ranks of DeepSpeed train a model that shares, in ZeRO-1 and ZeRO-2, each with half of the
batch: FOLDER. Run by torchrun.
"""

import json
import os
import sys
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.comm.torch
import torch
from sharded_fit import batch, made, train
from torch import distributed
from torchrun import leave

import loradrop


def zero(stage: int) -> tuple[Any, Any]:
    """The engine and its model, after the steps that `sharded_fit.train` makes."""
    model = made(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    options = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
    rank = distributed.get_rank()
    mine = {key: rows[rank::2] for key, rows in batch().items()}
    for _ in range(3):
        engine.backward(engine(**mine).loss)
        engine.step()
    return engine, model


def main(folder: str) -> None:
    # Its shared-memory operations would be compiled first; gloo does without.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    alone = made(True)
    train(alone)
    for stage in (1, 2):
        engine, model = zero(stage)
        loradrop.save(model, f"{folder}/zero{stage}")
        distributed.barrier()
        again = made(False)
        loradrop.load(again, f"{folder}/zero{stage}")
        pairs = [zip(m.lora_bank.parameters(), alone.lora_bank.parameters(), strict=True)
                 for m in (model, again)]  # fmt: skip
        off = [max(float((a - b).detach().abs().max()) for a, b in found) for found in pairs]
        facts = {"off": off, "stage": engine.zero_optimization_stage()}
        with open(f"{folder}/{stage}.{distributed.get_rank()}.json", "w") as file:
            json.dump(facts, file)


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
