"""Finding the modules to adapt: names, suffixes or a regex, and a table of what they matched."""

import functools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from loradrop.config import LoRAConfig, pattern_matches
from loradrop.layers import is_patched, shape_of
from loradrop.scores import layer_of

# Query and value projections under the names that transformers' models give them.
QUERY_VALUE = (
    *("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v"),
    *("c_attn", "query_key_value", "qkv_proj"),
)
# How the names of heads end where the model's class does not say what its head is.
HEADS = ("classifier", "score", "qa_outputs")
_TASK = re.compile(r"For(\w+Classification|QuestionAnswering|MultipleChoice)")
_log = logging.getLogger(__name__)

Matched = list[tuple[str, nn.Module]]


def find_targets(model: nn.Module, config: LoRAConfig) -> Matched:
    """The modules that `config` names, each once, in the model's order.

    Raises ValueError with a table of what matched, where an entry matches nothing, only some of the
    layers, a module that is not a linear map or whose forward is never called, or a tied weight.
    """
    heads = saved_modules(model, config)
    modules = {n: m for n, m in model.named_modules() if not any(inside(n, h) for h in heads)}
    linear = {name: m for name, m in modules.items() if shape_of(m) is not None}
    wanted = config.target_modules
    if wanted == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        names = {"all-linear": [name for name, m in linear.items() if m is not head]}
    elif isinstance(wanted, str):
        names = {wanted: [name for name in modules if re.fullmatch(wanted, name)]}
    elif wanted is None:
        names = {q: found for q in QUERY_VALUE if (found := _suffix(linear, q))}
        if not names:
            raise ValueError(
                f"target_modules=None found no query or value projection in {type(model).__name__}:"
                f" name the target modules. Its linear layers: {kinds_of(linear)}"
            )
    else:
        names = {entry: _suffix(modules, entry) for entry in wanted}
    excluded = _excluded(modules, config.exclude_modules)
    names = {entry: [n for n in found if n not in excluded] for entry, found in names.items()}
    chosen = {n for found in names.values() for n in found}
    if config.strict:
        _require_coverage(names, linear, excluded)
        _require_used(config, dict(model.named_modules()), chosen)
    if not chosen:
        known = f"Linear layers there are: {kinds_of(linear)}"
        raise ValueError(f"target_modules={wanted!r} matches no module. {known}")
    owners: dict[int, str] = {}
    for name in (name for name in modules if name in chosen):
        _require_adaptable(model, name, modules[name])
        other = owners.setdefault(id(getattr(modules[name], "weight", modules[name])), name)
        if other != name:
            raise ValueError(
                f"targets {other!r} and {name!r} are tied: they have the same weight, and an "
                "adapter each. Take one out of target_modules, or untie them"
            )
    return [(name, m) for name, m in modules.items() if name in chosen]


def saved_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The names of the modules that are trained and saved whole.

    Raises ValueError for an entry without match.
    """
    names = dict(model.named_modules())
    if config.modules_to_save is None:
        return _heads(model)
    found: list[str] = []
    for entry in config.modules_to_save:
        matches = _suffix(names, entry)
        if not matches:
            top = ", ".join(name for name in names if name and "." not in name)
            raise ValueError(
                f"modules_to_save has {entry!r}, which matches no module; top-level ones are {top}"
            )
        found += [m for m in matches if not any(inside(m, f) for f in found)]
    return found


def _heads(model: nn.Module) -> list[str]:
    """What was made afresh for the task, by the class of a model of transformers, else by its name.

    Such a class for a task puts its head beside the pretrained model, `base_model_prefix`; a model
    that writes text has its head from the pretraining.
    """
    full = [n for n, m in model.named_modules() if n and next(m.parameters(), None) is not None]
    top = [name for name in full if "." not in name and name != "lora_bank"]
    task = any(_TASK.search(c.__name__) for c in type(model).__mro__)
    base = getattr(model, "base_model_prefix", None) if task else None
    if base in top:
        return [name for name in top if name != base]
    heads = list[str]()
    for name in full:
        if name.endswith(HEADS) and not layer_of(name) and not any(inside(name, h) for h in heads):
            heads.append(name)
    if task:
        _tell(type(model).__name__, tuple(heads), tuple(n for n in top if n not in heads))
    return heads


@functools.cache
def _tell(model: str, heads: Sequence[str], rest: Sequence[str]) -> None:
    told = "of %s, %s is trained whole and %s is not: name in modules_to_save what was made afresh"
    _log.warning(told, model, ", ".join(heads) or "nothing", ", ".join(rest))


def inside(name: str, parent: str) -> bool:
    """Whether `name` is `parent` or lies in it."""
    return name == parent or name.startswith(parent + ".")


def _suffix(modules: Mapping[str, nn.Module], entry: str) -> list[str]:
    return [name for name in modules if name == entry or name.endswith("." + entry)]


def _excluded(modules: Mapping[str, nn.Module], exclude: str | Sequence[str] | None) -> set[str]:
    if exclude is None:
        return set()
    if isinstance(exclude, str):
        return {name for name in modules if re.fullmatch(exclude, name)}
    return {name for entry in exclude for name in _suffix(modules, entry)}


def kinds_of(names: Iterable[str]) -> str:
    """How many names there are of each last part, as in "query (12), value (12)"."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{kind} ({count})" for kind, count in counts.items()) or "none"


