"""A PEFT folder as a native file: plain pairs (A, B), each at its own rank and scale.

The model computes from the result what PEFT computes from the folder. Whatever else a folder may
ask for, by an option of PEFT 0.21 or by a tensor, is refused by its name.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loradrop.bank import STATE, Pair
from loradrop.config import LoRAConfig, pattern_matches
from loradrop.formats import peft_file
from loradrop.formats.peft_file import CONFIG, PREFIX, TENSORS, PeftFile, base_state
from loradrop.matching import find_targets, inside
from loradrop.native import NativeFile
from loradrop.pairs import LoRABank
from loradrop.plan import Plan
from loradrop.scores import Assignment, Target

PICKLE = "adapter_model.bin"
_PAIR = re.compile(r"(.+)\.lora_([AB])\.weight")
_OF_PEFT = re.compile(r"(^|\.)(lora_\w+|token_adapter|modules_to_save|original_module)(\.|$)")
_CHANGES = {  # options that, where they are set, make an adapter something other than s·B·A
    "use_dora": "DoRA also scales the columns of the whole weight",
    "lora_bias": "B has a bias",
    "alora_invocation_tokens": "aLoRA adapts some tokens only",
    "arrow_config": "Arrow routes tokens between adapters",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its adapters",
    "use_bdlora": "BD-LoRA has factors of blocks",
    "use_qalora": "QALoRA pools the input",
    "velora_config": "VeLoRA keeps a projection beside A and B",
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "parameters that are not the weight of a linear layer are adapted",
    "trainable_token_indices": "single rows of an embedding are trained",
}
_ELSEWHERE = (
    "use it with PEFT, and where PEFT can merge it (merge_and_unload), adapt the merged model here"
)
# The inits that leave the base model as it is; pissa, corda, olora, lora_ga and loftq change it.
_UNCHANGED = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
_HARMLESS = {  # options that do not change what the tensors of the file mean, or that are read here
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "bias", "fan_in_fan_out"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "megatron_config", "megatron_core", "ensure_weight_tying"),
    "merge_weights",
}


def is_peft(path: str | os.PathLike[str]) -> bool:
    """Whether the folder `path` holds an adapter of PEFT."""
    return any((Path(path) / name).exists() for name in (CONFIG, TENSORS, PICKLE))


def read(path: str | os.PathLike[str], model: nn.Module) -> NativeFile:
    """The adapter that PEFT or our `export` wrote into the folder `path`, as a native one.

    Its targets are in the order of `model`. Raises FileNotFoundError for a missing file, and
    ValueError for a damaged one, a pickle, and what plain pairs cannot express.
    """
    folder = Path(path)
    if (folder / PICKLE).exists() and not (folder / TENSORS).exists():
        raise ValueError(
            f"{folder / PICKLE} is a pickle, which can run any code when it is loaded: refused. "
            "Load it with PEFT where you trust it, and save_pretrained writes a safetensors file"
        )
    try:
        return translate(peft_file.read(folder), model)
    except (TypeError, AttributeError) as error:
        damaged = f"{folder / CONFIG} is damaged ({error}): restore it from a copy"
        raise ValueError(damaged) from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def translate(file: PeftFile, model: nn.Module) -> NativeFile:
    """The pairs, the tensors trained whole and the plan of `file`, for `model`.

    Raises ValueError naming the option, the tensor or the target that plain pairs cannot express.
    Whether targets and shapes fit the model is not asked here.
    """
    _require_plain(file.config)
    pairs, trained = _parts(file.tensors)
    state = base_state(model)
    _require_whole(file.config, model, state, trained)
    _require_untied(file.config, state, trained)
    names = [name for name, _ in model.named_modules() if name in pairs]
    names += [name for name in pairs if name not in names]
    saved = _saved_modules(state, trained)
    config = _config(file.config, pairs, saved)
    for name in names:
        if any(inside(name, module) for module in saved):
            raise ValueError(f"{name} is in modules_to_save and has a pair: PEFT uses one of both")
        config, pairs[name] = _fitting(name, config, pairs[name])
    config = _spelled(model, file.config, config, names)
    targets = [
        Target(n, n.rpartition(".")[2], A.shape[1], B.shape[0], A.shape[0])
        for n, (A, B) in ((name, pairs[name]) for name in names)
    ]
    assignment = Assignment(tuple(targets), tuple(range(len(targets))))
    bank = LoRABank((), (), ())
    bank.assign(assignment, [pairs[name] for name in names])
    tensors = {k: v.detach() for k, v in bank.state_dict().items() if k != STATE}
    plan = Plan(
        config=config,
        assignment=assignment,
        parameters=assignment.parameters,
        base=_said(file.config, id="base_model_name_or_path", revision="revision"),
        versions=_said(file.config, peft="peft_version"),
    )
    return NativeFile(plan, tensors, trained)


def _require_plain(config: Mapping[str, Any]) -> None:
    """Raises ValueError for an option by which the adapter is not s·B·A over the base's weight."""
    if not isinstance(config, Mapping):
        raise ValueError(f"{CONFIG} holds a {type(config).__name__}, not options: is it PEFT's?")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type={config.get('peft_type')!r}: only LORA is read; {_ELSEWHERE}")
    for name, why in _CHANGES.items():
        if config.get(name):
            raise ValueError(f"{name}={config[name]!r} is not plain LoRA: {why}; {_ELSEWHERE}")
    init = config.get("init_lora_weights")
    if init is not None and str(init).lower() not in _UNCHANGED:
        raise ValueError(
            f"init_lora_weights={init!r}: this changed the weights of the base model, and the "
            "adapter is right on the changed ones alone. Save it again with PEFT's save_pretrained("
            "..., path_initial_model_for_weight_conversion=...), which writes a plain adapter where "
            'the init has one (PiSSA, CorDA, OLoRA, LoRA-GA), or set "init_lora_weights": true in '
            f"{CONFIG} where this model has the changed weights, or they were never changed"
        )
    for name, value in config.items():
        if value and name not in _HARMLESS and name not in _CHANGES:
            raise ValueError(
                f"{CONFIG} has {name}={value!r}, which loradrop does not know: take it out where "
                f"it does not change what the adapter computes, else {_ELSEWHERE}"
            )


