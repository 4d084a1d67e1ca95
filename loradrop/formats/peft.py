"""Writing adapters for others: a PEFT folder that every engine scales alike, or the merged model.

Every target has an A and B of its own, with its true scale folded into B in float32. A padded file
gives all of them one rank, by zeros, and lora_alpha = r: so lora_alpha / r = 1 for an engine that
reads patterns and rslora, and for one that does not. A file that is not padded is smaller, and says
each rank in `rank_pattern` and the same number in `alpha_pattern`.
"""

import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from loradrop._version import __version__
from loradrop.bank import bank_of
from loradrop.files import read_json, rendered, replacing, write_json, write_text
from loradrop.formats.engines import ENGINES, EngineVerdict, refusal
from loradrop.formats.peft_file import (
    CONFIG,
    PREFIX,
    TENSORS,
    PeftFile,
    base_state,
    configuration_of,
    layout_of,
    task_of,
)
from loradrop.injection import Adapters, adapters_of, base_of, injection_of
from loradrop.layers import is_conv1d
from loradrop.merging import changes, tell
from loradrop.native import without_bank
from loradrop.plan import Plan
from loradrop.quantised import kept, put
from loradrop.ranks import whole, writes
from loradrop.tensor_file import write_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = ("peft", "merged")
_log = logging.getLogger(__name__)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "peft",
    base_id: str | None = None,
    *,
    dtype: str | None = None,
    padded: bool = True,
    engines: Sequence[str] | None = None,
) -> list[EngineVerdict]:
    """Write the adapters of `model` into the folder `path`. Returns what each engine makes of them.

    format    "peft": a PEFT adapter with a model card; "merged": the base model with the deltas
              added in float32 and rounded once, by its `save_pretrained`
    base_id   the base model that loaders should look for; None is the one its config names
    dtype     of A and B in the PEFT file: "float32" (None), "bfloat16" or "float16"
    padded    of the PEFT file: True gives every target one rank, which every engine takes; False
              each its own, and leaves out targets without an adapter
    engines   these have to take the file, or nothing is written; None is PEFT alone

    The model stays as it is, bit for bit. Raises ValueError for what the format cannot hold, and
    with the engine's name and reason for what a named engine refuses.
    """
    adapters = adapters_of(model)
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: choose one of {', '.join(FORMATS)}")
    if format == "merged":
        if dtype is not None or engines is not None or not padded:
            raise ValueError(
                "dtype, engines and padded are of the PEFT format: a merged model is plain"
            )
        _save_merged(model, Path(path))
        return []
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    file = _peft_file(model, adapters, DTYPES[dtype or "float32"], base_id, padded)
    verdicts = [refusal(engine, file) for engine in ENGINES]
    required = [refusal(engine, file).engine for engine in engines or ENGINES[:1]]
    for verdict in verdicts:
        if not verdict.ok and verdict.engine in required:
            raise ValueError(f"{verdict.engine} cannot take this adapter: {verdict.reason}")
    folder = Path(path)
    if not writes(model):
        return verdicts
    (folder / CONFIG).unlink(missing_ok=True)  # written last: without it a folder is no adapter
    write_tensors(folder / TENSORS, file.tensors, {"format": "pt"})
    write_text(folder / "README.md", _card(model, adapters.plan, file, verdicts))
    write_json(folder / CONFIG, file.config)
    if read_json(folder / CONFIG) != file.config:
        raise OSError(f"{folder / CONFIG} does not hold what was written into it: check the disk")
    refusals = [f"{v.engine} cannot take it ({v.reason})" for v in verdicts if not v.ok]
    if refusals:
        _log.warning("%s: %s", folder, "; ".join(refusals))
    return verdicts


