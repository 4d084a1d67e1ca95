"""What a user chooses: `LoRAConfig` and its method for the adapters, `TrainConfig` for training."""

import dataclasses
import difflib
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loradrop import methods
from loradrop.methods import LoRA, LoRADrop, Method
from loradrop.op.philox import quantize
from loradrop.options import check_kinds, plain
from loradrop.peft_names import CHANGES, HARMLESS
from loradrop.statistics.masks import MASK

_OF_PEFT = ("base_model_name_or_path", "peft_type", "is_prompt_learning", "task_type")
# What other libraries call an option
_ALIASES = {
    **{"rank": "r", "lora_r": "r", "lora_rank": "r", "alpha": "lora_alpha", "lr": "learning_rate"},
    **{"dropout": "lora_dropout", "targets": "target_modules", "max_steps": "steps"},
    **{"num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size"},
    **{"gradient_accumulation_steps": "gradient_accumulation", "max_seq_length": "max_length"},
    **{"path": "source", "file": "source", "text_column": "text", "label_column": "label"},
}


# By the names that options have for them.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """LoRA's options in PEFT's spelling, and `method`: what A and B are and when that changes.

    r                 rank; `rank_pattern` overrides it for the targets whose name a key (a regex)
                      matches
    lora_alpha        the delta is scaled by s = lora_alpha / r, by lora_alpha / sqrt(r) with
                      `use_rslora`
    lora_dropout      probability of dropping an element of a target's input on its way into A
    target_modules    names or suffixes of names; a string is a regex for the whole name;
                      "all-linear" is every linear layer but the head; None is the query and value
                      projections
    exclude_modules   removes from these, with the same matching
    modules_to_save   modules trained and saved whole; None is the head of a task: what a class for
                      classification, question answering or multiple choice has beside its base
                      model, elsewhere what ends in classifier, score or qa_outputs
    adapter_dtype     "float32", or "base" for the dtype of each target's weight
    strict            False allows entries of `target_modules`, exclusions and patterns that match
                      nothing, and targets that no step of training calls

    Raises ValueError naming the field, its value and the remedy.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    adapter_dtype: str = "float32"
    strict: bool = True
    method: Method = field(default_factory=LoRA)

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(given := getattr(self, name), Mapping):
                raise ValueError(f"{name}={given!r}: give a mapping of names, as {{'query': 4}}")
            object.__setattr__(self, name, {key: plain(value) for key, value in given.items()})
        object.__setattr__(self, "r", plain(self.r))
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
                raise ValueError(f"{name}={rank!r}: the rank is a whole number of at least 1")
        check_kinds(self)
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
            if not number or not math.isfinite(alpha) or alpha <= 0:
                raise ValueError(f"{name}={alpha!r}: choose a positive number; s = alpha / r")
        try:
            quantize(self.lora_dropout)
        except ValueError as error:
            raise ValueError(f"lora_{error}") from error
        if self.adapter_dtype not in ("float32", "base"):
            raise ValueError(f'adapter_dtype={self.adapter_dtype!r}: choose "float32" or "base"')
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str) or value is None:
                continue
            if not isinstance(value, Iterable) or not all(isinstance(of, str) for of in value):
                raise ValueError(f'{name}={value!r}: give names as text, as ["0", "2"]')
            object.__setattr__(self, name, tuple(value))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                _check_regex(name, value, re.compile)
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                _check_regex(f"a key of {name}", key, _compiled)
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save={self.modules_to_save!r}: give a list of names")
        if not isinstance(self.method, Method):
            raise ValueError(f"method={self.method!r}: give a loradrop Method such as LoRADrop()")

    def __getattr__(self, name: str) -> Any:
        """Only for what is not there: a name of PEFT's says whose configuration this is."""
        if name in _OF_PEFT:
            raise AttributeError(
                f"this is a configuration of loradrop ({type(self).__name__}), for loradrop.inject "
                "and fit: give PEFT or TRL a LoraDropConfig of loradrop.integrations.peft, whose "
                "to_peft(config) makes one of this"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def rank(self, name: str) -> int:
        """The rank of the adapter of the target `name`."""
        return int(first_match(self.rank_pattern, name, self.r))

    def scaling(self, name: str) -> float:
        """The factor s of the delta of the target `name`."""
        alpha, r = float(first_match(self.alpha_pattern, name, self.lora_alpha)), self.rank(name)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON or YAML file; `from_dict` reads it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["method"] = {"name": self.method.name, **dataclasses.asdict(self.method)}
        return {name: _data(value) for name, value in fields.items()}

    def require_plain(self) -> None:
        """Raises ValueError for an option that no file could hold."""
        for key, value in self.to_dict().items():
            for name, one in value.items() if key == "method" else [(key, value)]:
                try:
                    json.dumps(one)
                except TypeError as error:
                    where = f"the method {self.method.name!r}" if key == "method" else "the config"
                    raise ValueError(
                        f"{name}={one!r} of {where} is a {type(one).__name__}, which no file of an "
                        "adapter can hold: use a number, a text, a list or a dictionary of these"
                    ) from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LoRAConfig":
        """What `to_dict` wrote. Raises ValueError for an unknown key, naming the nearest known."""
        data = dict(data)
        given = dict(data.pop("method", {"name": "lora"}))
        method_class = methods.get(given.pop("name", "lora"))
        check_keys(data, [f.name for f in dataclasses.fields(cls)], "LoRAConfig")
        check_keys(given, [f.name for f in dataclasses.fields(method_class)], method_class.__name__)
        return cls(method=method_class(**given), **data)


def _check_regex(name: str, given: str, compile: Callable[[str], object]) -> None:
    try:
        compile(given)
    except re.error as error:
        raise ValueError(f"{name}={given!r} is no regular expression: {error}") from error


def _data(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _data(part) for key, part in value.items()}
    return [*map(_data, value)] if isinstance(value, tuple) else value


def require_config(config: Any) -> None:
    """Raises TypeError for anything but a `LoRAConfig`, naming where PEFT's goes."""
    if isinstance(config, LoRAConfig):
        return
    kind, remedy = type(config), "give loradrop.LoRAConfig(...) or loradrop.LoraDropConfig(...)"
    if hasattr(config, "peft_type"):
        remedy = (
            "that is for PEFT's get_peft_model. loradrop.integrations.peft.from_peft(config) makes "
            "a loradrop.LoRAConfig of it"
        )
    raise TypeError(f"config is a {kind.__module__}.{kind.__qualname__}: {remedy}")


def LoraDropConfig(**options: Any) -> LoRAConfig:  # noqa: N802 - it is spelled like the class it makes
    """`LoRAConfig(..., method=LoRADrop(...))` with the options of both in one call.

    Raises ValueError for an option that neither has, with the nearest one that exists.
    """
    of_method = {f.name for f in dataclasses.fields(LoRADrop)}
    of_config = {f.name for f in dataclasses.fields(LoRAConfig)} - {"method"}
    check_keys(options, [*of_config, *of_method], "LoraDropConfig")
    method = LoRADrop(**{k: v for k, v in options.items() if k in of_method})
    return LoRAConfig(method=method, **{k: v for k, v in options.items() if k not in of_method})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the rest of transformers' TrainingArguments goes into `extra`.

    steps           optimiser steps in all, warm-up included; None is `epochs` passes over the data
    head_learning_rate   of what is trained whole beside the adapters, as a new head; None is
                    learning_rate. In `fit` and the command
    warmup_ratio    part of all steps over which the learning rate rises; then it falls linearly
    max_grad_norm   the gradients' norm is clipped to it; None or 0 clips nothing
    precision       "float32", "bf16" or "fp16" (autocast); bf16 on a CPU that has none computes in
                    float32
    save_every      steps between checkpoints; log_every, eval_every likewise; below 1 each is a
                    part of the main run's steps. eval_every=None is dev only at the end, for the
                    command five times, or at each checkpoint with load_best_model_at_end
    mask            the model's input that marks real tokens, for the statistics; None counts all

    Raises ValueError naming the field, its value and the remedy.
    """

    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup_ratio: float = 0.06
    max_grad_norm: float | None = 1.0
    precision: str = "float32"
    gradient_checkpointing: bool = False
    seed: int = 0
    log_every: float = 10
    save_every: float = 100
    eval_every: float | None = None
    mask: str | None = MASK
    report_to: Sequence[str] | str = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in (
            *("steps", "epochs", "batch_size", "gradient_accumulation", "learning_rate"),
            *("head_learning_rate", "log_every", "save_every", "eval_every"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}: choose a positive number")
            if name.endswith("_every") and value is not None and value > 1 and value % 1:
                raise ValueError(
                    f"{name}={value!r}: choose a whole number of steps, or a part of them below 1"
                )
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: choose a number from 0 up")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio!r}: choose a part of all steps in [0, 1]"
            )
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed!r}: choose a whole number in [0, 2**32)")
        if isinstance(self.report_to, str):
            object.__setattr__(self, "report_to", (self.report_to,))
        if self.precision not in ("float32", "bf16", "fp16"):
            raise ValueError(f"precision={self.precision!r}: choose float32, bf16 or fp16")


def check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises ValueError for the first key of `given` that `where` does not know."""
    for key in given:
        if key not in known:
            raise ValueError(f"{where} has no option {key!r}: {_hint(key, known)}")


def _hint(key: str, known: Sequence[str]) -> str:
    if _ALIASES.get(key) in known:
        return f"did you mean {_ALIASES[key]!r}?"
    if key in CHANGES:
        return f"it is PEFT's, and its adapter would not be s·B·A over the base: {CHANGES[key]}"
    if key in HARMLESS and key not in LoRAConfig.__dataclass_fields__:
        return "it is PEFT's, and has no counterpart here"
    near = difflib.get_close_matches(key, known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"


def pattern_matches(key: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern`, a regex, matches the end of the name."""
    return _compiled(key).match(name) is not None


@functools.cache  # unlike re's own cache, of all keys: there may be one for each of many targets
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def first_match(pattern: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first key that matches the name, as in PEFT's patterns."""
    return next((value for key, value in pattern.items() if pattern_matches(key, name)), default)
