"""`model.save_pretrained` of an injected model and of its parts, as the Trainer calls it, too."""

import inspect
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loradrop.adapters import Adapters
from loradrop.bank import bank_of
from loradrop.extra_state import ALONE, STATE
from loradrop.injection import injection_of, plan_of, require_adapted, trained_since
from loradrop.native import FOLDER, save, write
from loradrop.ranks import full_tensor, is_sharded
from loradrop.remarks import unmeasured
from loradrop.tensor_file import write_tensors

CHECKPOINT = "model.safetensors"  # where the Trainer looks for what it saved
_log = logging.getLogger(__name__)


class _Bound:
    """A method of one module that does not keep it alive, as an attribute of the module itself. Its
    copies and pickles are of the module's.

    more   what else it was made with
    """

    def __init__(self, module: nn.Module, *more: Any) -> None:
        self._module, self.more = weakref.ref(module), more

    @property
    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError("the model that this would save is gone: keep a reference to it")
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Bound":
        return type(self)(memo.get(id(self.module), self.module), *self.more)

    def __reduce__(self) -> Any:
        return type(self), (self.module, *self.more)


class SavePretrained(_Bound):
    """`save_pretrained` of an injected model: the base model, and its adapters in a folder.

    In a folder that is named as the Trainer's checkpoints are, checkpoint-<step>, it writes what is
    trained alone: the frozen base is there already where a run resumes. It is made with the
    `save_pretrained` that the instance had of its own, if any, which writes the base then.
    """

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As `PreTrainedModel.save_pretrained`, with the adapters in `loradrop_adapter/`.

        With `push_to_hub` all of that is pushed, too. Raises ValueError while the adapters are
        merged and, once all is written, for a method that wants a warm-up and trained without one.
        """
        folder, model = Path(save_directory), self.module
        if kwargs.pop("push_to_hub", False):
            return self._pushed(folder, kwargs)
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
        with without_bank(model):
            result = self._save_base(folder, **kwargs)
        _save_given(model, folder / FOLDER, state)
        _log.warning(
            "%s holds the base model, and its adapters in %s: what from_pretrained loads from it "
            "lacks them until loradrop.load(model, %r)", folder, FOLDER, str(folder),
        )  # fmt: skip
        _require_measured(model)
        return result

    @property
    def own(self) -> Callable[..., Any] | None:
        """What the instance had of its own."""
        return self.more[0] if self.more else None

    def _save_base(self, folder: Path, **kwargs: Any) -> Any:
        if self.own is not None:
            return self.own(folder, **kwargs)
        kind: Any = type(self.module)
        return kind.save_pretrained(self.module, folder, **kwargs)

    def _pushed(self, folder: Path, kwargs: dict[str, Any]) -> Any:
        """Saves, and pushes by the model's own method, which saves once more by this one: that of
        transformers would push what is there before the adapters are.
        """
        model: Any = self.module
        takes = inspect.signature(model.push_to_hub).parameters.keys() - {"repo_id"}
        of_hub = {name: kwargs.pop(name) for name in (*kwargs,) if name in takes}
        shards = {name: of_hub[name] for name in ("max_shard_size",) if name in of_hub}
        repository = kwargs.pop("repo_id", folder.name)
        result = self(folder, **kwargs, **shards)
        if kwargs.get("is_main_process", True):
            model.push_to_hub(repository, **of_hub)
        return result


class SavePart(_Bound):
    """`save_pretrained` of a part of an injected model, which does not hold the adapters; it is
    made with its name.
    """

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As `PreTrainedModel.save_pretrained`, and says what it leaves out."""
        _log.warning(
            "%s holds the base weights of %s alone: the adapters are of the whole model. Call "
            "loradrop.save(model, folder), or loradrop.merge(model) first",
            save_directory, self.more[0],
        )  # fmt: skip
        kind: Any = type(self.module)
        return kind.save_pretrained(self.module, save_directory, **kwargs)


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
