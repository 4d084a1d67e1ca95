"""A PEFT folder as a native file: plain pairs (A, B), each at its own rank and scale.

The model computes from the result what PEFT computes from the folder. Whatever else a folder may
ask for, by an option of PEFT 0.21 or by a tensor, is refused by its name.
"""

import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from loradrop.bank import Pair
from loradrop.config import LoRAConfig
from loradrop.extra_state import STATE
from loradrop.files import read_json
from loradrop.formats import peft_file
from loradrop.formats.peft_conversion import renamed
from loradrop.formats.peft_file import CONFIG, PICKLE, PREFIX, TENSORS, PeftFile, base_state
from loradrop.formats.peft_options import lora_config, require_plain, spelled
from loradrop.injection import require_loaded
from loradrop.matching import inside
from loradrop.native import NativeFile
from loradrop.pairs import pair_tensors
from loradrop.plan import Plan
from loradrop.ranks import full_tensor
from loradrop.scores import Assignment, Target
from loradrop.wrapped import modules_of, names_by_tensor

_log = logging.getLogger(__name__)
_BASE = ".base_layer."  # in the name of what PEFT trains of a layer that it adapts, as its bias
_PAIR = re.compile(r"(.+)\.lora_([AB])\.weight")
_OF_PEFT = re.compile(r"(^|\.)(lora_\w+|token_adapter|modules_to_save|original_module)(\.|$)")


def is_peft(path: str | os.PathLike[str]) -> bool:
    """Whether the folder `path` holds an adapter of PEFT."""
    return any((Path(path) / name).exists() for name in (CONFIG, TENSORS, PICKLE))


def read(path: str | os.PathLike[str], model: nn.Module) -> NativeFile:
    """The adapter that PEFT or our `export` wrote into the folder `path`, as a native one.

    Its targets are in the order of `model`. Raises FileNotFoundError for a missing file, and
    ValueError for a damaged one, a pickle, and what plain pairs cannot express.
    """
    try:
        file = peft_file.read(path)
        own = file.config.get("peft_type") == peft_file.OURS
        if not own:
            return translate(file, model)
        made = _of_face(file)
        require_untied(base_state(model), made.trained, file.config)
        return made
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def plan_in(path: str | os.PathLike[str]) -> Plan | None:
    """The plan that PEFT's face saved with its adapter in the folder `path`; None in plain LoRA."""
    file = Path(path) / CONFIG
    config = read_json(file) if file.exists() else {}
    return Plan.from_dict(config["plan"]) if isinstance(config.get("plan"), Mapping) else None


def _of_face(file: PeftFile) -> NativeFile:
    """What PEFT's face saved: the tensors of a bank, each once, and the plan."""
    plan = file.config.get("plan")
    if not isinstance(plan, Mapping):
        raise ValueError(f"{CONFIG} has no plan, which save_pretrained writes: save it again")
    banks = {k: v for k, v in file.tensors.items() if k.startswith(peft_file.BANK)}
    bank = {key.removeprefix(peft_file.BANK): value for key, value in banks.items()}
    bank.pop(STATE, None)  # the plan says it
    others = {k.removeprefix(PREFIX): v for k, v in file.tensors.items() if k not in banks}
    trained = {name.replace(_BASE, "."): tensor for name, tensor in others.items()}
    return NativeFile(Plan.from_dict(plan), bank, trained)


def translate(file: PeftFile, model: nn.Module) -> NativeFile:
    """The pairs, the tensors trained whole and the plan of `file`, for `model`.

    Raises ValueError naming the option, the tensor or the target that plain pairs cannot express.
    Whether targets and shapes fit the model is not asked here.
    """
    options = file.config
    require_plain(options)
    here = modules_of(model)
    pairs, others = _parts(file.tensors)
    if not pairs.keys() <= here.keys():  # an adapter from before the model's modules were renamed
        later, beside = _parts(renamed(file.tensors, model))
        if later.keys() <= here.keys():
            pairs, others = later, beside
    state = base_state(model)
    trained = _trained(options, model, others, pairs)
    require_untied(state, trained, options)
    saved = _saved_modules(state, trained)
    names = [name for name in here if name in pairs]
    names += [name for name in pairs if name not in names]
    config = lora_config(options, names, saved)
    for name in names:
        if any(inside(name, module) for module in saved):
            raise ValueError(
                f"{name} has a pair, and its weight is trained whole too: take it out of "
                "modules_to_save, and train the adapter again"
            )
        pairs[name] = _fitting(name, config.rank(name), pairs[name])
    ranks = {name: len(pairs[name][0]) or config.rank(name) for name in names}
    config = spelled(_of_ranks(config, ranks), options, model, names)
    targets = tuple(_target(name, ranks[name], *pairs[name]) for name in names)
    own = [name for name in names if len(pairs[name][0])]
    slots = tuple(own.index(name) if name in own else None for name in names)
    assignment = Assignment(targets, slots)
    tensors = pair_tensors([pairs[name] for name in own])
    plan = Plan(
        config=config,
        assignment=assignment,
        parameters=assignment.parameters,
        base=_said(options, id="base_model_name_or_path", revision="revision"),
        versions=_said(options, peft="peft_version"),
    )
    return NativeFile(plan, tensors, trained)


