"""The native files: every tensor once, and the plan. `save` and `load` are their own inverse.

`adapter.safetensors` holds the bank's tensors (`bank.*`) and those trained whole (`saved.*`); its
header holds the plan and a checksum, so one file that is replaced atomically is the truth.
`plan.json` beside it is the same plan for people and tools.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loradrop.bank import AdapterBank, bank_of
from loradrop.files import read_json, replacing, write_json
from loradrop.plan import Plan, base_of, plan_of

TENSORS, PLAN, FOLDER = "adapter.safetensors", "plan.json", "loradrop_adapter"
_log = logging.getLogger(__name__)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters, the modules trained whole and the plan into the folder `path`,
    atomically.
    """
    bank, plan = bank_of(model), plan_of(model).to_dict()
    tensors = {f"bank.{k}": v.detach().cpu().contiguous() for k, v in bank.state_dict().items()}
    base = model.state_dict()
    tensors |= {
        f"saved.{k}": base[k].detach().cpu().contiguous().clone() for k in bank.surgery.saved
    }
    text = json.dumps(plan)
    metadata = {
        "format": "pt",
        "loradrop_schema": str(plan["schema"]),
        "plan": text,
        "sha256": _checksum(tensors, text),
    }
    with replacing(Path(path) / TENSORS) as draft:
        save_file(tensors, draft, metadata)
    write_json(Path(path) / PLAN, plan)


def load(model: nn.Module, path: str | os.PathLike[str]) -> AdapterBank:
    """Put the adapters that `save` wrote into `model`, injecting them where it has none.

    Returns the bank. Raises ValueError for a file that is damaged, newer, a pickle, or of another
    model (which tensors differ).
    """
    from loradrop.surgery import inject

    plan, tensors = read(path)
    injected = isinstance(getattr(model, "lora_bank", None), AdapterBank)
    _require_fit(model, plan, tensors, path)
    bank = bank_of(model) if injected else inject(model, plan.config)
    if bank.surgery.merged is not None:
        raise ValueError(
            "the adapters are merged into the weights: call loradrop.remove(model) first"
        )
    if bank.targets != plan.targets:
        here, there = ({target.name for target in x.targets} for x in (bank, plan))
        differing = ", ".join(sorted(here ^ there)[:5]) or "the ranks"
        raise ValueError(
            f"{path} adapts other targets than the model ({differing} differ): "
            "call loradrop.remove(model) first"
        )
    scaling = [plan.config.scaling(target.name) for target in plan.targets]
    if bank.scaling != scaling or bank.config.method.name != plan.config.method.name:
        raise ValueError(
            f"{path} was trained with another lora_alpha, alpha_pattern, use_rslora or method than "
            "the model was injected with: call loradrop.remove(model) first"
        )
    if plan.base.get("fingerprint") not in (None, base_of(model)["fingerprint"]):
        _log.warning(
            "%s was trained on %s, whose tensors are not all those of this model; its targets fit",
            path,
            plan.base.get("id"),
        )
    restore(model, plan, tensors)
    return bank


def restore(model: nn.Module, plan: Plan, tensors: dict[str, Tensor]) -> None:
    """Fill an injected model with what `read` returned."""
    bank = bank_of(model)
    owned = {k.removeprefix("bank."): v for k, v in tensors.items() if k.startswith("bank.")}
    device = next((p.device for p in bank.parameters()), torch.device("cpu"))
    pairs = [
        (owned[f"A.{k}"].to(device), owned[f"B.{k}"].to(device))
        for k in range(sum(key.startswith("A.") for key in owned))
    ]
    bank.assign(plan.slots, pairs)
    bank.load_state_dict(owned)
    base = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in tensors.items():
            if key.startswith("saved."):
                base[key.removeprefix("saved.")].copy_(value)
    bank.plan = plan


def read(path: str | os.PathLike[str]) -> tuple[Plan, dict[str, Tensor]]:
    """The plan and the tensors of a native adapter: a folder, or its safetensors file.

    Raises as `load`.
    """
    path = Path(path)
    file = path / TENSORS if path.is_dir() else path
    if not file.exists():
        nested = path / FOLDER / TENSORS
        if not nested.exists():
            raise FileNotFoundError(
                f"{file} is not there: give the folder that loradrop.save wrote"
            )
        file = nested
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
            f"{file} is no native loradrop adapter (its header has no plan): "
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
            _log.warning(
                "%s is not the plan in the header of %s (an interrupted save, or edited); "
                "the header counts",
                beside,
                file,
            )
    return plan, tensors


def _require_fit(model: nn.Module, plan: Plan, tensors: dict[str, Tensor], path: Any) -> None:
    from loradrop.layers import shape_of

    modules, base = dict(model.named_modules()), model.state_dict()
    wrong = []
    for target in plan.targets:
        module = modules.get(target.name)
        here = None if module is None else shape_of(module)
        if here != (target.in_features, target.out_features):
            found = "not there" if here is None else f"{here[0]} -> {here[1]}"
            wanted = f"{target.in_features} -> {target.out_features}"
            wrong.append(f"{target.name}: {wanted} in the file, {found} in the model")
    for key, value in tensors.items():
        name = key.removeprefix("saved.")
        if key.startswith("saved.") and (name not in base or base[name].shape != value.shape):
            shape = tuple(base[name].shape) if name in base else "not there"
            wrong.append(f"{name}: {tuple(value.shape)} in the file, {shape} in the model")
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" * (len(wrong) > 8)
        base_name = plan.base.get("id") or plan.base.get("class")
        raise ValueError(
            f"{path} is an adapter for another model ({base_name}). These differ:\n  "
            + "\n  ".join(wrong[:8])
            + more
        )


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
    """`model.save_pretrained` of an injected model: the base model's files, and the adapters in a
    folder beside them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As `PreTrainedModel.save_pretrained`; the adapters go to
        `<save_directory>/loradrop_adapter`.
        """
        state = kwargs.pop("state_dict", None) or self.model.state_dict()
        base = {k: v for k, v in state.items() if not k.startswith("lora_bank.")}
        bank = bank_of(self.model)
        if bank.surgery.merged is not None:
            raise ValueError(
                "the adapters are merged for now: call loradrop.remove(model), "
                "or loradrop.export(model, path, format='merged')"
            )
        pretrained: Any = type(self.model)
        result = pretrained.save_pretrained(self.model, save_directory, state_dict=base, **kwargs)
        folder = Path(save_directory) / FOLDER
        save(self.model, folder)
        _log.info("the base model is in %s, its adapters in %s", save_directory, folder)
        return result
