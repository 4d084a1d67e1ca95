"""Writing adapters for others: a PEFT folder that every engine scales alike, or the merged model.

Every target has an A and B of its own, with its true scale folded into B in float32. A padded file
gives all of them one rank, by zeros, and lora_alpha = r: so lora_alpha / r = 1 for an engine that
reads patterns and rslora, and for one that does not. A file that is not padded is smaller, and says
each rank in `rank_pattern` and the same number in `alpha_pattern`.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loradrop.adapters import Adapters, adapters_of
from loradrop.bank import bank_of
from loradrop.config import DTYPES
from loradrop.files import read_json, write_json, write_text
from loradrop.formats.card import card_of, extended
from loradrop.formats.engines import ENGINES, EngineVerdict, refusal, required
from loradrop.formats.hub import CARD, push
from loradrop.formats.merged import holds_weights, save_merged
from loradrop.formats.peft_file import (
    CONFIG,
    MERGED,
    PREFIX,
    TENSORS,
    PeftFile,
    as_pattern,
    configuration_of,
    layout_of,
    padded_rank,
    ranks_in_file,
)
from loradrop.injection import injected, require_loaded
from loradrop.layers import is_conv1d
from loradrop.machine import is_first_rank
from loradrop.native import holds_other
from loradrop.origin import base_of
from loradrop.ranks import full_tensor, is_sharded, writes
from loradrop.remarks import tell_untouched, tell_untrained
from loradrop.tensor_file import write_tensors
from loradrop.wrapped import of_inner, tensors_of

FORMATS = ("peft", "merged")
_log = logging.getLogger(__name__)


@of_inner
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "peft",
    base_id: str | None = None,
    *,
    dtype: str | None = None,
    padded: bool = True,
    engines: Sequence[str] | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> list[EngineVerdict]:
    """Write the adapters of `model` into the folder `path`. Returns what each engine makes of them.

    format    "peft": a PEFT adapter with a model card; "merged": the base model with the deltas
              added in float32 and rounded once, by its `save_pretrained`
    base_id   the base model that loaders should look for; None is the one its config names
    dtype     of A and B in the PEFT file: "float32" (None), "bfloat16" or "float16"
    padded    of the PEFT file: True gives every target one rank, which every engine takes; False
              each its own, and leaves out targets without an adapter; where all are equal, every
              engine scales them right
    engines   these have to take the file, or nothing is written; None is PEFT alone
    push_to_hub, private, token
              the repository "user/name" of the Hugging Face Hub that gets the PEFT folder, made
              where there is none; see `hub.push`

    The folder's model card, README.md, is extended where there is one: what stands outside our
    marks stays, and so do its metadata.

    The model stays as it is, bit for bit. Raises ValueError for what the format cannot hold, and
    with the engine's name and reason for what a named engine refuses.
    """
    bank_of(model)
    if private and push_to_hub is None:
        raise ValueError("private is of push_to_hub, which names the repository")
    if format == "merged" and push_to_hub is not None:
        raise ValueError(
            "push_to_hub is of the PEFT format: export the merged model into a folder, and "
            "upload that (hf upload user/name folder)"
        )
    verdicts = write(
        model, path, format, base_id=base_id, dtype=dtype, padded=padded, engines=engines
    )
    refusals = [f"{v.engine} cannot take it ({v.reason})" for v in verdicts if not v.ok]
    if refusals and writes(model):
        _log.warning("%s: %s", path, "; ".join(refusals))
    if push_to_hub is not None and writes(model):
        sent = push(Path(path), push_to_hub, private=private, token=token)
        _log.info("pushed to %s", sent)
    return verdicts


def write(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "peft",
    *,
    base_id: str | None = None,
    dtype: str | None = None,
    padded: bool = True,
    engines: Sequence[str] | None = None,
    restore: bool = True,
) -> list[EngineVerdict]:
    """The folder of `export`, which tells about it; the same arguments and errors.

    restore   False leaves a model that is written as "merged" with merged weights: no second copy
              of them is held
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: choose one of {', '.join(FORMATS)}")
    if format == "merged" and (dtype is not None or engines is not None or not padded):
        raise ValueError(
            "dtype, engines and padded are of the PEFT format: a merged model is plain"
        )
    folder = Path(path)
    _require_not_base(model, folder)
    with injected(model) as own:
        tell_untouched(own)
        adapters = adapters_of(own)
        if format == "merged":
            if any(map(is_sharded, own.parameters())):  # on every rank
                raise ValueError(
                    "the weights are sharded (DTensors), so no rank has them whole to merge: "
                    "export as PEFT, or loradrop.save the adapters, loradrop.load them into a "
                    "model that is not sharded, and merge there"
                )
            if is_first_rank():  # elsewhere save_pretrained writes nothing
                save_merged(own, folder, restore)
            return []
        if holds_weights(folder):
            raise ValueError(
                f"{folder} holds a model, on which the adapter would be loaded: choose another"
            )
        if holds_other(folder, adapters):
            raise ValueError(
                f"{folder} holds another adapter in loradrop's own format, which loradrop.load "
                "would read instead of this one: choose another folder, or save this one there "
                "first with loradrop.save"
            )
        tell_untrained(own)
        file = peft_file_of(own, adapters, dtype=dtype, base_id=base_id, padded=padded)
        verdicts = verdicts_on(file, engines)
        if not writes(own):
            return verdicts
        _write(folder, file, card_of(own, adapters.plan, file, verdicts))
    return verdicts


