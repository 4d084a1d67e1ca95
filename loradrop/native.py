"""The native files: every tensor once, and the plan. `loading.load` is the inverse of `save`.

`adapter.safetensors` holds the bank's tensors (`bank.*`) and those trained whole (`saved.*`); its
header holds the plan and a checksum, so one file that is replaced atomically is the truth.
`plan.json` beside it is the same plan for people and tools.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from loradrop.bank import STATE, bank_of
from loradrop.files import read_json, write_json
from loradrop.injection import Adapters, adapters_of, injection_of
from loradrop.plan import Plan
from loradrop.tensor_file import full, once, write_tensors

TENSORS, PLAN, FOLDER = "adapter.safetensors", "plan.json", "loradrop_adapter"
CHECKPOINT = "model.safetensors"  # where the Trainer looks for what it saved
_BANK, _TRAINED = "bank.", "saved."
_log = logging.getLogger(__name__)


class NativeFile(NamedTuple):
    """A native adapter as it is on disk.

    bank      the bank's tensors by their names in its state dict
    trained   the base tensors trained whole, by their names in the model
    """

    plan: Plan
    bank: dict[str, Tensor]
    trained: dict[str, Tensor]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters, the modules trained whole and the plan into `path`, atomically.

    What was written is read back. Of a sharded model (DTensors) every rank has to call this: the
    tensors are gathered, the first rank writes and the others wait for it. Raises OSError where the
    file cannot be written.
    """
    if (reason := unmeasured(model)) is not None:
        _log.warning("%s", reason)
    write(adapters_of(model), path)


def write(adapters: Adapters, path: str | os.PathLike[str]) -> None:
    """`save` of a snapshot."""
    plan = adapters.plan.to_dict()
    found = {f"{_BANK}{k}": v for k, v in adapters.state.items()}
    found |= {f"{_TRAINED}{k}": v for k, v in adapters.trained.items()}
    tensors = {key: full(value).clone() for key, value in found.items()}  # no two share memory
    text, schema = json.dumps(plan), str(plan["schema"])
    metadata = {"format": "pt", "loradrop_schema": schema, "plan": text}
    metadata["sha256"] = _checksum(tensors, text)

    def write_both() -> None:
        write_tensors(Path(path) / TENSORS, tensors, metadata)
        write_json(Path(path) / PLAN, plan)

    once(found.values(), write_both)


