"""One `fit` of the tiny model, for torchrun: FOLDER BATCH [MODE]; prints what each rank ended with.

MODE is "resume", "kill" (rank 1 dies in the middle of the main run), "spectral" for that method, or
"callback": a Trainer with LoraDropCallback in place of `fit`.
"""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from typing import Any

import torch
import training_runs as tiny
from transformers import Trainer, TrainerCallback, TrainingArguments

import loradrop
from loradrop import LoRAConfig, LoraDropConfig, Spectral, fit


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        here = os.path.basename(args.output_dir)
        if here == "main" and state.global_step == 5 and os.environ["RANK"] == "1":
            os._exit(9)


def main(folder: str, batch: str, mode: str = "") -> None:
    torch.set_num_threads(1)
    options = tiny.LORA | {"lora_dropout": 0.0}
    config = LoraDropConfig(**options, keep=1, probe_steps=4)
    if mode.startswith("spectral"):
        config = LoRAConfig(**options, method=Spectral(cut_at=4))
    args = replace(tiny.ARGS, steps=None, epochs=2, batch_size=int(batch), save_every=2)
    model = undropped()
    if mode.endswith("callback"):
        return by_callback(model, config, folder, int(batch))
    result = fit(
        model, tiny.make_rows(48), tiny.make_rows(16, 1), config, args=args, output_dir=folder,
        metric=tiny.accuracy, resume=mode == "resume", callbacks=[Kill()] if mode == "kill" else (),
    )  # fmt: skip
    assert result.plan.scores is not None
    found = {
        "rank": int(os.environ.get("RANK", 0)),
        "steps": result.steps,
        "epoch": max(entry["epoch"] for entry in result.history if "loss" in entry),
        "kept": result.plan.kept,
        "scores": list(result.plan.scores["values"].values()),
        "tokens": result.plan.scores["tokens"],
        "metrics": dict(result.metrics),
        "adapters": [p.flatten().tolist() for p in model.lora_bank.parameters()],
    }
    with open(f"{folder}.{found['rank']}.json", "w") as file:
        json.dump(found, file)


def undropped() -> Any:
    """The model without dropout, of which each rank would draw its own."""
    model = tiny.make_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def by_callback(model: Any, config: Any, folder: str, batch: int) -> None:
    """Injected, and as a PeftModel where there is PEFT."""
    loradrop.inject(model, config)
    found = {"own": trained(model, folder, batch)}
    if importlib.util.find_spec("peft") is not None:
        from loradrop.integrations.peft import to_peft

        torch.manual_seed(0)
        peft = importlib.import_module("peft")
        face = peft.get_peft_model(undropped(), to_peft(config))
        found["peft"] = trained(face, f"{folder}-peft", batch)
    with open(f"{folder}.{os.environ.get('RANK', 0)}.json", "w") as file:
        json.dump(found, file)


def trained(model: Any, folder: str, batch: int) -> dict[str, Any]:
    args = TrainingArguments(
        output_dir=folder, num_train_epochs=2, per_device_train_batch_size=batch, report_to="none",
        learning_rate=1e-2, save_strategy="no", use_cpu=True, disable_tqdm=True,
        average_tokens_across_devices=False,  # BERT takes no num_items_in_batch
    )  # fmt: skip
    callbacks = [loradrop.LoraDropCallback()]
    Trainer(model, args, train_dataset=tiny.make_rows(48), callbacks=callbacks).train()
    bank = model.lora_bank
    adapters = [p.flatten().tolist() for p in bank.parameters()]
    return {"kept": bank.assignment.kept, "adapters": adapters}


if __name__ == "__main__":
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
