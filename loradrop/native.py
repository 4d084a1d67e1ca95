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
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from loradrop.bank import ALONE, STATE, bank_of
from loradrop.files import read_json, write_json
from loradrop.injection import (
    Adapters,
    adapters_of,
    injected,
    injection_of,
    plan_of,
    require_adapted,
    sum_of,
    trained_since,
)
from loradrop.pairs import LoRABank
from loradrop.plan import Plan
from loradrop.ranks import full_tensor, is_sharded, local_part, writes
from loradrop.tensor_file import write_tensors
from loradrop.wrapped import of_inner

TENSORS, PLAN, FOLDER = "adapter.safetensors", "plan.json", "loradrop_adapter"
CHECKPOINT = "model.safetensors"  # where the Trainer looks for what it saved
_BANK, _TRAINED = "bank.", "saved."
_log = logging.getLogger(__name__)


class NativeFile(NamedTuple):
    """A native adapter as it is on disk.

    bank      the bank's tensors by their names in its state dict, those of pairs as "A.0"
    trained   the base tensors trained whole, by their names in the model
    """

    plan: Plan
    bank: dict[str, Tensor]
    trained: dict[str, Tensor]


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


def tell_untouched(model: nn.Module) -> None:
    """One line where the adapters trained without what their method does to them."""
    told = injection_of(model).told
    if (reason := unmeasured(model) or _idle(model)) is not None and reason not in told:
        told.add(reason)
        _log.warning("%s", reason)


