"""The merged model as its `save_pretrained` writes it, read back before it counts."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from loradrop.bank import bank_of
from loradrop.files import clear_drafts, replacing
from loradrop.formats.peft_file import CONFIG, base_state, configuration_of
from loradrop.injection import injection_of
from loradrop.merging import changes, tell
from loradrop.native import TENSORS
from loradrop.quantised import kept, put
from loradrop.save_pretrained import without_bank
from loradrop.tensor_file import same
from loradrop.wrapped import bare

_DRAFT = ".merged-"  # how the name of the folder begins that becomes the model


def holds_weights(folder: Path) -> bool:
    """Whether there are weights of a whole model."""
    return any(any(folder.glob(name)) for name in ("model*.safetensors", "pytorch_model*.bin"))


@torch.no_grad()
def save_merged(model: nn.Module, folder: Path, restore: bool = True) -> None:
    """Write the model with its deltas added into `folder`; it stays as it is, bit for bit. Without
    `restore` its weights are merged afterwards, and no second copy of them is held meanwhile.

    Raises ValueError for a model without `save_pretrained`, or whose one writes other weights, and
    for a folder that holds an adapter.
    """
    save_pretrained = getattr(type(model), "save_pretrained", None)
    if save_pretrained is None:
        raise ValueError(
            f"{type(model).__name__} has no save_pretrained, which the merged format needs: call "
            "loradrop.merge(model) and save its state_dict"
        )
    if (folder / CONFIG).exists() or (folder / TENSORS).exists():
        raise ValueError(f"{folder} holds an adapter, which would be loaded on top: choose another")
    targets = [f"{target.name}.weight" for target in bank_of(model).targets]
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_DRAFT}*"):  # a whole model, of a merge that was killed
        shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(prefix=_DRAFT, dir=folder) as draft,
        _merged_for_now(model, restore),
        without_bank(model),
        bare(model),
    ):
        try:
            save_pretrained(model, draft)
        except NotImplementedError:
            if getattr(model, "_weight_conversions", None) is None:
                raise
            # transformers cannot undo what it did as it read a checkpoint that was quantised.
            save_pretrained(model, draft, save_original_format=False)
        state = base_state(model)
        weights = {key: state[key] for key in targets}
        written = _require_written(Path(draft), weights, model)
        _require_apart(written, state, model)
        files = [file for file in Path(draft).rglob("*") if file.is_file()]
        new = {file: folder / file.relative_to(draft) for file in files}
        wholes, places = set(map(_whole, new.values())), {place.parent for place in new.values()}
        for old in [old for place in places for old in place.glob("*.safetensors*")]:
            if _whole(old) in wholes:  # of a save in more or fewer parts
                old.unlink()
        for file in sorted(files, key=lambda file: file.name == "config.json"):
            with replacing(new[file]) as place:
                os.replace(file, place)
        for place in places:
            clear_drafts(place, {file.name for file in new.values()})


def _whole(file: Path) -> Path:
    """The name that a part of a save, or the index of its parts, would have as a whole."""
    part = r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?$"
    return file.with_name(re.sub(part, ".safetensors", file.name))


@contextmanager
def _merged_for_now(model: nn.Module, restore: bool) -> Iterator[None]:
    """Inside, the weights have the deltas added; afterwards they are as before, bit for bit, but
    without `restore`.

    In place, since many a `save_pretrained` takes no state dict, or takes and ignores it. What the
    weights were is on the CPU meanwhile.
    """
    before, errors = [], {}
    try:
        for change in changes(model) if injection_of(model).merged is None else ():
            if restore:
                before.append((change.module, kept(change.stored, "cpu")))
            put(change.module, change.new)
            if change.error is not None:
                errors[change.name] = change.error
        tell(errors)
        yield
    finally:
        for module, stored in before:
            put(module, stored)


def _parts(weight: Any) -> list[Tensor]:
    """The weight, or the tensors that make one of a type of its own, as a file holds them."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def _require_written(folder: Path, weights: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """The names of what was saved. Raises ValueError unless each of the weights reads back."""
    files = map(load_file, folder.rglob("*.safetensors"))
    written = [pair for file in files for pair in file.items()]

    def holds(key: str, weight: Tensor) -> bool:
        # A class may rename tensors as it saves them, and packed weights may read as NaN.
        places = [t for name, t in written if name == key] or [t for _, t in written]
        parts = _parts(weight.cpu())
        return all(any(torch.equal(part, t) or same(part, t) for t in places) for part in parts)

    held = all(holds(key, weight) for key, weight in weights.items())
    if not held and not _loads_back(folder, weights, model):
        raise ValueError(
            f"the save_pretrained of {type(model).__name__} does not write the weights it is "
            "given, so the file would be the base model without its adapters: call "
            "loradrop.merge(model), and save the model that this leaves"
        )
    return {name for name, _ in written}


def _require_apart(written: Set[str], state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises ValueError where what is `written` leaves out a tensor that `from_pretrained` ties to
    another one, and here the two differ: one was trained apart.
    """
    ties: Any = getattr(model, "_tied_weights_keys", None)
    for key, source in ties.items() if isinstance(ties, Mapping) else ():
        end = ".".join(key.split(".")[-2:])  # a class may rename what is around it as it saves
        if any(name.endswith(end) for name in written) or not {key, source} <= state.keys():
            continue
        if not same(state[key], state[source]):
            raise ValueError(
                f"the save_pretrained of {type(model).__name__} leaves out {key}, which would be "
                f"{source} when it is loaded, and they are trained apart here: loradrop.save the "
                "adapters, or export them as PEFT"
            )


def _loads_back(folder: Path, weights: Mapping[str, Tensor], model: Any) -> bool:
    """Whether transformers loads these weights: it may fuse some as it saves, and split them again.

    A second model, so it is asked only where a weight is not in the file itself.
    """
    if not configuration_of(model) or not hasattr(type(model), "from_pretrained"):
        return False
    with torch.random.fork_rng():
        found = base_state(type(model).from_pretrained(folder, dtype="auto"))
    there = {key: found[key] for key in weights if key in found}
    return there.keys() == weights.keys() and all(
        same(t, weights[key].cpu()) for key, t in there.items()
    )