def read(path: str | os.PathLike[str]) -> NativeFile:
    """A native adapter: a folder, or its safetensors file.

    Raises FileNotFoundError where there is none, ValueError for a file that is damaged, newer, a
    pickle, or not an adapter of loradrop.
    """
    path = Path(path)
    file = path / TENSORS if path.is_dir() else path
    if not file.exists():
        missing, file = file, path / FOLDER / TENSORS
        if not file.exists():
            raise FileNotFoundError(f"{missing} is not there: give the folder loradrop.save wrote")
    _refuse_pickle(file)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or half-written ({error}; {file.stat().st_size} bytes): "
            "restore it from a copy or an earlier checkpoint"
        ) from error
    if "plan" not in metadata:
        raise ValueError(
            f"{file} is not a native loradrop adapter (its header has no plan): "
            "load a PEFT file with PEFT"
        )
    try:
        plan = Plan.from_dict(json.loads(metadata["plan"]))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if metadata.get("sha256") != _checksum(tensors, metadata["plan"]):
        raise ValueError(
            f"{file} is damaged: its tensors do not have the checksum in its header. "
            "Restore it from a copy"
        )
    beside = file.parent / PLAN
    if beside.exists():
        try:
            agrees = read_json(beside) == json.loads(metadata["plan"])
        except ValueError:
            agrees = False
        if not agrees:
            why = "(an interrupted save, or edited); the header counts"
            _log.warning("%s is not the plan in the header of %s %s", beside, file, why)
    return NativeFile(plan, _part(tensors, _BANK), _part(tensors, _TRAINED))


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _refuse_pickle(file: Path) -> None:
    with open(file, "rb") as opened:
        head = opened.read(9)
    pickled = head[:1] == b"\x80" or head[:4] == b"PK\x03\x04"
    if head[8:] != b"{" and (pickled or file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")):
        raise ValueError(
            f"{file} is a pickle, which can run any code when it is loaded: refused. "
            "Give a safetensors file"
        )


def _checksum(tensors: dict[str, Tensor], plan: str) -> str:
    digest = hashlib.sha256(plan.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class SavePretrained:
    """`save_pretrained` of an injected model: the base model, and its adapters in a folder.

    In a folder that is named as the Trainer's checkpoints are, checkpoint-<step>, it writes what is
    trained alone: the frozen base is there already where a run resumes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As the class's own `save_pretrained`, with the adapters in `loradrop_adapter/`.

        Raises ValueError while the adapters are merged and, once all is written, for a method that
        wants a warm-up and trained without one.
        """
        folder, model = Path(save_directory), self.model
        state = kwargs.get("state_dict") or model.state_dict()
        of_transformers = is_of_transformers(model)
        if injection_of(model).merged is not None:
            raise ValueError(
                "the adapters are merged for now: call loradrop.remove(model), "
                "or loradrop.export(model, path, format='merged')"
            )
        if of_transformers and re.fullmatch(r"checkpoint-\d+", folder.name):
            if kwargs.get("is_main_process", True):
                _write_checkpoint(model, folder, state)
                _require_measured(model)
            return None
        if of_transformers:
            kwargs["state_dict"] = state
        if (given := kwargs.get("state_dict")) is not None:
            base = {k: v for k, v in given.items() if not k.startswith("lora_bank.")}
            kwargs["state_dict"] = base
        pretrained: Any = type(model)
        with without_bank(model):
            result = pretrained.save_pretrained(model, folder, **kwargs)
        _save_with(model, folder / FOLDER, state)
        _log.warning(
            "%s holds the base model, and its adapters in %s: what from_pretrained loads from it "
            "lacks them until loradrop.load(model, %r)", folder, FOLDER, str(folder),
        )  # fmt: skip
        _require_measured(model)
        return result


def is_of_transformers(model: nn.Module) -> bool:
    """Whether it is a PreTrainedModel, whose save_pretrained writes the state_dict it is given."""
    return "PreTrainedModel" in (cls.__name__ for cls in type(model).__mro__)


@contextmanager
def without_bank(model: nn.Module) -> Iterator[None]:
    """Inside, the modules and the state dict are those of the base model."""
    modules = dict(model._modules)
    del model._modules["lora_bank"]
    try:
        yield
    finally:
        model._modules.clear()
        model._modules.update(modules)


def _save_with(model: nn.Module, folder: Path, state: Mapping[str, Tensor]) -> None:
    """`save`, of the tensors in `state`: what the Trainer gathered, where one rank saves alone."""
    if (reason := unmeasured(model)) is not None:
        _log.warning("%s", reason)
    adapters = adapters_of(model)
    bank = {k: state.get(f"lora_bank.{k}", v) for k, v in adapters.state.items()}
    trained = {k: state.get(k, v) for k, v in adapters.trained.items()}
    write(replace(adapters, state=bank, trained=trained), folder)


def _write_checkpoint(model: nn.Module, folder: Path, state: Mapping[str, Tensor]) -> None:
    """The bank, what is trained whole and buffers, by the names that `load_state_dict` takes."""
    trained = {*injection_of(model).originals, *(name for name, _ in model.named_buffers())}
    names = [key for key in state if key.startswith("lora_bank.") or key in trained]
    tensors = {key: full(state[key]).clone() for key in names}
    tensors[f"lora_bank.{STATE}"][-1] = 1  # the base is left out on purpose
    once(state.values(), lambda: write_tensors(folder / CHECKPOINT, tensors, {"format": "pt"}))
    _save_with(model, folder / FOLDER, state)


def _require_measured(model: nn.Module) -> None:
    if (reason := unmeasured(model)) is not None:
        raise ValueError(reason)


def unmeasured(model: nn.Module) -> str | None:
    """Why the adapters are plain LoRA's though their method is another; None where they are not.

    They are where the method decides after a warm-up, and they were trained without one.
    """
    bank, injection = bank_of(model), injection_of(model)
    begun = bank.collector is not None or injection.scores is not None or bank.assignment.decided
    if begun or not injection.config.method.warms_up:
        return None
    pairs = (bank.factors(i) for i in range(len(bank.targets)))
    if not any(pair is not None and bool(pair[1].any()) for pair in pairs):
        return None  # nothing is trained yet
    return (
        f"the method {injection.config.method.name!r} decides after a warm-up, and none was made, "
        "so this is plain LoRA: pass callbacks=[loradrop.LoraDropCallback()] to the Trainer, call "
        "loradrop.fit, or inject with LoRAConfig(method=loradrop.LoRA())"
    )