def _target(name: str, r: int, A: Tensor, B: Tensor) -> Target:
    return Target(name, name.rpartition(".")[2], A.shape[1], B.shape[0], r)


def _parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """(target -> (A (r, K), B (N, r)) in float32, name in the base model -> a tensor of it).

    Raises ValueError for a tensor that is neither, a lone factor, and values that are not finite.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if tensor.is_floating_point() and tensor.itemsize == 1:  # float8, in which nothing computes
            tensor = tensor.float()
        if not tensor.isfinite().all():
            raise ValueError(f"{key} is not finite: its training diverged. Take another checkpoint")
        if pair := _PAIR.fullmatch(name):
            factors.setdefault(pair[1], {})[pair[2]] = tensor
            continue
        name = name.replace(_BASE, ".")
        if _OF_PEFT.search(name):
            raise ValueError(
                f"{key} is neither lora_A.weight nor lora_B.weight of a linear layer, so it "
                "cannot be part of a plain pair: use the adapter with PEFT"
            )
        others[name] = tensor
    if not factors:
        raise ValueError(f"{TENSORS} has no lora_A and lora_B: load its tensors with PEFT")
    pairs: dict[str, Pair] = {}
    for name, found in factors.items():
        if len(found) == 1:
            there = "".join(found)
            lacks = "B" if there == "A" else "A"
            raise ValueError(f"{name} has lora_{there} but no lora_{lacks}: save the adapter again")
        A, B = found["A"], found["B"]
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.numel() * B.numel():
            raise ValueError(
                f"{name} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, not (r, K) and "
                "(N, r): only linear layers are adapted here, and a sharded training has to gather "
                "its tensors before it saves them"
            )
        A, B = (f if f.dtype == torch.float64 else f.float() for f in (A, B))
        pairs[name] = (A, B)
    return pairs, others


def _trained(
    options: Mapping[str, Any],
    model: nn.Module,
    others: Mapping[str, Tensor],
    targets: Collection[str],
) -> dict[str, Tensor]:
    """Those tensors of the file that are trained whole: of modules_to_save, and biases.

    PEFT also writes embeddings and heads that it does not train (save_embedding_layers). They are
    left out where the model has the same, and else taken in, as the file has them. Raises
    ValueError for the other weight of a target, and where a module of modules_to_save lacks
    tensors.
    """
    state, ends = base_state(model), tuple(options.get("modules_to_save") or ())
    here = modules_of(model)
    saved = [n for n in here if n.endswith(ends)] if ends else []
    asked = {key for key in state if any(inside(key, name) for name in saved)}
    lacking = sorted(asked - set(others))
    if lacking and not here.keys() & set(targets):
        of = options.get("base_model_name_or_path") or "which it does not name"
        raise ValueError(
            f"it is an adapter for another model ({of}): this {type(model).__name__} has none of "
            f"its targets, as {min(targets)}"
        )
    if lacking:
        raise ValueError(
            f"modules_to_save={list(ends)} without {', '.join(lacking[:5])} in {TENSORS}: "
            "save the adapter again, or take the entry out where the base model's is right"
        )
    biases = options.get("bias", "none") != "none"
    trained, beside = {}, []
    for name, value in others.items():
        if name in state and name not in asked and not (biases and "bias" in name):
            if _holds(name, state[name], value):
                continue
            if name.rpartition(".")[0] in targets:
                raise ValueError(
                    f"{name} of the base model is in {TENSORS} too, and is another one than this "
                    "model has: load the base model that the adapter was trained on"
                )
            beside.append(name)
        trained[name] = value
    if beside:
        told = "%s: in the file though not in modules_to_save, and trained whole from here on"
        _log.warning(told, ", ".join(beside))
    return trained


def _holds(name: str, here: Tensor, value: Tensor) -> bool:
    """Whether the model's tensor is this value in its dtype."""
    require_loaded({name: here})
    return here.shape == value.shape and torch.equal(full_tensor(here).cpu(), value.to(here.dtype))


