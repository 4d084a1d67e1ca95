"""Finding the modules to adapt: names, suffixes or a regex, and a table of what they matched."""

import functools
import logging
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from loradrop.config import LoRAConfig, pattern_matches
from loradrop.layers import is_extensible, is_patched, keeps_rows, shape_of
from loradrop.scores import layer_of, stem_of
from loradrop.wrapped import modules_of

# Query and value projections under the names that transformers' models give them.
QUERY_VALUE = (
    *("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v"),
    *("query_proj", "value_proj", "c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv"),
    *("to_q", "to_v", "linear_q", "linear_v", "q_head", "v_head", "Wq", "Wv"),
    *("q_b_proj", "kv_b_proj"),  # of multi-head latent attention
)
OTHERWISE = ("in_proj",)  # DeBERTa's three in one, and what mixers without attention begin with
# How the names of heads end where the model's class does not say what its head is.
HEADS = ("classifier", "score", "qa_outputs")
_TASK = re.compile(r"For(\w+Classification|QuestionAnswering|MultipleChoice)")
_log = logging.getLogger(__name__)

Matched = list[tuple[str, nn.Module]]


def find_targets(model: nn.Module, config: LoRAConfig) -> Matched:
    """The modules that `config` names, each once, in the model's order.

    Raises ValueError with a table of what matched where an entry matches nothing, and for a module
    that is not a linear map or whose forward is never called, and a tied weight. "all-linear"
    leaves those out.
    """
    heads = saved_modules(model, config)
    modules = {n: m for n, m in modules_of(model).items() if not any(inside(n, h) for h in heads)}
    linear = {name: m for name, m in modules.items() if shape_of(m) is not None}
    excluded = _excluded(modules, config.exclude_modules)
    wanted = config.target_modules
    if wanted == "all-linear":
        names = {"all-linear": _adaptable(model, config, linear, excluded)}
    elif isinstance(wanted, str):
        names = {wanted: [name for name in modules if re.fullmatch(wanted, name)]}
        if not names[wanted]:
            _require_list("target_modules", wanted, linear)
    elif wanted is None:
        for kinds in (QUERY_VALUE, OTHERWISE):
            names = {kind: found for kind in kinds if (found := _suffix(linear, kind))}
            if names:
                break
        else:
            raise ValueError(
                f"target_modules=None found no query or value projection in {type(model).__name__}:"
                f" name the target modules. Its linear layers: {kinds_of(linear)}"
            )
    else:
        names = {entry: _suffix(modules, entry) for entry in wanted}
    names = {entry: [n for n in found if n not in excluded] for entry, found in names.items()}
    chosen = {n for found in names.values() for n in found}
    if config.strict:
        if wanted not in (None, "all-linear"):
            _check_coverage(names, linear, excluded)
        _require_used(config, modules_of(model), chosen)
    if not chosen:
        known = f"Linear layers there are: {kinds_of(linear)}"
        raise ValueError(f"target_modules={wanted!r} matches no module. {known}")
    owners = _owners(model, chosen)
    for name in (name for name in modules if name in chosen):
        if why := _obstacle(model, name, modules[name], owners):
            raise ValueError(f"target {name!r} {why}")
    return [(name, m) for name, m in modules.items() if name in chosen]


def _adaptable(
    model: nn.Module, config: LoRAConfig, linear: Mapping[str, nn.Module], excluded: set[str]
) -> list[str]:
    """What "all-linear" stands for; what it leaves out goes to the log, with the reason."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    owners, found, left = _owners(model, linear), list[str](), dict[str, list[str]]()
    for name, module in linear.items():
        if name in excluded or module is head:
            continue
        k, n = shape_of(module) or (0, 0)
        why = _obstacle(model, name, module, owners)
        if why is None and config.rank(name) > min(k, n):
            why = f"is narrower than r={config.rank(name)}"
        if why is None and not keeps_rows(module):
            why = "does not return (..., N), as a router"
        if why is None and _in_mamba(model, name) and not name.endswith("in_proj"):
            why = "is read by Mamba's kernels, which would pass its adapter by"
        if why is None or is_patched(module):
            found.append(name)
        else:
            left.setdefault(why.partition(":")[0], []).append(name)
    if stacked := [name for name in _stacked_experts(model) if name not in excluded]:
        left["is one parameter of all experts, and not a linear layer"] = stacked
    if left:
        told = "; ".join(f"{', '.join(n)} (each {why})" for why, n in left.items())
        _log.warning("all-linear leaves out %s", told)
    return found


def _stacked_experts(model: nn.Module) -> Iterator[str]:
    """The parameters (experts, N, K) in which a mixture keeps all of its experts' weights."""
    for name, module in model.named_modules():
        if "expert" in type(module).__name__.lower():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.ndim == 3:
                    yield f"{name}.{key}"


def _in_mamba(model: nn.Module, name: str) -> bool:
    """Whether its parent is a mixer of Mamba, told by its convolution and its skip weights D."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return hasattr(parent, "conv1d") and isinstance(getattr(parent, "D", None), nn.Parameter)


def saved_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The names of the modules that are trained and saved whole.

    Raises ValueError for an entry without match.
    """
    names = modules_of(model)
    if config.modules_to_save is None:
        return heads(model)
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