def require_exportable(model: nn.Module, instead: str) -> None:
    """Raises ValueError where PEFT's format cannot hold the adapters of `model`, with what to do
    `instead`, and where PEFT would not load them.
    """
    how: dict[str, Any] = {"dtype": None, "base_id": None, "padded": False, "instead": instead}
    with injected(model) as own:
        verdicts_on(peft_file_of(own, adapters_of(own), **how), None)


def _require_not_base(model: nn.Module, folder: Path) -> None:
    """Raises ValueError for the folder that the base model was loaded from: it would be changed."""
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    if source and folder.is_dir() and Path(source).is_dir() and folder.samefile(source):
        raise ValueError(f"{folder} is the base model's own folder: choose another")


def _write(folder: Path, file: PeftFile, card: str) -> None:
    """The folder of an adapter; its configuration last, as without it a folder is no adapter."""
    place = folder / CARD
    if place.exists():
        card = extended(place.read_text(encoding="utf-8"), card)
    (folder / CONFIG).unlink(missing_ok=True)
    write_tensors(folder / TENSORS, file.tensors, {"format": "pt"})
    write_text(place, card)
    write_json(folder / CONFIG, file.config)
    if read_json(folder / CONFIG) != file.config:
        raise OSError(f"{folder / CONFIG} does not hold what was written into it: check the disk")


def verdicts_on(file: PeftFile, engines: Sequence[str] | None) -> list[EngineVerdict]:
    """What each engine makes of a file. Raises ValueError where one of `engines` (None: PEFT)
    refuses it, with its reason.
    """
    verdicts = [refusal(engine, file) for engine in ENGINES]
    must = required(file, engines)
    for verdict in verdicts:
        if not verdict.ok and verdict.engine in must:
            raise ValueError(f"{verdict.engine} cannot take this adapter: {verdict.reason}")
    return verdicts


def peft_file_of(
    model: nn.Module,
    adapters: Adapters,
    *,
    dtype: str | None,
    base_id: str | None,
    padded: bool,
    device: torch.device | str = "cpu",
    instead: str = MERGED,
) -> PeftFile:
    """The adapters as a PEFT file, its tensors new ones on `device`; the options of `export`.

    Of a model that FSDP2 shards, every rank has to call it. Raises ValueError for values that are
    not finite or offloaded, and for what the file cannot hold, with what to do `instead`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    targets = adapters.plan.targets
    ranks = {
        target.name: 0 if pair is None else pair[0].shape[0]
        for target, pair in zip(targets, adapters.factors, strict=True)
    }
    held = ranks_in_file(ranks, padded)
    if not held:
        raise ValueError(f"no target has an adapter: export with padded=True, or {instead}")
    layout = layout_of(model, adapters, list(held), instead)
    tensors = _pairs_in_file(adapters, held, DTYPES[dtype or "float32"], device)
    tensors |= _trained_whole(model, layout.saved_tensors, device)
    one = len(set(held.values())) == 1
    r = max(held.values()) if one else padded_rank(ranks)
    named, revision = _base_named(model, adapters, base_id)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": layout.task,
        "base_model_name_or_path": named,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": adapters.plan.config.lora_dropout,
        "target_modules": layout.target_modules,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(t.name)) for t in targets),
        "modules_to_save": layout.modules_to_save or None,
        "init_lora_weights": True,
    }
    if not one:
        pattern = as_pattern(held)
        config |= {"rank_pattern": pattern, "alpha_pattern": pattern}
    if revision is not None:
        config["revision"] = revision
    return PeftFile(config, tensors, configuration_of(model), model, instead)


def _pairs_in_file(
    adapters: Adapters, held: Mapping[str, int], dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Key -> A (r, K) or s·B (N, r) of each target in `held`, with zeros up to the rank r there.

    Raises ValueError for values that are not finite.
    """
    tensors: dict[str, Tensor] = {}
    for target, s, pair in zip(
        adapters.plan.targets, adapters.scaling, adapters.factors, strict=True
    ):
        if target.name not in held:
            continue
        r = held[target.name]
        A = torch.zeros(r, target.in_features, dtype=dtype, device=device)
        B = torch.zeros(target.out_features, r, dtype=dtype, device=device)
        if pair is not None:  # one without stays zero: SGLang wants q and v in every layer
            a, b = (factor.to(device) for factor in pair)
            b = s * b.to(torch.promote_types(b.dtype, torch.float32))
            A[: a.shape[0]], B[:, : a.shape[0]] = a, b
        for name, factor in (("A", A), ("B", B)):
            if not factor.isfinite().all():
                raise ValueError(
                    f"{name} of {target.name} is not finite in {factor.dtype}: its training "
                    "diverged, or the dtype is too narrow. Train again, or choose dtype='float32'"
                )
            tensors[f"{PREFIX}{target.name}.lora_{name}.weight"] = factor
    return tensors


def _trained_whole(
    model: nn.Module, names: Sequence[str], device: torch.device | str
) -> dict[str, Tensor]:
    """Key -> a copy of each of these tensors. Raises ValueError for one that is offloaded."""
    own = tensors_of(model)
    require_loaded({name: own[name] for name in names})
    return {
        PREFIX + name: full_tensor(own[name].detach()).to(device, copy=True).contiguous()
        for name in names
    }


def _base_named(
    model: nn.Module, adapters: Adapters, base_id: str | None
) -> tuple[str | None, str | None]:
    """(the base model's id, its revision), by the model or else by the plan."""
    bases = base_of(model), adapters.plan.base
    named = base_id or bases[0]["id"] or None
    revisions = [base.get("revision") for base in bases if base.get("id") == named]
    return named, next((of for of in revisions if of is not None), None)