def require_untied(
    state: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    of_peft: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Raises ValueError for a tensor that the model has under two names, and the file with two
    values or, where PEFT trained it apart by the options `of_peft`, under one name.
    """
    names = names_by_tensor(state)
    for name, value in trained.items():
        for twin in names[id(state[name])] if name in state else ():
            other = trained.get(twin)
            alone = other is None and is_apart(name, of_peft)
            if alone or (other is not None and not torch.equal(other, value)):
                one, two = (twin, name) if is_apart(twin, of_peft) else (name, twin)
                raise ValueError(
                    f"{one} is the same tensor as {two} in this model, and PEFT trained it "
                    f"apart: {how_to_untie(one)}"
                )


def how_to_untie(name: str) -> str:
    """What to do so that the tensor is tied to nothing."""
    place = name.rpartition(".")[0]
    return (
        f"untie them first (model.{place} = copy.deepcopy(model.{place}), and of a model of "
        "transformers model.config.tie_word_embeddings = False)"
    )


def is_apart(key: str, options: Mapping[str, Any]) -> bool:
    """Whether PEFT trains a copy of the base's tensor `key`, by the `options` of its configuration:
    in modules_to_save. It is apart from what is tied to it, unless the file has that too, as where
    PEFT does what ensure_weight_tying asks; it cannot in every model.
    """
    ends = tuple(options.get("modules_to_save") or ())
    return any(module.endswith(ends) for module in _parents(key))


def _saved_modules(state: Mapping[str, Tensor], trained: Iterable[str]) -> list[str]:
    """The outermost modules of which the file has every tensor."""
    lacking = {parent for key in state if key not in trained for parent in _parents(key)}
    here = (key for key in trained if key in state)
    found = (next((p for p in _parents(key) if p not in lacking), None) for key in here)
    return list(dict.fromkeys(name for name in found if name is not None))


def _parents(key: str) -> Iterator[str]:
    """The modules around the tensor `key`, the outermost first."""
    return (key[: dot.start()] for dot in re.finditer(r"\.", key))


@torch.no_grad()
def _fitting(name: str, r: int, pair: Pair) -> Pair:
    """The pair of target `name` without the zeros of a padded file and with at most min(K, N)
    ranks.

    All others add nothing: of a rank whose A and B are zero no gradient ever comes, and what PEFT
    trained beyond min(K, N) has the same product B·A as a pair that fits, made in float64 and
    rounded once. Raises ValueError where the rank is not r, the configuration's.
    """
    A, B = pair
    if A.shape[0] != r:
        raise ValueError(
            f"{name} has rank {A.shape[0]} in {TENSORS} and rank {r} by r and rank_pattern in "
            f"{CONFIG}: restore the two files of one save"
        )
    used = A.any(1) | B.any(0)
    A, B = A[used], B[:, used]
    most = min(A.shape[1], B.shape[0])
    if len(A) > most:
        U, S, V = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
        A, B = (S.sqrt()[:, None] * V).to(A), (U * S.sqrt()).to(B)
    return A.contiguous(), B.contiguous()


def _of_ranks(config: LoRAConfig, ranks: Mapping[str, int]) -> LoRAConfig:
    """The configuration with these ranks at its own scales: without patterns where all are equal,
    and with one for each target whose rank is another than it says.
    """

    def alpha(s: float, rank: int) -> float:
        return s * (math.sqrt(rank) if config.use_rslora else rank)

    scales = {name: config.scaling(name) for name in ranks}
    if len({*ranks.values()}) == len({*scales.values()}) == 1:
        (r,), (s,) = {*ranks.values()}, {*scales.values()}
        return replace(config, r=r, lora_alpha=alpha(s, r), rank_pattern={}, alpha_pattern={})
    changed = {name: rank for name, rank in ranks.items() if rank != config.rank(name)}
    exact = {name: f"^{re.escape(name)}" for name in changed}
    alphas = {exact[name]: alpha(scales[name], rank) for name, rank in changed.items()}
    return replace(
        config,
        rank_pattern={**{exact[n]: rank for n, rank in changed.items()}, **config.rank_pattern},
        alpha_pattern={**alphas, **config.alpha_pattern},
    )


def _said(options: Mapping[str, Any], **names: str) -> dict[str, str]:
    """What the file says under these names of PEFT, by ours."""
    return {ours: str(options[name]) for ours, name in names.items() if options.get(name)}