def _parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """(target -> (A (r, K), B (N, r)) in float32, name in the base model -> a tensor of it).

    Raises ValueError for a tensor that is neither, a lone factor, and values that are not finite.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if not tensor.isfinite().all():
            raise ValueError(f"{key} is not finite: its training diverged. Take another checkpoint")
        if pair := _PAIR.fullmatch(name):
            factors.setdefault(pair[1], {})[pair[2]] = tensor
            continue
        name = name.replace(".base_layer.", ".")
        if _OF_PEFT.search(name):
            raise ValueError(
                f"{key} is neither lora_A.weight nor lora_B.weight of a linear layer, so it "
                "cannot be part of a plain pair: use the adapter with PEFT"
            )
        trained[name] = tensor
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
    return pairs, trained


def _require_whole(
    config: Mapping[str, Any],
    model: nn.Module,
    state: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
) -> None:
    """Raises ValueError where a module that PEFT saved whole lacks tensors: it goes by ends."""
    ends = tuple(config.get("modules_to_save") or ())
    whole = [n for n, _ in model.named_modules() if n.endswith(ends)] if ends else []
    lacking = [key for key in state if any(inside(key, n) for n in whole) and key not in trained]
    if lacking:
        raise ValueError(
            f"modules_to_save={list(ends)} without {', '.join(lacking[:5])} in {TENSORS}: "
            "save the adapter again, or take the entry out where the base model's is right"
        )


def _require_untied(
    config: Mapping[str, Any], state: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> None:
    """Raises ValueError for a tensor that the model has under two names, and the file under one.

    PEFT trains a copy of it, apart from its twin, unless ensure_weight_tying is set.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    for name, value in trained.items():
        for twin in names[id(state[name])] if name in state else ():
            other = trained.get(twin)
            apart = other is None and not config.get("ensure_weight_tying")
            if apart or (other is not None and not torch.equal(other, value)):
                raise ValueError(
                    f"{name} is the same tensor as {twin} in this model, and the file has its own "
                    "for each: untie them first (for transformers, load the base model with "
                    "tie_word_embeddings=False)"
                )