def _peft_file(
    model: nn.Module, adapters: Adapters, dtype: torch.dtype, base_id: str | None, padded: bool
) -> PeftFile:
    targets = adapters.plan.targets
    ranks = {
        target.name: 0 if pair is None else pair[0].shape[0]
        for target, pair in zip(targets, adapters.factors, strict=True)
    }
    own = {} if padded else {name: rank for name, rank in ranks.items() if rank}
    if not padded and not own:
        raise ValueError("no target has an adapter: export with padded=True, or format='merged'")
    layout = layout_of(model, adapters, list(own) or list(ranks))
    r = max(8, 1 << (max(1, *ranks.values()) - 1).bit_length())  # a power of two, as vLLM wants it
    tensors: dict[str, Tensor] = {}
    for target, s, pair in zip(targets, adapters.scaling, adapters.factors, strict=True):
        if own and target.name not in own:
            continue
        width = own.get(target.name, r)
        A = torch.zeros(width, target.in_features, dtype=dtype)
        B = torch.zeros(target.out_features, width, dtype=dtype)
        if pair is not None:  # one without stays zero: SGLang wants q and v in every layer
            a, b = (factor.cpu() for factor in pair)
            b = s * b.to(torch.promote_types(b.dtype, torch.float32))
            A[: a.shape[0]], B[:, : a.shape[0]] = a, b
        for name, factor in (("A", A), ("B", B)):
            if not factor.isfinite().all():
                raise ValueError(
                    f"{name} of {target.name} is not finite in {dtype}: its training diverged, "
                    "or the dtype is too narrow. Train again, or choose dtype='float32'"
                )
            tensors[f"{PREFIX}{target.name}.lora_{name}.weight"] = factor
    base = model.state_dict()
    for key in layout.saved_tensors:
        tensors[PREFIX + key] = whole(base[key].detach()).cpu().contiguous().clone()
    config = {
        "peft_type": "LORA",
        "task_type": layout.task,
        "base_model_name_or_path": base_id or base_of(model)["id"] or None,
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
    if own:
        config |= {"rank_pattern": own, "alpha_pattern": own}
    return PeftFile(config, tensors, configuration_of(model))


def _card(model: nn.Module, plan: Plan, file: PeftFile, verdicts: list[EngineVerdict]) -> str:
    """The model card: what was kept and shared, how to use it, and what each engine says."""
    base = file.config["base_model_name_or_path"]
    public = base if base and not Path(base).exists() else None  # a folder means nothing elsewhere
    states = list(zip(plan.targets, plan.assignment.states, strict=True))
    kinds: dict[str, Counter[str]] = {}
    for target, state in states:
        kinds.setdefault(target.kind, Counter())[state] += 1
    loader = task_of(model)[1]
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    extra = f", num_labels={labels}" if labels and loader.endswith("Classification") else ""
    return rendered(
        "model_card.md",
        public=public,
        title=public or type(model).__name__,
        plan=plan,
        version=__version__,
        kinds=kinds,
        total=sum(kinds.values(), Counter()),
        own=[target.name for target, state in states if state == "own"],
        loader=loader,
        arguments=f"{public or 'path/to/the/base/model'!r}{extra}",
        rank=file.config["r"],
        verdicts=verdicts,
    )


@torch.no_grad()
def _save_merged(model: nn.Module, folder: Path) -> None:
    save_pretrained = getattr(type(model), "save_pretrained", None)
    if save_pretrained is None:
        raise ValueError(
            f"{type(model).__name__} has no save_pretrained, which the merged format needs: call "
            "loradrop.merge(model) and save its state_dict"
        )
    if (folder / CONFIG).exists():
        raise ValueError(f"{folder} holds an adapter, which would be loaded on top: choose another")
    targets = [f"{target.name}.weight" for target in bank_of(model).targets]
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".merged-", dir=folder) as draft,
        _merged_for_now(model),
        without_bank(model),
    ):
        save_pretrained(model, draft)
        state = base_state(model)
        weights = {key: state[key] for key in targets}
        _require_written(Path(draft), weights, type(model).__name__)
        files = [file for file in Path(draft).rglob("*") if file.is_file()]
        new = {file: folder / file.relative_to(draft) for file in files}
        wholes, places = set(map(_whole, new.values())), {place.parent for place in new.values()}
        for old in [old for place in places for old in place.glob("*.safetensors*")]:
            if _whole(old) in wholes:  # of a save in more or fewer parts
                old.unlink()
        for file in sorted(files, key=lambda file: file.name == "config.json"):
            with replacing(new[file]) as place:
                os.replace(file, place)


def _whole(file: Path) -> Path:
    """The name that a part of a save, or the index of its parts, would have as a whole."""
    part = r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?$"
    return file.with_name(re.sub(part, ".safetensors", file.name))


@contextmanager
def _merged_for_now(model: nn.Module) -> Iterator[None]:
    """Inside, the weights have the deltas added; afterwards they are as before, bit for bit.

    In place, since many a `save_pretrained` takes no state dict, or takes and ignores it.
    """
    merged = [] if injection_of(model).merged is not None else list(changes(model))
    tell({change.name: change.error for change in merged if change.error is not None})
    before = []
    try:
        while merged:
            change = merged.pop()  # so that no third copy of a weight is held
            before.append((change.module, kept(change.stored)))
            put(change.module, change.new)
        yield
    finally:
        for module, stored in before:
            put(module, stored)


def _parts(weight: Any) -> list[Tensor]:
    """The weight, or the tensors that make one of a type of its own, as a file holds them."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def _require_written(folder: Path, weights: Mapping[str, Tensor], model: str) -> None:
    """Reads back what was saved. Raises ValueError unless each of the weights is in it."""
    files = map(load_file, folder.rglob("*.safetensors"))
    written = [pair for file in files for pair in file.items()]
    for key, weight in weights.items():
        # A class may rename tensors as it saves them.
        places = [t for name, t in written if name == key] or [t for _, t in written]
        if not all(any(torch.equal(part, t) for t in places) for part in _parts(weight.cpu())):
            raise ValueError(
                f"the save_pretrained of {model} does not write the weights it is given, so the "
                "file would be the base model without its adapters: call loradrop.merge(model), "
                "and save the model that this leaves"
            )
