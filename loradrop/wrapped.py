"""What others put around a model or its parts: torch.compile, DDP, activation checkpointing.

A wrapper adds a name to the path of everything inside it. Adapters, files and plans go by the names
of the model alone.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import Tensor, nn

_AROUND = re.compile(r"(^|\.)(_checkpoint_wrapped_module|_orig_mod)(?=\.|$)")
_AROUND_ALL = {  # class -> what it calls the model inside
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
_FSDP1 = "FullyShardedDataParallel"
Verb = TypeVar("Verb", bound=Callable[..., Any])


def inner(model: nn.Module) -> nn.Module:
    """The model that torch.compile, DDP and the like were given; any other one itself."""
    while (name := _AROUND_ALL.get(type(model).__name__)) is not None:
        model = getattr(model, name)
    return model


def of_inner(verb: Verb) -> Verb:
    """Decorates a function of a model: it gets the model inside of torch.compile, DDP and the like.

    It raises ValueError for a model under FSDP1, and, once it is done, where DDP does not know what
    it made.
    """

    @functools.wraps(verb)
    def of_model(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = inner(model)
        if any(type(part).__name__ == _FSDP1 for part in (model, *own.modules())):
            raise ValueError(
                f"{verb.__name__}: the model is under FSDP1 (FullyShardedDataParallel), whose flat "
                "parameters hold the adapters. Do this before it is wrapped; to save what was "
                "trained, load its full state dict (FSDP.state_dict_type) into a model that is "
                "injected likewise. FSDP2 (fully_shard) is served"
            )
        before = _trained(own) if _in_ddp(model) else None
        result = verb(own, *args, **kwargs)
        if before is not None and not _trained(own) <= before:
            raise ValueError(
                f"{verb.__name__} is done, and made parameters that DistributedDataParallel does "
                "not know, so that every rank would train its own: wrap the model inside again, "
                "and make the optimiser anew"
            )
        return result

    return cast(Verb, of_model)


def _in_ddp(model: nn.Module) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel)


def _trained(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in model.parameters() if parameter.requires_grad}


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Inside, parts of the model have nothing around them that renames what a library saves."""
    around = [
        (module, name, part)
        for module in model.modules()
        for name, part in module._modules.items()
        if part is not None and inner(part) is not part
    ]
    for module, name, part in around:
        module._modules[name] = inner(part)
    try:
        yield
    finally:
        for module, name, part in around:
            module._modules[name] = part


def own_name(name: str) -> str:
    """The name without the wrappers in its path."""
    return _AROUND.sub("", name).removeprefix(".")


def modules_of(model: nn.Module, *, once: bool = True) -> dict[str, nn.Module]:
    """Name -> module, the inner one of a wrapper. once: a module with several names has its first
    one.
    """
    found = model.named_modules(remove_duplicate=once)
    return {own_name(name): module for name, module in found}


def tensors_of(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """The model's state dict by its own names."""
    state: dict[str, Any] = model.state_dict(keep_vars=keep_vars)
    return {own_name(name): tensor for name, tensor in state.items()}


def embedding_of(model: nn.Module) -> nn.Module | None:
    """The embedding of the input's tokens; None where transformers knows of none."""
    try:
        found: nn.Module | None = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    return found


def embedding_names(model: nn.Module) -> list[str]:
    """The names of its weight, also those of what is tied to it."""
    weight = getattr(embedding_of(model), "weight", None)
    return [name for name, t in tensors_of(model, keep_vars=True).items() if t is weight]


def names_by_tensor(state: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """The id of each tensor -> its names: several where it is tied."""
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return names


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter."""
    return {own_name(name): parameter for name, parameter in model.named_parameters()}