def heads(model: nn.Module) -> list[str]:
    """What was made afresh for the task, by the class of a model of transformers, else by its name.

    Such a class for a task puts its head beside the pretrained model, `base_model_prefix`; a model
    that writes text has its head from the pretraining.
    """
    full = [n for n, m in modules_of(model).items() if n and next(m.parameters(), None) is not None]
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


def _require_list(option: str, given: str, modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError for a string that matches nothing, but would as entries of a list."""
    entries = [entry.strip() for entry in given.split(",")]
    if all(_suffix(modules, entry) for entry in entries):
        spelled = ", ".join(f'"{entry}"' for entry in entries)
        raise ValueError(
            f'{option}="{given}" is a string, which is a regular expression for whole names, and '
            f"no name is like that: give a list, [{spelled}]"
        )


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


def _check_coverage(
    names: Mapping[str, list[str]], linear: Mapping[str, nn.Module], excluded: set[str]
) -> None:
    """Every entry matches, or ValueError; a warning where it does in some layers of a stack only.

    A module's full name, and an entry with a number, stand for what they name.
    """
    gaps, rows = list[str](), list[str]()
    stem = stem_of([*linear, *(name for found in names.values() for name in found)])
    for entry, found in names.items():
        stacks: dict[str, set[str]] = {}
        for name in [*linear, *found]:
            if layer := layer_of(name, stem):
                stacks.setdefault(_stack(layer), set()).add(layer)
        rows.append(f"  {entry}: {len(found)} modules")
        named = entry in found or re.search(r"\d", entry)
        for stack, layers in {} if named else stacks.items():
            hit = layers & {layer_of(n, stem) for n in found}
            skipped = {layer_of(n, stem) for n in excluded}
            missing = sorted(layers - hit - skipped, key=lambda s: int(s.rpartition(".")[2]))
            if hit and missing:
                rows[-1] += f", none in {', '.join(missing[:6])}{', ...' * (len(missing) > 6)}"
                gaps.append(f"{entry!r} matches only {len(hit)} of {len(layers)} layers of {stack}")
    nothing = [f"{entry!r} matches nothing" for entry, found in names.items() if not found]
    if not nothing and not gaps:
        return
    table = "\n".join([*rows, f"Linear layers there are: {kinds_of(linear)}"])
    if nothing:
        some = ", or pass strict=False (of a run: lora.strict=false) to take what matches"
        raise ValueError(
            f"target_modules entry {nothing[0]}. What matched:\n{table}. Correct the entry"
            f"{some * any(names.values())}"
        )
    _log.warning("target_modules entry %s. What matched:\n%s", gaps[0], table)


def _require_used(
    config: LoRAConfig, modules: Mapping[str, nn.Module], chosen: Iterable[str]
) -> None:
    """Every exclusion names a module, and every pattern of ranks and alphas a target."""
    exclude, unused = config.exclude_modules or (), list[str]()
    for entry in [exclude] if isinstance(exclude, str) else exclude:
        if not _excluded(modules, entry if isinstance(exclude, str) else [entry]):
            if isinstance(exclude, str):
                _require_list("exclude_modules", exclude, modules)
            unused.append(f"exclude_modules has {entry!r}, which matches no module")
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            if not any(pattern_matches(key, target) for target in chosen):
                unused.append(f"{name} has {key!r}, which matches no target")
    if unused:
        raise ValueError(
            f"{'; '.join(unused)}. The targets: {kinds_of(chosen)}. Correct it, or pass "
            "strict=False (of a run: lora.strict=false) to leave what matches nothing without "
            "effect"
        )


def _owners(model: nn.Module, names: Container[str]) -> dict[int, list[str]]:
    """Which of these modules and of the embeddings have a weight, by its id."""
    owners: dict[int, list[str]] = {}
    for name, module in modules_of(model).items():
        embeds, weight = isinstance(module, nn.Embedding), module._parameters.get("weight")
        if weight is not None and (embeds or name in names):
            kind = "the embedding " * embeds
            owners.setdefault(id(weight), []).append(f"{kind}{name!r}")
    return owners


def _obstacle(
    model: nn.Module, name: str, module: nn.Module, owners: Mapping[int, list[str]]
) -> str | None:
    """Why a module cannot be adapted, and what to do; None where it can."""
    if shape_of(module) is None:
        return (
            f"is a {type(module).__name__}, which is not a linear map (..., K) -> (..., N): "
            "name a linear layer"
        )
    kind: Any = type(module)
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return f"is a {kind.__name__} without a size yet: call the model on one batch first"
    if not is_extensible(kind):
        return (
            f"is a {type(module).__name__}, a class that Python cannot extend in place, so that no "
            "adapter can be added: take it out of target_modules, or quantise the model with "
            "another library"
        )
    parent = model.get_submodule(name.rpartition(".")[0]) if name else model
    if isinstance(parent, nn.MultiheadAttention):
        return (
            "belongs to nn.MultiheadAttention, which never calls its forward: "
            "take it out of target_modules"
        )
    if is_patched(module):
        return (
            "has a forward of its own, set on the instance, which would pass the adapter by: "
            "inject before it is patched, or take it out of target_modules"
        )
    tied = [
        owner
        for owner in owners.get(id(getattr(module, "weight", None)), ())
        if owner != repr(name)
    ]
    if tied:
        return (
            f"is tied to {', '.join(tied)}: an adapter on one would leave the other. Take it out "
            "of target_modules, or untie them"
        )
    return None
