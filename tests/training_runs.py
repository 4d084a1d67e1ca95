"""A tiny model, its data, and runs of `fit` for the tests of training and of resuming."""

import itertools
import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager

from loradrop import LoRAConfig, LoraDropConfig, TrainConfig, fit
from loradrop.methods import Spectral
from loradrop.methods.prilora import PRILoRA
from loradrop.methods.vera import VeRA
from loradrop.training.stages import Result

datasets = pytest.importorskip("datasets")

# 44 rows in batches of 8: 6 steps an epoch, the last batch small. Both stages end inside an epoch.
ROWS, TOTAL, WARMUP = 44, 22, 8
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["query", "value"]}
DROP = LoraDropConfig(**LORA, keep_ratio=0.5, probe_steps=WARMUP)
SETTLING = LoraDropConfig(
    **LORA, keep_ratio=0.5, probe_steps=12, settle_margin=0.49, settle_every=4
)
OFFLINE = LoraDropConfig(**LORA, keep=1, probe_steps=WARMUP, source="offline")
PLAIN = LoRAConfig(**LORA)
CONFIGS: dict[str, LoRAConfig] = {
    **{"drop": DROP, "settling": SETTLING, "offline": OFFLINE, "lora": PLAIN},
    "part": LoraDropConfig(**LORA, keep=1, probe_steps=0.3, source="offline"),
    "vera": LoRAConfig(**LORA, method=VeRA()),
    "spectral": LoRAConfig(**LORA, method=Spectral(cut_at=WARMUP)),
    "prilora": LoRAConfig(**LORA, method=PRILoRA(prune_every=3)),
}
ARGS = TrainConfig(steps=TOTAL, batch_size=8, learning_rate=1e-2, log_every=2, save_every=4)


def make_model(labels: int = 3) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_labels": labels}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    return BertForSequenceClassification(BertConfig(**sizes, **heads))


def without_dropout() -> nn.Module:
    """The model in train mode, in several ranks too: each would draw its own mask."""
    model = make_model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def make_rows(n: int = ROWS, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of 5 to 12 tokens, the first ones of which tell the label; half have label 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        label = (0, 1, 0, 2)[i % 4]
        ids = torch.randint(6, 64, (12,), generator=generator)
        length = int(torch.randint(5, 13, (), generator=generator))
        ids[:4], ids[length:] = label + 1, 0
        mask = (torch.arange(12) < length).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": label})
    return rows


def accuracy(prediction: Any) -> dict[str, float]:
    guess = prediction.predictions.argmax(-1)
    return {"accuracy": float((guess == prediction.label_ids).mean())}


def falling() -> Callable[[Any], dict[str, float]]:
    """A metric `q` that is lower at every call."""
    calls = itertools.count(1)
    return lambda _: {"q": -float(next(calls))}


def run(
    folder: Path, config: LoRAConfig | None = DROP, args: TrainConfig = ARGS, **options: Any
) -> Result:
    model = options.pop("model", None) or make_model()
    train, dev = options.pop("train", None) or make_rows(), options.pop("dev", make_rows(16, 1))
    options |= {"args": args, "metric": accuracy, "data": {"train": "a fingerprint"}}
    return fit(model, train, dev, config, output_dir=folder, **options)


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a run leaves that has to be the same when it is repeated."""
    result = json.loads((folder / "result.json").read_text())
    assert result.pop("seconds") > 0
    tensors = load_file(folder / "adapter" / "adapter.safetensors")
    return {
        "result": result,
        "plan": json.loads((folder / "plan.json").read_text()),
        "tensors": {name: (t.dtype, t.numpy().tobytes()) for name, t in tensors.items()},
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class At(TrainerCallback):
    """Does something after a step of a stage."""

    def __init__(self, stage: str, step: int, what: Callable[[], None]) -> None:
        self.stage, self.step, self.what = stage, step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step == self.step:
            self.what()


class Stops(TrainerCallback):
    """Ends a run gently at an event after a step of a stage: by itself, or by the signal that a
    cluster sends, which transformers' enable_jit_checkpoint takes.
    """

    def __init__(self, stage: str, event: str, step: int, by_signal: bool = True) -> None:
        self.stage, self.step, self.by_signal = stage, step, by_signal
        setattr(self, event, self._stop)

    def _stop(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step == self.step:
            if self.by_signal:
                handler: Any = signal.getsignal(signal.SIGTERM)
                handler(signal.SIGTERM, None)
            else:
                control.should_training_stop = True


def take_signals_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers waits three seconds for a signal that kills."""
    manager = CheckpointManager
    monkeypatch.setattr(manager, "_sigterm_handler", lambda self, *_: self._enable_checkpoint())


def counting(steps: list[int]) -> list[At]:
    """Callbacks that add an entry at every step of both stages."""
    return [At(s, i, partial(steps.append, i)) for s in ("warmup", "main") for i in range(99)]


class StopError(Exception):
    pass


def stop() -> None:
    raise StopError


def interrupted(folder: Path, stage: str, step: int, **options: Any) -> None:
    with pytest.raises(StopError):
        run(folder, callbacks=[At(stage, step, stop)], **options)


class Runs(dict[str, tuple[Path, Result, int]]):
    """Name in CONFIGS -> folder, result and steps of its uninterrupted run, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, name: str) -> tuple[Path, Result, int]:
        folder, steps = self.folder / name, list[int]()
        result = run(folder, CONFIGS[name], callbacks=counting(steps))
        self[name] = folder, result, len(steps)
        return self[name]
