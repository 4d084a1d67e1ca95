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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from loradrop.adapters import Adapters, adapters_of
from loradrop.bank import bank_of
from loradrop.files import read_json, write_json
from loradrop.injection import injected
from loradrop.plan import Plan
from loradrop.ranks import writes
from loradrop.remarks import tell_untouched
from loradrop.tensor_file import same, write_tensors
from loradrop.wrapped import of_inner

TENSORS, PLAN, FOLDER = "adapter.safetensors", "plan.json", "loradrop_adapter"
_BANK, _TRAINED = "bank.", "saved."
_log = logging.getLogger(__name__)


class NativeFile(NamedTuple):
    """A native adapter as it is on disk.

    bank      the bank's tensors by their names in its state dict, those of pairs as "A.0"
    trained   the base tensors trained whole, by their names in the model
    tied      as `Adapters` has it
    """

    plan: Plan
    bank: dict[str, Tensor]
    trained: dict[str, Tensor]
    tied: Mapping[str, Sequence[str]] | None = None


@of_inner
def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters, the modules trained whole and the plan into `path`, atomically.

    Every rank calls it where FSDP2 shards the adapters; the first one writes. Raises OSError where
    the file does not hold what was written, ValueError where a target was replaced.
    """
    bank_of(model)
    with injected(model) as own:
        tell_untouched(own)
        checkpoint(own, path)


def checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """`save` in the middle of a run, whose method may have yet to decide."""
    adapters = adapters_of(model)
    if writes(model):
        write(adapters, path)


def write(adapters: Adapters, path: str | os.PathLike[str]) -> None:
    """`save` of a snapshot."""
    plan = adapters.plan.to_dict()
    tensors = {f"{_BANK}{k}": v.detach().cpu().contiguous() for k, v in adapters.state.items()}
    tensors |= {f"{_TRAINED}{k}": v.cpu().contiguous().clone() for k, v in adapters.trained.items()}
    text, schema = json.dumps(plan), str(plan["schema"])
    metadata = {"format": "pt", "loradrop_schema": schema, "plan": text}
    metadata["sha256"] = _checksum(tensors, text)
    if adapters.tied is not None:
        metadata["tied"] = json.dumps(adapters.tied)
    write_tensors(Path(path) / TENSORS, tensors, metadata)
    write_json(Path(path) / PLAN, plan)


def is_native(path: str | os.PathLike[str]) -> bool:
    """Whether the folder `path` holds an adapter of ours, as the folder of a checkpoint does in one
    of its own. It is asked before `is_peft`: ours alone knows who shares.
    """
    return any((Path(path) / name).exists() for name in (TENSORS, f"{FOLDER}/{TENSORS}"))


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
            raise FileNotFoundError(
                f"{missing} is not there: give the folder loradrop.save wrote, or one of PEFT"
                f"{adapters_below(path, '*/adapter_config.json')}{_elsewhere(path)}"
            )
    _refuse_pickle(file)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = list(opened.keys())
            # Copied: a tensor in the mapped file would keep it from being replaced on Windows.
            tensors = {key: opened.get_tensor(key).clone() for key in names}
    except safetensors.SafetensorError as error:
        if file.suffix != ".safetensors":
            raise ValueError(
                f"{file} is no adapter: give the folder that loradrop.save wrote, or one of PEFT"
            ) from error
        raise ValueError(
            f"{file} is damaged or half-written ({error}; {file.stat().st_size} bytes): "
            "restore it from a copy or an earlier checkpoint"
        ) from error
    if "plan" not in metadata:
        raise ValueError(
            f"{file} is not a native loradrop adapter (its header has no plan): "
            "load a PEFT file with its folder, loradrop.load(model, folder)"
            f"{_of_a_checkpoint(file)}"
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
    tied = json.loads(metadata["tied"]) if "tied" in metadata else None
    return NativeFile(plan, _part(tensors, _BANK), _part(tensors, _TRAINED), tied)


def holds_other(folder: Path, adapters: Adapters) -> bool:
    """Whether the folder has a native adapter with other tensors than these."""
    if not is_native(folder):
        return False
    file = read(folder)
    held = [(file.bank, adapters.state), (file.trained, adapters.trained)]
    return any(
        there.keys() != here.keys() or not all(same(there[key], here[key].cpu()) for key in there)
        for there, here in held
    )


def adapters_below(path: str | os.PathLike[str], *more: str) -> str:
    """How to go on to the adapters in the folder of a run, or of its arm, and to those that have a
    file as one of `more` says; nothing if none.
    """
    ways = (f"adapter/{TENSORS}", f"*/adapter/{TENSORS}", *more)
    found = {str(file.parent) for way in ways for file in Path(path).glob(way)}
    return f", which is {' or '.join(sorted(found))}" * bool(found)


def _elsewhere(path: Path) -> str:
    """What else a path without an adapter may be: a repository of the Hub, or a checkpoint."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path.as_posix()) and not path.parent.exists():
        return (
            f". One of the Hub is downloaded first: huggingface_hub.snapshot_download({str(path)!r}"
            f") returns its folder (in a shell: $(hf download {path}))"
        )
    return _of_a_checkpoint(path / "model.safetensors")


def _of_a_checkpoint(file: Path) -> str:
    """How to load what the Trainer saves of an injected model, if this is such a file: its tensors,
    without a plan.
    """
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            ours = any(key.startswith("lora_bank.") for key in opened.keys())  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return ""
    load = f"model.load_state_dict(safetensors.torch.load_file({str(file)!r}), strict=False)"
    return (
        ". These are the tensors of an injected model: inject the model with the options of that "
        f"run, and {load}"
    ) * ours


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
