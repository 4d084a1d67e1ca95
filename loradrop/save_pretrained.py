"""`model.save_pretrained` of an injected model and of its parts, as the Trainer calls it, too."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loradrop.adapters import Adapters
from loradrop.bank import ALONE, STATE, bank_of
from loradrop.injection import injection_of, plan_of, require_adapted, trained_since
from loradrop.native import FOLDER, save, write
from loradrop.ranks import full_tensor, is_sharded
from loradrop.tensor_file import write_tensors
from loradrop.untouched import unmeasured

CHECKPOINT = "model.safetensors"  # where the Trainer looks for what it saved
_log = logging.getLogger(__name__)


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
                "the adapters are merged for now: loradrop.save(model, path) writes them, and "
                "loradrop.export(model, path, format='merged') the merged model"
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
    """`save_pretrained` of a part of an injected model, which does not hold the adapters."""

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