@torch.no_grad()
def tell_untrained(model: nn.Module) -> None:
    """One line where some adapters were trained, and others are zero as they began."""
    bank = bank_of(model)
    if not isinstance(bank, LoRABank) or any(map(is_sharded, bank.parameters())):
        return
    zero = [not bool(B.any()) for B in bank.B]
    users = zip(bank.targets, bank.slots, strict=True)
    idle = [target.name for target, slot in users if slot is not None and zero[slot]]
    if idle and not all(zero):
        _log.warning(
            "the adapters of %s are zero, as if they were never trained: a loss that reads the "
            "weight of a layer itself, as TRL's of lm_head, goes past its adapter",
            ", ".join(idle),
        )  # fmt: skip


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
    write_tensors(Path(path) / TENSORS, tensors, metadata)
    write_json(Path(path) / PLAN, plan)


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
                f"{adapters_below(path)}"
            )
    _refuse_pickle(file)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = list(opened.keys())
            # Copied: a tensor in the mapped file would keep it from being replaced on Windows.
            tensors = {key: opened.get_tensor(key).clone() for key in names}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or half-written ({error}; {file.stat().st_size} bytes): "
            "restore it from a copy or an earlier checkpoint"
        ) from error
    if "plan" not in metadata:
        raise ValueError(
            f"{file} is not a native loradrop adapter (its header has no plan): "
            "load a PEFT file with its folder, loradrop.load(model, folder)"
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


def adapters_below(path: str | os.PathLike[str]) -> str:
    """How to go on to the adapters in the folder of a run, or of its arm; nothing if none."""
    files = [f for ways in ("adapter", "*/adapter") for f in Path(path).glob(f"{ways}/{TENSORS}")]
    return f", which is {' or '.join(sorted(str(f.parent) for f in files))}" * bool(files)


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
        """As `PreTrainedModel.save_pretrained`, with the adapters in `loradrop_adapter/`.

        Raises ValueError while the adapters are merged and, once all is written, for a method that
        wants a warm-up and trained without one.
        """
        folder, model = Path(save_directory), self.model
        given = kwargs.pop("state_dict", None)
        state = given or model.state_dict()
        if injection_of(model).merged is not None:
            raise ValueError(
                "the adapters are merged for now: call loradrop.remove(model), "
                "or loradrop.export(model, path, format='merged')"
            )
        if re.fullmatch(r"checkpoint-\d+", folder.name) and _is_of_transformers(model):
            if kwargs.get("is_main_process", True):
                _write_checkpoint(model, folder, state)
                _require_measured(model)
            return None
        if given is not None:
            own = {k: v for k, v in state.items() if not k.startswith("lora_bank.")}
            kwargs["state_dict"] = own
        pretrained: Any = type(model)
        with without_bank(model):
            result = pretrained.save_pretrained(model, folder, **kwargs)
        _save_given(model, folder / FOLDER, state)
        _log.warning(
            "%s holds the base model, and its adapters in %s: what from_pretrained loads from it "
            "lacks them until loradrop.load(model, %r)", folder, FOLDER, str(folder),
        )  # fmt: skip
        _require_measured(model)
        return result


class SavePart:
    """`save_pretrained` of a part of an injected model, which its adapters do not belong to."""

    def __init__(self, part: nn.Module, name: str) -> None:
        self.part, self.name = part, name

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As `PreTrainedModel.save_pretrained`, and says what it leaves out."""
        _log.warning(
            "%s holds the base weights of %s alone: the adapters are of the whole model. Call "
            "loradrop.save(model, folder), or loradrop.merge(model) first",
            save_directory, self.name,
        )  # fmt: skip
        kind: Any = type(self.part)
        return kind.save_pretrained(self.part, save_directory, **kwargs)


@contextmanager
def without_bank(model: nn.Module) -> Iterator[None]:
    """Inside, the model's state dict is that of the base model, whatever class saves it."""
    modules = dict(model._modules)
    del model._modules["lora_bank"]
    try:
        yield
    finally:  # in their order, whatever came after the bank
        model._modules.clear()
        model._modules.update(modules)


def _is_of_transformers(model: nn.Module) -> bool:
    """Whether the Trainer resumes it by `load_state_dict`; another class reads its own folder."""
    return "PreTrainedModel" in (cls.__name__ for cls in type(model).__mro__)


def _write_checkpoint(model: nn.Module, folder: Path, state: Mapping[str, Tensor]) -> None:
    """The bank, what is trained whole and buffers, by the names that `load_state_dict` takes."""
    buffers = (name for name, _ in model.named_buffers())
    trained = {*injection_of(model).originals, *trained_since(model), *buffers}
    names = [key for key in state if key.startswith("lora_bank.") or key in trained]
    tensors = {key: state[key].detach().cpu().contiguous().clone() for key in names}
    users = full_tensor(bank_of(model).get_extra_state()).cpu()
    users[-1] = ALONE  # the base is left out on purpose
    tensors[f"lora_bank.{STATE}"] = users
    write_tensors(folder / CHECKPOINT, tensors, {"format": "pt"})
    _save_given(model, folder / FOLDER, state)


def _save_given(model: nn.Module, folder: Path, state: Mapping[str, Tensor]) -> None:
    """`save`; of a sharded model the tensors in `state`, where the caller gathered them.

    The Trainer does so, and then saves on one rank: to gather again would wait for the others.
    """
    sharded = any(map(is_sharded, model.parameters()))
    if not sharded or any(map(is_sharded, state.values())):
        return save(model, folder)
    require_adapted(model)
    names = (*injection_of(model).originals, *trained_since(model))
    bank = {k.removeprefix("lora_bank."): v for k, v in state.items() if k.startswith("lora_bank.")}
    bank.pop(STATE, None)
    trained = {name: state[name] for name in names}
    write(Adapters(plan_of(model), (), (), bank_of(model).in_file(bank), trained), folder)


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
    pairs = [bank.factors(i) for i in range(len(bank.targets))]
    if not any(bool(local_part(pair[1]).any()) for pair in pairs if pair is not None):
        return None  # nothing is trained yet
    return (
        f"the method {injection.config.method.name!r} decides after a warm-up, and none was made, "
        "so this is plain LoRA: pass callbacks=[loradrop.LoraDropCallback()] to the Trainer, call "
        "loradrop.fit, or inject with LoRAConfig(method=loradrop.LoRA())"
    )


def _idle(model: nn.Module) -> str | None:
    """Why a method that acts at every step did nothing; None where it did, or has nothing to do."""
    bank, injection = bank_of(model), injection_of(model)
    method = injection.config.method
    if injection.stepped or not method.acts:
        return None
    if sum_of(bank) == injection.start:
        return None  # nothing is trained yet
    return (
        f"the method {method.name!r} acts at every step of training, and nothing called it: pass "
        "callbacks=[loradrop.LoraDropCallback()] to the Trainer, or call loradrop.fit"
    )
