"""Methods that compose (A_i, B_i). A module in this folder is found without being registered."""

import functools
import importlib
import importlib.metadata
import logging
import pkgutil
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from loradrop.bank import AdapterBank
from loradrop.methods.base import Method
from loradrop.methods.lora import LoRA
from loradrop.methods.lora_drop import LoRADrop
from loradrop.methods.spectral import Spectral
from loradrop.scores import Target

_log = logging.getLogger(__name__)

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
        if (method := _loaded(entry, found)) is not None:
            found[method.name] = method
    return MappingProxyType(dict(sorted(found.items())))


def _loaded(entry: Any, known: Mapping[str, type[Method]]) -> type[Method] | None:
    """The method of an entry point; None, and a warning, for one that cannot be taken."""
    try:
        method = entry.load()
    except Exception as error:  # whatever the module of another package raises
        why = f"it cannot be loaded ({type(error).__name__}: {error})"
    else:
        if isinstance(method, type) and issubclass(method, Method) and method.name:
            if known.get(method.name, method) is method:
                return method
            why = f"the name {method.name!r} is {known[method.name].__module__}'s"
        else:
            why = f"{method!r} is not a subclass of loradrop.Method with a name"
    package = getattr(entry.dist, "name", "?")
    _log.warning("the method %r of the package %s is left out: %s", entry.name, package, why)
    return None


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
    return next(reversed(_named(name)), None)


def _named(name: str) -> list[type[Method]]:
    """Every class with that name of its own, in the order in which they were made."""
    classes = [Method]
    for kind in classes:  # which grows
        classes += kind.__subclasses__()
    return [kind for kind in classes[1:] if vars(kind).get("name") == name]


def require_own_name(method: Method) -> None:
    """Raises ValueError where it has no name, or another class has it: files name a method by that
    alone. A class that is defined again, as in a notebook, is the same one.
    """
    kind = type(method)
    if kind.__module__.startswith(f"{__name__}."):
        return
    if not kind.name:
        raise ValueError(
            f"{kind.__qualname__} has no name, and files name a method by it: give it one, as in "
            f'name: ClassVar[str] = "{kind.__name__.lower()}"'
        )
    known = available().get(kind.name)
    others = (of for of in _named(kind.name) if _place(of) != _place(kind))
    known = next(others, None) if known in (None, kind) else known
    if known not in (None, kind):
        raise ValueError(
            f"{kind.__qualname__}.name is {kind.name!r}, which {known.__module__} has: a saved "
            "adapter would be read as that one's. Give it another name"
        )


def require_bank(method: Method, bank: Any, targets: Sequence[Target]) -> None:
    """Raises TypeError or ValueError for what a method of somebody else's made that is no bank for
    these targets.
    """
    kind = type(method)
    if kind.__module__.startswith(f"{__name__}."):
        return
    made = f"bank() of {kind.__qualname__} returned"
    if not isinstance(bank, AdapterBank):
        raise TypeError(f"{made} {bank!r}: return a loradrop.AdapterBank")
    names, wanted = ([target.name for target in of] for of in (bank.targets, targets))
    if names != wanted:
        raise ValueError(f"{made} a bank for {names}: make it for {wanted}, in this order")
    for i, target in enumerate(bank.targets):
        if (factors := bank.factors(i)) is None:
            continue
        A, B = (tuple(factor.shape) for factor in factors)
        r = A[0]
        if ((r, target.in_features), (target.out_features, r)) != (A, B):
            raise ValueError(
                f"{made} a bank whose factors({i}), of {target.name}, are A {A} and B {B}: make A "
                f"(r, {target.in_features}) and B ({target.out_features}, r)"
            )


def _place(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__