def _saved_modules(state: Mapping[str, Tensor], trained: Iterable[str]) -> list[str]:
    """The outermost modules of which the file has every tensor."""
    lacking = {parent for key in state if key not in trained for parent in _parents(key)}
    whole = (next((p for p in _parents(key) if p not in lacking), None) for key in trained)
    return list(dict.fromkeys(name for name in whole if name is not None))


def _parents(key: str) -> Iterator[str]:
    """The modules around the tensor `key`, the outermost first."""
    return (key[: dot.start()] for dot in re.finditer(r"\.", key))


def _config(given: Mapping[str, Any], pairs: Iterable[str], saved: list[str]) -> LoRAConfig:
    """PEFT's options as ours, with the patterns that match a target of the file."""

    def matching(name: str) -> dict[str, Any]:
        pattern = dict(given.get(name) or {})
        return {k: v for k, v in pattern.items() if any(pattern_matches(k, n) for n in pairs)}

    return LoRAConfig(
        r=given.get("r", 8),
        lora_alpha=given.get("lora_alpha", 8),
        lora_dropout=given.get("lora_dropout") or 0.0,
        rank_pattern=matching("rank_pattern"),
        alpha_pattern=matching("alpha_pattern"),
        use_rslora=bool(given.get("use_rslora")),
        modules_to_save=saved,
    )


def _fitting(name: str, config: LoRAConfig, pair: Pair) -> tuple[LoRAConfig, Pair]:
    """The pair of target `name` with at most min(K, N) ranks, and the configuration that says so.

    A uniform file pads small targets with zeros. Raises ValueError where a rank beyond is not zero,
    and where the rank is not the configuration's.
    """
    (A, B), r, s = pair, config.rank(name), config.scaling(name)
    most = min(A.shape[1], B.shape[0])
    if A.shape[0] != r:
        raise ValueError(
            f"{name} has rank {A.shape[0]} in {TENSORS} and rank {r} by r and rank_pattern in "
            f"{CONFIG}: restore the two files of one save"
        )
    if r <= most:
        return config, pair
    if A[most:].any() and B[:, most:].any():
        raise ValueError(
            f"r={r} for {name} ({A.shape[1]} -> {B.shape[0]}): a rank beyond {most} adds nothing, "
            "and is not adapted here. Merge the adapter with PEFT, or train it again with less"
        )
    exact = f"^{re.escape(name)}"
    alpha = s * (math.sqrt(most) if config.use_rslora else most)
    config = replace(
        config,
        rank_pattern={exact: most, **config.rank_pattern},
        alpha_pattern={exact: alpha, **config.alpha_pattern},
    )
    return config, (A[:most].contiguous(), B[:, :most].contiguous())


def _spelled(
    model: nn.Module, given: Mapping[str, Any], config: LoRAConfig, names: list[str]
) -> LoRAConfig:
    """The configuration with target_modules that name just these modules of the model.

    The file's own where they do, as they may not with layers_to_transform; else the names; else a
    regex of them.
    """
    exact = "|".join(map(re.escape, names))
    for spelled, exclude in (
        (given.get("target_modules"), given.get("exclude_modules")),
        (names, None),
    ):
        tried = replace(config, target_modules=spelled, exclude_modules=exclude)
        try:
            found = [name for name, _ in find_targets(model, tried)]
        except ValueError:  # an entry without a match
            continue
        if found == names:
            return tried
    return replace(config, target_modules=exact)


def _said(config: Mapping[str, Any], **names: str) -> dict[str, str]:
    """What the file says under these names of PEFT, by ours."""
    return {ours: str(config[name]) for ours, name in names.items() if config.get(name)}
