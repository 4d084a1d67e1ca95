"""A Trainer of transformers whose model accelerate shards by FSDP2, for torchrun:
FOLDER BATCH MODE...; what each rank ended with is in FOLDER/MODE.RANK.json.

MODE says how the model is made, "shared" (injected, and shared before), "callback" (by
LoraDropCallback, in the middle of the run), that of another method ("spectral callback", ...) or
"peft callback"; and then in brackets how it is loaded and saved, "ram" (cpu_ram_efficient_loading)
or "parts" (SHARDED_STATE_DICT), or how it computes, "bf16" (autocast, and gathered weights in
bfloat16). In two processes it is sharded; in one it is not, which is what the others are compared
with. "refused" are runs that LoraDropCallback cannot serve.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsdp_on_cpu
import torch
import training_runs as tiny
from accelerate.state import AcceleratorState
from torch.distributed.checkpoint.api import CheckpointException
from torchrun import leave
from transformers import Trainer, TrainingArguments

import loradrop
from loradrop.injection import plan_of
from loradrop.methods.adalora import AdaLoRA
from loradrop.methods.prilora import PRILoRA
from loradrop.ranks import full_tensor, is_sharded

STEPS, WARM_UP, SAVED = 6, 3, 2
LORA = replace(tiny.PLAIN, lora_dropout=0.0)
CALLBACK = loradrop.LoRADrop(keep=1, probe_steps=WARM_UP)
METHODS = {
    "spectral": loradrop.Spectral(budget=0.5, cut_at=WARM_UP),
    "adalora": AdaLoRA(mask_every=1),
    "prilora": PRILoRA(prune_every=2),
}
NONE: Mapping[str, Any] = {}
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def make(mode: str) -> Any:
    model: Any = tiny.without_dropout()
    torch.manual_seed(0)
    if mode.startswith("peft"):
        from peft import get_peft_model

        from loradrop.integrations.peft import to_peft

        return get_peft_model(model, to_peft(replace(LORA, method=CALLBACK)))
    method = METHODS.get(mode.partition(" callback")[0], CALLBACK)
    loradrop.inject(model, replace(LORA, method=method) if "callback" in mode else LORA)
    if mode.startswith("shared"):
        loradrop.share(model, [model.lora_bank.targets[0].name])
    return model


def loaded(mode: str, checkpoint: str) -> Any:
    """The model with the sharing of the checkpoint, as the error says."""
    if mode.startswith("peft"):
        from peft import PeftModel

        return PeftModel.from_pretrained(tiny.without_dropout(), checkpoint, is_trainable=True)
    model = make(mode)
    loradrop.load(model, checkpoint)
    return model


def trainer(
    model: Any, mode: str, folder: Path, batch: int, options: Mapping[str, Any] = NONE
) -> Trainer:
    options = {"transformer_layer_cls_to_wrap": ["BertLayer"], **options}
    if "[ram]" in mode:
        options["cpu_ram_efficient_loading"] = True
    if "[recomputed]" in mode:
        options["activation_checkpointing"] = True
    if "[parts]" in mode:
        options["state_dict_type"] = "SHARDED_STATE_DICT"
    sharded: dict[str, Any] = (
        {"bf16": "[bf16]" in mode, "fsdp": True, "fsdp_config": options} if RANKS > 1 else {}
    )
    args = TrainingArguments(
        output_dir=str(folder / mode), max_steps=STEPS, per_device_train_batch_size=batch,
        report_to="none", learning_rate=1e-2, save_steps=SAVED, use_cpu=True, disable_tqdm=True,
        logging_steps=1, average_tokens_across_devices=False, **sharded,
    )  # fmt: skip
    callbacks = [loradrop.LoraDropCallback()] if "callback" in mode else []
    AcceleratorState._reset_state()
    return Trainer(model, args, train_dataset=tiny.make_rows(48), callbacks=callbacks)


def ended(model: Any, run: Trainer) -> dict[str, Any]:
    bank, plan = model.lora_bank, plan_of(model)
    pairs = [bank.factors(i) for i in range(len(bank.targets))]
    return {
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "kept": bank.assignment.kept,
        "ranks": [target.r for target in bank.targets],
        "deltas": [
            (full_tensor(B.detach()) @ full_tensor(A.detach())).flatten().tolist() for A, B in pairs
        ],
        "tokens": (plan.scores or {}).get("tokens"),
        "cut": [] if plan.cut is None else [plan.cut["loss"], plan.cut["compensated"]],
        "sharded": [any(map(is_sharded, m.parameters())) for m in (model, bank)],
    }


def trained(folder: Path, batch: int, mode: str) -> dict[str, Any]:
    """The end of a run, and of others that go on from its checkpoints."""
    model = make(mode)
    run = trainer(model, mode, folder, batch)
    run.train()
    found: dict[str, Any] = {"rank": RANK, **ended(model, run), "resumed": {}}
    for step in (SAVED, 2 * SAVED) if RANKS > 1 else ():
        checkpoint = f"{folder}/{mode}/checkpoint-{step}"
        model = make(mode)
        try:
            run = trainer(model, mode, folder, batch)
            run.train(resume_from_checkpoint=checkpoint)
        except (RuntimeError, CheckpointException) as error:
            found["refused"] = str(error)
            model = loaded(mode, checkpoint)
            run = trainer(model, mode, folder, batch)
            run.train(resume_from_checkpoint=checkpoint)
        found["resumed"][step] = ended(model, run)
    return found


def refused(folder: Path) -> dict[str, str]:
    """What a Trainer says at once to LoraDropCallback in a run that could not share."""
    found = {}
    for name, options in (
        ("ram", {"cpu_ram_efficient_loading": True}),
        ("version 1", {"version": 1, "sync_module_states": False}),  # which needs an accelerator
    ):
        try:
            trainer(make("callback"), "callback", folder, 4, options)
        except ValueError as error:
            found[name] = str(error)
    return found


def main(folder: str, batch: str, *modes: str) -> None:
    torch.set_num_threads(1)
    fsdp_on_cpu.allow()
    for mode in modes:
        found = (
            refused(Path(folder)) if mode == "refused" else trained(Path(folder), int(batch), mode)
        )
        Path(folder, f"{mode}.{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
