"""Which values an option takes, and in what words to ask for another."""

import dataclasses
import math
import numbers
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

_PLAIN: dict[Any, str] = {
    **{int: "a whole number", float: "a number", bool: "True or False", str: "text"},
    **{tuple[int, ...]: "a list of whole numbers", tuple[float, ...]: "a list of numbers"},
    tuple[str, ...]: "a list of texts",
    types.NoneType: "None",
}
_OF_YAML: dict[Any, str] = {
    **_PLAIN,
    **{Sequence: "a list", list: "a list", Mapping: "a section", dict: "a section"},
    **{bool: "true or false", types.NoneType: "null"},
}


def check_one(given: Mapping[str, Any]) -> None:
    """Raises ValueError unless exactly one of the options is not None."""
    named = [f"{name}={value}" for name, value in given.items() if value is not None]
    if len(named) != 1:
        got = ", ".join(named) or "none"
        raise ValueError(f"give exactly one of {', '.join(given)}; got {got}")


def at_least(part: float) -> str:
    """A part in words, rounded up, so that who gives just that gives enough."""
    return f"{math.ceil(part * 1e4) / 1e4:g}"


def check_part(name: str, value: float | None) -> None:
    """Raises ValueError unless the option is None or in [0, 1]."""
    if value is not None and not (is_number(value) and 0.0 <= value <= 1.0):
        raise ValueError(f"{name}={value!r}: choose a number in [0, 1]")


def is_number(value: Any) -> bool:
    """Whether it is a number of Python's, NumPy's or torch's."""
    return isinstance(plain(value), numbers.Real) and not isinstance(value, bool)


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raises ValueError unless the option is one of the known."""
    if value not in known:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}")


def check_whole(name: str, value: int | None, least: int, *, or_none: bool = False) -> None:
    """Raises ValueError unless the option is a whole number from `least` up, or None if it may."""
    value = plain(value)
    if value is None and or_none:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        more = ", or None" if or_none else ""
        raise ValueError(f"{name}={value!r}: choose a whole number from {least} up{more}")


def check_start(name: str, value: float) -> None:
    """Raises ValueError unless the option, what a vector starts from, is finite and not 0."""
    if not value or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: choose a finite number other than 0")


def check_steps_or_part(name: str, value: float) -> None:
    """Raises ValueError unless the option is a part of all steps, or a number of steps."""
    if not 0 < value < math.inf or (value >= 1 and value != int(value)):
        raise ValueError(
            f"{name}={value}: choose a part of all steps in (0, 1), or a whole number of steps"
        )


def check_kinds(options: Any) -> None:
    """Raises ValueError for a field of a dataclass whose value is not of the kind that its
    annotation names, with what to give.

    Looked at are fields that hold bool, int, float, str, None, tuples of numbers or of texts, or
    one of these.
    In them numbers of NumPy and torch become Python's, and lists become tuples.
    """
    for name, hint in hints_of(type(options)).items():
        if not _PLAIN.keys() >= {*kinds_in(hint)}:
            continue
        given = getattr(options, name)
        value = plain(given)
        if (wanted := missed(value, hint, _PLAIN)) is not None:
            raise ValueError(f"{name}={given!r}: give {wanted}")
        object.__setattr__(options, name, value)


def check_sizes(options: Any) -> None:
    """Raises ValueError for a field of a dataclass with a whole number beyond 64 bits, which is
    neither a seed nor a size.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"{field.name}={value!r}: choose a whole number of 64 bits")


def missed(value: Any, hint: Any, names: Mapping[Any, str] = _OF_YAML) -> str | None:
    """What to give in place of a value that is of no kind that the annotation names, in words;
    None for one that is.
    """
    kinds = kinds_in(hint)
    fit = any(kind not in names or _fits(value, kind) for kind in kinds)
    return None if fit else " or ".join(names[kind] for kind in kinds)


def kinds_in(hint: Any) -> list[Any]:
    """The types of a union, without their parameters but for tuples of numbers or texts."""
    union = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint]
    return [kind if kind in _PLAIN else get_origin(kind) or kind for kind in union]


def _fits(value: Any, kind: Any) -> bool:
    for narrow in (bool, str):  # which are an int and a Sequence, too
        if isinstance(value, narrow):
            return kind is narrow
    if get_origin(kind) is tuple:
        of = get_args(kind)[0]
        return isinstance(value, (list, tuple)) and all(_fits(part, of) for part in value)
    return isinstance(value, (int, float) if kind is float else kind)


def plain(value: Any) -> Any:
    """Python's own values for those of NumPy and torch, and tuples for lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def hints_of(cls: Any) -> dict[str, Any]:
    """The annotation of each field, as it is written where not all of them can be resolved, as one
    that only a type checker imports.
    """
    try:
        found = get_type_hints(cls)
    except Exception:
        found = {}
    return {field.name: found.get(field.name, field.type) for field in dataclasses.fields(cls)}
