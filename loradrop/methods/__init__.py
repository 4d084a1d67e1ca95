"""Methods that compose (A_i, B_i). A module in this folder is found without being registered."""

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from loradrop.methods.base import Method
from loradrop.methods.lora import LoRA
from loradrop.methods.lora_drop import LoRADrop
from loradrop.methods.spectral import Spectral

__all__ = ["LoRA", "LoRADrop", "Method", "Spectral", "available", "get"]


@functools.cache
def available() -> Mapping[str, type[Method]]:
    """Every method by its name: of this folder's modules, then of other packages' entry points."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        members = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        for member in members:
            if isinstance(member, type) and issubclass(member, Method) and member.name:
                found[member.name] = member
    for entry in importlib.metadata.entry_points(group="loradrop.methods"):
        method = entry.load()
        found.setdefault(method.name, method)
    return MappingProxyType(dict(sorted(found.items())))


def get(name: str) -> type[Method]:
    """The method class of that name, one of your own too where its module was imported.

    Raises ValueError with the names that there are.
    """
    found = available().get(name) or _imported(name)
    if found is None:
        raise ValueError(
            f"method {name!r} is unknown: choose one of {', '.join(available())}. One of your own "
            "is found once its module is imported, or by an entry point of the group "
            "loradrop.methods"
        )
    return found


def _imported(name: str) -> type[Method] | None:
    classes = [Method]
    for kind in classes:  # which grows
        classes += kind.__subclasses__()
    return next((kind for kind in reversed(classes) if vars(kind).get("name") == name), None)


def require_own_name(method: Method) -> None:
    """Raises ValueError where another class has its name: files name a method by that alone."""
    kind = type(method)
    if kind.__module__.startswith(f"{__name__}."):
        return
    known = available().get(kind.name)
    if known not in (None, kind):
        raise ValueError(
            f"{kind.__qualname__}.name is {kind.name!r}, which {known.__module__} has: a saved "
            "adapter would be read as that one's. Give it another name"
        )
