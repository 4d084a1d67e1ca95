"""A Trainer of transformers over the tiny classifier, and that model with LoRA-drop's adapters."""

from pathlib import Path
from typing import Any

import torch
import training_runs as tiny
from training_runs import make_model, make_rows
from transformers import Trainer, TrainingArguments

import loradrop
from loradrop import LoRAConfig, LoraDropConfig

STEPS, WARM = 14, 4
DROP = LoraDropConfig(**tiny.LORA, keep=1, probe_steps=WARM)


def trainer(folder: Path, model: Any, callbacks: Any = (), **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": STEPS, "save_steps": 2, "learning_rate": 1e-2}
    settings |= {"per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none"}
    settings |= {"use_cpu": True, "disable_tqdm": True, "warmup_steps": 2} | options
    args = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(model, args, train_dataset=make_rows(), callbacks=list(callbacks))


def injected(config: LoRAConfig = DROP) -> Any:
    model = make_model()
    loradrop.inject(model, config)
    return model


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}
