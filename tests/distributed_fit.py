"""Runs of the tiny model, for torchrun: FOLDER BATCH MODE...; what each rank ended with is in
FOLDER/MODE.RANK.json.

MODE is "fit"; "kill" (rank 1 dies in the middle of the main run) and "resume" of that; "spectral"
for that method; "callback": a Trainer with LoraDropCallback in place of `fit`; "peft callback": the
same with a PeftModel; and "spectral callback", which is refused: the file has the reason. Each
begins in a folder of its own, "resume" in that of "kill".
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import training_runs as tiny
from torchrun import leave
from transformers import Trainer, TrainerCallback, TrainingArguments

import loradrop
from loradrop import LoRAConfig, LoraDropConfig, Spectral, fit

OPTIONS = tiny.LORA | {"lora_dropout": 0.0}


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        here = os.path.basename(args.output_dir)
        if here == "main" and state.global_step == 5 and os.environ["RANK"] == "1":
            os._exit(9)


def main(folder: str, batch: str, *modes: str) -> None:
    torch.set_num_threads(1)
    for mode in modes:
        config = LoraDropConfig(**OPTIONS, keep=1, probe_steps=4)
        if mode.startswith("spectral"):
            config = LoRAConfig(**OPTIONS, method=Spectral(cut_at=4))
        model = tiny.without_dropout()
        train = by_callback if mode.endswith("callback") else by_fit
        try:
            found = train(model, config, Path(folder), int(batch), mode)
        except ValueError as error:
            if mode != "spectral callback":
                raise
            found = {"refused": str(error)}
        rank = int(os.environ.get("RANK", 0))
        Path(folder, f"{mode}.{rank}.json").write_text(json.dumps({"rank": rank} | found))


def by_fit(model: Any, config: Any, folder: Path, batch: int, mode: str) -> dict[str, Any]:
    args = replace(tiny.ARGS, steps=None, epochs=2, batch_size=batch, save_every=2)
    result = fit(
        model, tiny.make_rows(48), tiny.make_rows(16, 1), config, args=args,
        output_dir=folder / ("kill" if mode == "resume" else mode), metric=tiny.accuracy,
        resume=mode == "resume", callbacks=[Kill()] if mode == "kill" else (),
    )  # fmt: skip
    assert result.plan.scores is not None
    return {
        "steps": result.steps,
        "epoch": max(entry["epoch"] for entry in result.history if "loss" in entry),
        "kept": result.plan.kept,
        "scores": list(result.plan.scores["values"].values()),
        "tokens": result.plan.scores["tokens"],
        "metrics": dict(result.metrics),
        "adapters": [p.flatten().tolist() for p in model.lora_bank.parameters()],
    }


def by_callback(model: Any, config: Any, folder: Path, batch: int, mode: str) -> dict[str, Any]:
    if mode == "peft callback":
        from peft import get_peft_model

        from loradrop.integrations.peft import to_peft

        model = get_peft_model(model, to_peft(config))
    else:
        loradrop.inject(model, config)
    args = TrainingArguments(
        output_dir=str(folder / mode), num_train_epochs=2, per_device_train_batch_size=batch,
        report_to="none", learning_rate=1e-2, save_strategy="no", use_cpu=True, disable_tqdm=True,
        average_tokens_across_devices=False,  # BERT takes no num_items_in_batch
    )  # fmt: skip
    callbacks = [loradrop.LoraDropCallback()]
    Trainer(model, args, train_dataset=tiny.make_rows(48), callbacks=callbacks).train()
    bank = model.lora_bank
    adapters = [p.flatten().tolist() for p in bank.parameters()]
    return {"kept": bank.assignment.kept, "adapters": adapters}


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
