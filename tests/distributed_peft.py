"""A PeftModel of a LoraDropConfig in torchrun: FOLDER BATCH. A Trainer with the callback; with two
ranks also FSDP2, against a model that is not sharded.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import training_runs as tiny
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

import loradrop
from loradrop.integrations.peft import LoraDropConfig
from loradrop.ranks import is_sharded, whole

OPTIONS = tiny.LORA | {"lora_dropout": 0.0, "keep": 1, "probe_steps": 4}


def made(**options: Any) -> Any:
    model = tiny.make_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # each rank would draw its own
    torch.manual_seed(0)
    return get_peft_model(model, LoraDropConfig(**OPTIONS, **options))


def by_trainer(folder: str | Path, batch: int) -> dict[str, Any]:
    args = TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=batch,
        report_to="none", learning_rate=1e-2, save_strategy="no", use_cpu=True, disable_tqdm=True,
        average_tokens_across_devices=False,  # BERT takes no num_items_in_batch
    )  # fmt: skip
    model, callbacks = made(), [loradrop.LoraDropCallback()]
    Trainer(model, args, train_dataset=tiny.make_rows(48), callbacks=callbacks).train()
    bank = model.lora_bank
    adapters = [p.flatten().tolist() for p in bank.parameters()]
    return {"kept": bank.assignment.kept, "ddp": adapters}


def sharded(folder: str) -> dict[str, Any]:
    rows = tiny.make_rows(8)
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    names = [target.name for target in made().lora_bank.targets]
    models = [made(plan=names[:1]).eval() for _ in range(2)]
    for layer in models[1].get_base_model().bert.encoder.layer:
        fully_shard(layer)
    fully_shard(models[1])
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    alone, model = models
    state = {k: whole(v) for k, v in model.state_dict().items()}
    if distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    distributed.barrier()
    again = PeftModel.from_pretrained(tiny.make_model(), folder)
    own = get_peft_model_state_dict(alone)
    found = get_peft_model_state_dict(again)
    written = get_peft_model_state_dict(model, state_dict=state)
    assert own.keys() == found.keys() == written.keys()
    gap, reloaded = (
        max(float((own[k] - other[k]).abs().max()) for k in own) for other in (written, found)
    )
    moved = min(float(pair.B.abs().max()) for pair in alone.lora_bank.pairs)
    every = all(map(is_sharded, model.lora_bank.parameters()))
    return {"fsdp": gap, "reloaded": reloaded, "moved": moved, "sharded": every}


def main(folder: str, batch: str) -> None:
    torch.set_num_threads(1)
    found = by_trainer(folder, int(batch))
    if distributed.is_initialized():
        found |= sharded(folder)
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        with open(f"{folder}.json", "w") as file:
            json.dump(found, file)
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
