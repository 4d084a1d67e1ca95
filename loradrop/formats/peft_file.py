"""A PEFT adapter on disk: its file, and how PEFT finds in a model what the file holds.

The rules of matching are those of PEFT 0.21 (`check_target_module_exists`, `_set_trainable` and the
heads that `PeftModelFor...` adds), replayed so that an export hits our targets and nothing else.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import safetensors
from torch import Tensor, nn

from loradrop.adapters import Adapters
from loradrop.files import read_json
from loradrop.matching import inside, saved_modules
from loradrop.quantised import packed
from loradrop.scores import Target
from loradrop.wrapped import modules_of, tensors_of

TENSORS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
PICKLE = "adapter_model.bin"
OURS, BANK = "LORADROP", "base_model.lora_banks."  # of loradrop.integrations.peft
MERGED = "export with format='merged'"  # what to do about what the format cannot hold
_A, _B = ".lora_A.weight", ".lora_B.weight"
TASK_HEADS = {  # what PeftModelFor... wraps, and demands in the file, by itself
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASKS = {  # ending of the model's class -> task_type, and the class that AutoPeftModel loads
    "ForSequenceClassification": ("SEQ_CLS", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("TOKEN_CLS", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("QUESTION_ANS", "AutoModelForQuestionAnswering"),
    "ForCausalLM": ("CAUSAL_LM", "AutoModelForCausalLM"),
    "LMHeadModel": ("CAUSAL_LM", "AutoModelForCausalLM"),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
    "MTModel": ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
    "Model": ("FEATURE_EXTRACTION", "AutoModel"),  # where AutoModel loads just this class
}
_TEXT = ("input_ids", "inputs_embeds")  # what PeftModelFor... passes to the model by name
_INPUTS = {"SEQ_2_SEQ_LM": (*_TEXT, "decoder_input_ids", "decoder_inputs_embeds")}
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # PEFT adapts no out_proj


class PeftFile(NamedTuple):
    """A PEFT adapter as it lies on disk: its configuration, and its tensors by their full keys.

    base      the base model's own configuration, where it is known
    model     the model that has the adapters, where it is there
    instead   what to do about what PEFT cannot load

    `others` are in the order of the names, weights first: a file that is read has the order of the
    disk, and a reason for a refusal shall name the same tensor before and after.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    base: Mapping[str, Any] = MappingProxyType({})
    model: nn.Module | None = None
    instead: str = MERGED

    @property
    def modules(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module path -> (A (r, K), B (N, r)), where both are there."""
        names = [key.removesuffix(_A) for key in self.tensors if key.endswith(_A)]
        pairs = {n: (self.tensors[n + _A], self.tensors.get(n + _B)) for n in names}
        return {n.removeprefix(PREFIX): (a, b) for n, (a, b) in pairs.items() if b is not None}

    @property
    def others(self) -> dict[str, Tensor]:
        """All but the lora_A and lora_B tensors, by their names in the base model."""
        keys = [key for key in self.tensors if not key.endswith((_A, _B))]
        keys.sort(key=lambda key: (key.rpartition(".")[0], not key.endswith(".weight"), key))
        return {key.removeprefix(PREFIX): self.tensors[key] for key in keys}

    @property
    def largest_rank(self) -> int:
        """The largest rank that the configuration or a tensor has."""
        return max([int(self.config["r"]), *(a.shape[0] for a, _ in self.modules.values())])


def read(path: str | os.PathLike[str]) -> PeftFile:
    """The adapter in the folder `path`.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one and for a pickle.
    """
    file, pickle = Path(path) / TENSORS, Path(path) / PICKLE
    if pickle.exists() and not file.exists():
        raise ValueError(
            f"{pickle} is a pickle, which can run any code when it is loaded: refused. Load it "
            "with PEFT where you trust it, and save_pretrained writes a safetensors file"
        )
    for needed in (file, file.with_name(CONFIG)):
        if not needed.exists():
            raise FileNotFoundError(
                f"{needed} is not there: PEFT's save_pretrained writes {TENSORS} and {CONFIG} into "
                "one folder"
            )
    config = read_json(Path(path) / CONFIG)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged or half-written ({error}): export it again") from error
    return PeftFile(config, _each_once(tensors))


def _each_once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the copies that PEFT may write beside what is trained whole: `X.modules_to_save.…`,
    the same as `X.…`, and `X.original_module.…`, what it was before.
    """
    found = {}
    for key, tensor in tensors.items():
        of, inner, rest = key.partition(".modules_to_save.")
        names = rest, rest.partition(".")[2]  # with the adapter's name first, in some versions
        plain = [tensors[f"{of}.{name}"] for name in names if inner and f"{of}.{name}" in tensors]
        copied = any(t.dtype == tensor.dtype and t.equal(tensor) for t in plain)
        if ".original_module." not in key and not copied:
            found[key] = tensor
    return found


def ranks_in_file(ranks: Mapping[str, int], padded: bool) -> dict[str, int]:
    """Name -> the rank of its A and B in a file of adapters with these `ranks`: `padded` one for
    all, else each its own, and none for 0.
    """
    if padded:
        return dict.fromkeys(ranks, padded_rank(ranks))
    return {name: rank for name, rank in ranks.items() if rank}


def as_pattern(values: Mapping[str, int]) -> dict[str, int]:
    """The pattern that gives each module its own value: by its name, or a regex from "^" on where
    that is also how another's name ends, since PEFT matches a key with the end of a name.
    """
    ends = {name[dot.end() :] for name in values for dot in re.finditer(r"\.", name)}
    return {f"^{re.escape(k)}" if k in ends else k: value for k, value in values.items()}


def padded_rank(ranks: Mapping[str, int]) -> int:
    """One rank for all, as vLLM wants it."""
    return max(8, 1 << (max(1, *ranks.values()) - 1).bit_length())


def elements_of(targets: Sequence[Target], ranks: Mapping[str, int], padded: bool) -> int:
    """Elements of all A and B in a file of adapters with these ranks: each target has its own."""
    held = ranks_in_file(ranks, padded)
    return sum(target._replace(r=held.get(target.name, 0)).parameters for target in targets)


class Layout(NamedTuple):
    """What PEFT's configuration says: the task, its targets, and what it wraps whole."""

    task: str | None
    target_modules: list[str] | str
    modules_to_save: list[str]
    saved_tensors: list[str]


def layout_of(
    model: nn.Module, adapters: Adapters, targets: list[str], instead: str = MERGED
) -> Layout:
    """How PEFT adapts just these targets and saves just our modules.

    Raises ValueError where it cannot, and says what to do `instead`.
    """
    _require_places(model, targets, instead)
    saved = _saved_whole(model, adapters)
    if "" in saved:
        raise ValueError(f"peft cannot save a tensor of the model itself: {instead}")
    state, reason = base_state(model), ""
    for task in dict.fromkeys((task_of(model)[0], None)):  # a task may save too much whole
        found = _layout_for(task, model, state, adapters.trained, targets, saved)
        if isinstance(found, Layout):
            _require_twins(state, adapters.trained, found.saved_tensors, instead)
            return found
        reason = found
    raise ValueError(f"peft cannot adapt these targets: {reason}. Instead, {instead}")


def _require_places(model: nn.Module, targets: Sequence[str], instead: str) -> None:
    """Raises ValueError for a target that PEFT does not take where it is."""
    modules = modules_of(model, once=False)
    kind = configuration_of(model).get("model_type")
    places: dict[nn.Module, set[tuple[nn.Module, str]]] = {}
    for name, module in modules.items():
        parent, _, attribute = name.rpartition(".")
        places.setdefault(module, set()).add((modules[parent], attribute))
    for name in targets:
        if not name or len(places[modules[name]]) > 1:
            where = "is the model itself" if not name else "has several names in the model"
            raise ValueError(f"peft cannot adapt {name or type(model).__name__}: it {where}")
        if kind in _MAMBA and name.endswith("out_proj"):
            raise ValueError(f"peft refuses {name} in a {kind} model: {instead}")


def _saved_whole(model: nn.Module, adapters: Adapters) -> list[str]:
    """The modules that are saved whole: those of the configuration that are trained, and those of
    tensors that were made trainable after `inject`.
    """
    trained = adapters.trained
    named = saved_modules(model, adapters.plan.config)
    saved = [m for m in named if any(inside(key, m) for key in trained)]
    for key in trained:
        if not any(inside(key, m) for m in saved):
            saved.append(key.rpartition(".")[0])
    return saved


def _layout_for(
    task: str | None, model: nn.Module, state: Iterable[str], trained: Mapping[str, Tensor],
    targets: list[str], saved: Sequence[str],
) -> Layout | str:  # fmt: skip
    """With this task_type, whose heads PEFT saves whole, too; or why PEFT could not do it so."""
    names = modules_of(model, once=False)
    every = {name: m for name, m in names.items() if name and not inside(name, "lora_bank")}
    of_task = TASK_HEADS.get(task or "", ())
    whole = [name for name in every if name.endswith(tuple(of_task))]
    own = [m for m in saved if not any(m != w and inside(m, w) for w in whole)]
    wanted = [*own, *of_task]
    wrapped = [name for name in every if name.endswith(tuple(wanted))]
    if nested := [n for n in wrapped if any(n != w and inside(n, w) for w in wrapped)]:
        return f"it saves {nested[0]} whole, and what that is in, too"
    once = [name for name in modules_of(model) if name in every]  # as PEFT walks for targets
    spelled = _spelling(once, targets, wanted)
    within = [t for t in targets if any(inside(t, w) for w in wrapped)]
    if within or spelled is None:
        target = (within or targets)[0]
        if also := [key for key in trained if inside(key, target)]:  # as its bias
            return f"{also[0]} is trained too, and it saves that with all of {target} alone"
        return f"it saves whole what ends in {', '.join(wanted)}, {target} too"
    tensors = [key for key in state if any(inside(key, w) for w in wrapped)]
    weights = packed(model)
    if kept := [key for key in tensors if key in weights and key not in trained]:
        return f"it saves {kept[0]} whole, which is quantised"
    return Layout(task, spelled, own, tensors)


def _require_twins(
    state: Mapping[str, Tensor], trained: Iterable[str], saved: Sequence[str], instead: str
) -> None:
    """Raises ValueError where a trained tensor has another name that is not saved."""
    for key, value in state.items():
        twin = next((k for k in trained if state[k] is value and key not in saved), None)
        if twin is not None:
            raise ValueError(
                f"peft cannot save {twin} apart from {key}, which is the same tensor: name the "
                f"modules of both in modules_to_save, or {instead}"
            )


def configuration_of(model: nn.Module) -> Mapping[str, Any]:
    """The configuration of a model of transformers, as plain data; empty for any other."""
    plain: Any = getattr(getattr(model, "config", None), "to_dict", dict)()
    return plain if isinstance(plain, Mapping) else {}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of an injected model without its bank: the tensors themselves, not copies."""
    state = tensors_of(model, keep_vars=True)
    return {key: value for key, value in state.items() if not inside(key, "lora_bank")}


def _spelling(names: list[str], targets: list[str], saved: list[str]) -> list[str] | str | None:
    """`target_modules` by which PEFT finds these targets and no other module, None where none does.

    The ends of the names where they suffice, else the names, else a regex of them.
    """
    free = [n for n in names if not any(re.match(rf"(^|.*\.){m}($|\..*)", n) for m in saved)]
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in targets))
    for spelled in (ends, targets):
        endings = tuple("." + end for end in spelled)
        if {n for n in free if n in spelled or n.endswith(endings)} == set(targets):
            return spelled
    return f"({'|'.join(map(re.escape, targets))})" if set(targets) <= set(free) else None


def loader_of(task: str | None) -> str | None:
    """The class of transformers that loads the base model of an adapter for this task_type."""
    return next((loader for known, loader in _TASKS.values() if known == task), None)


def task_of(model: nn.Module) -> tuple[str | None, str]:
    """(task_type, the class of transformers that loads the base model), by the model's class."""
    classes = type(model).__mro__
    names = [cls.__name__ for cls in classes]
    for cls in classes[: names.index("PreTrainedModel") if "PreTrainedModel" in names else 0]:
        name = cls.__name__
        for ending, (task, loader) in _TASKS.items():
            if not name.endswith(ending) or name.endswith(("PreTrainedModel", "HeadsModel")):
                continue
            if loader == "AutoModel" and not _is_auto_model(cls, model):
                continue
            if task == "SEQ_2_SEQ_LM" and not getattr(model.config, "is_encoder_decoder", False):
                continue
            if task.endswith("_LM") and not hasattr(model, "prepare_inputs_for_generation"):
                continue
            if not set(_INPUTS.get(task, _TEXT)) <= set(signature(type(model).forward).parameters):
                continue  # PeftModelFor... passes text, and this model takes no text
            return task, loader
    return None, type(model).__name__


def _is_auto_model(cls: type, model: Any) -> bool:
    from transformers import MODEL_MAPPING  # here: a model of it is there

    found = MODEL_MAPPING.get(type(model.config), None)
    return cls in (found if isinstance(found, tuple) else (found,))