def _stack(layer: str) -> str:
    return f"{layer.rpartition('.')[0]}.*".removeprefix(".")


def _require_coverage(
    names: Mapping[str, list[str]], linear: Mapping[str, nn.Module], excluded: set[str]
) -> None:
    """Every entry matches, and in all the layers of the stack that it matches in.

    An entry that is a module's full name stands for that module alone.
    """
    problem, rows = "", []
    for entry, found in names.items():
        stacks: dict[str, set[str]] = {}
        for name in [*linear, *found]:
            if layer := layer_of(name):
                stacks.setdefault(_stack(layer), set()).add(layer)
        rows.append(f"  {entry}: {len(found)} modules")
        if not found:
            problem = problem or f"target_modules entry {entry!r} matches nothing"
        for stack, layers in stacks.items():
            hit = layers & {layer_of(n) for n in found if n != entry}
            skipped = {layer_of(n) for n in excluded}
            missing = sorted(layers - hit - skipped, key=lambda s: int(s.rpartition(".")[2]))
            if hit and missing:
                rows[-1] += f", none in {', '.join(missing[:6])}{', ...' * (len(missing) > 6)}"
                problem = problem or (
                    f"target_modules entry {entry!r} matches only {len(hit)} of {len(layers)} "
                    f"layers of {stack}"
                )
    if problem:
        raise ValueError(
            f"{problem}. What matched:\n"
            + "\n".join(rows)
            + f"\nLinear layers there are: {kinds_of(linear)}. "
            "Correct the entry, or pass strict=False to take what matches"
        )


def _require_used(
    config: LoRAConfig, modules: Mapping[str, nn.Module], chosen: Iterable[str]
) -> None:
    """Every exclusion names a module, and every pattern of ranks and alphas a target."""
    exclude, unused = config.exclude_modules or (), list[str]()
    for entry in [exclude] if isinstance(exclude, str) else exclude:
        if not _excluded(modules, entry if isinstance(exclude, str) else [entry]):
            unused.append(f"exclude_modules has {entry!r}, which matches no module")
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            if not any(pattern_matches(key, target) for target in chosen):
                unused.append(f"{name} has {key!r}, which matches no target")
    if unused:
        raise ValueError(
            f"{'; '.join(unused)}. The targets: {kinds_of(chosen)}. Correct it, or pass "
            "strict=False to leave what matches nothing without effect"
        )


def _require_adaptable(model: nn.Module, name: str, module: nn.Module) -> None:
    if shape_of(module) is None:
        raise ValueError(
            f"target {name!r} is a {type(module).__name__}, which is not a linear map "
            "(..., K) -> (..., N): name a linear layer"
        )
    parent = model.get_submodule(name.rpartition(".")[0]) if name else model
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"target {name!r} belongs to nn.MultiheadAttention, which never calls its forward: "
            "take it out of target_modules"
        )
    if is_patched(module):
        raise ValueError(
            f"target {name!r} has a forward of its own, set on the instance, which would pass the "
            "adapter by: inject before it is patched, or take it out of target_modules"
        )
    weight = getattr(module, "weight", None)
    for other, embedding in model.named_modules():
        if isinstance(embedding, nn.Embedding) and embedding.weight is weight:
            raise ValueError(
                f"target {name!r} is tied to the embedding {other!r}: an adapter on one would "
                "leave the other. Take it out of target_modules, or untie them"
            )
