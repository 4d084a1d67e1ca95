"""`LoraDropConfig`: PEFT's configuration of LoRA, and the options of LoRA-drop beside it."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from peft import LoraConfig

from loradrop.config import LoRAConfig
from loradrop.files import write_text
from loradrop.formats.card import END, START, with_part
from loradrop.formats.peft_file import OURS, TASK_HEADS
from loradrop.formats.peft_options import require_plain
from loradrop.methods import LoRA, LoRADrop
from loradrop.peft_names import CHANGES
from loradrop.selection import INTERVAL

_UNSERVED = CHANGES | {
    "ensure_weight_tying": "it ties the adapters of tied embeddings, which are not adapted here",
    "megatron_config": "layers of Megatron are not adapted here",
}
_ONLY_OF_PEFT = {  # name -> what it is where it asks for nothing, and what to do
    "bias": ("none", "it trains no biases of the base"),
    "layers_to_transform": (None, "give target_modules that name these layers, such as a regex"),
    "init_lora_weights": (True, "adapters start as LoRA's own there, with B at zero"),
    "plan": (None, "loradrop.share(model, kept) makes what was decided elsewhere"),
}
_COMMON = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules")
_PATTERNS = ("rank_pattern", "alpha_pattern", "use_rslora")


_HOW_TO_OPEN = """\
## How to open this adapter

Its type is LORADROP, in which layers share adapters. PEFT learns it from the package loradrop:

```python
import loradrop.integrations.peft
from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

`loradrop.export(model, "folder")` writes an ordinary LoRA, for PEFT alone and for serving engines.
"""


class AdapterType(StrEnum):
    """The type of these adapters, spelled as PEFT spells its own."""

    LORADROP = OURS


@dataclass
class LoraDropConfig(LoraConfig):
    """`peft.LoraConfig` with the options of LoRA-drop, which mean the same as in `LoRADrop`.

    plan    what was decided elsewhere, and then no warm-up follows: the path of a plan.json, or of
            a folder that has one, or its contents; or the names of the targets that keep an adapter
            of their own, in a list. A saved adapter has its plan here

    Raises ValueError for an option of PEFT by which the adapter would not be s·B·A over the base's
    weight, naming it, and for options of LoRA-drop out of range.
    """

    threshold: float | None = None
    keep: int | None = None
    keep_ratio: float | None = None
    budget: float | None = None
    scope: str = "per_module"
    importance: str = "sqnorm"
    selection: str = "importance"
    selection_seed: int = 0
    share: str = "group"
    interval: int = INTERVAL
    share_init: str = "fresh"
    after_select: str = "reinit"
    probe_steps: float = 0.1
    sample_ratio: float = 1.0
    source: str = "online"
    settle_margin: float | None = None
    settle_every: int = 10
    plan: Any = field(default=None, metadata={"help": "What was decided: see the class."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = AdapterType.LORADROP
        for name, why in _UNSERVED.items():
            if value := getattr(self, name, None):
                raise ValueError(f"LoraDropConfig does not serve {name}={value!r}: {why}")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"LoraDropConfig does not serve init_lora_weights={self.init_lora_weights!r}: an "
                'adapter starts as LoRA\'s own (True), with A "gaussian", or with random B (False)'
            )
        if isinstance(self.plan, os.PathLike):
            self.plan = os.fspath(self.plan)
        _require_plan(self.plan)
        self.record(None, None)
        _ = self.method

    @property
    def method(self) -> LoRADrop:
        """The options of LoRA-drop."""
        return LoRADrop(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LoRADrop)})

    def record(self, plan: Mapping[str, Any] | None, unmeasured: str | None) -> None:
        """What the next `save_pretrained` says of an adapter: its plan, and why it is plain LoRA's
        where it is. `plan` itself stays what was asked for: a configuration may serve other models.
        """
        self._record, self._unmeasured = plan, unmeasured

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; it is the last file of an adapter.

        Raises ValueError, once all is written, for an adapter that was trained without the warm-up
        that its options ask for.
        """
        asked, unmeasured = self.plan, self._unmeasured
        _say_how_to_open(Path(save_directory))
        self.plan = asked if self._record is None else self._record
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.plan = asked
            self.record(None, None)
        if unmeasured is not None:
            raise ValueError(unmeasured)


def _say_how_to_open(folder: Path) -> None:
    """In the card, which PEFT writes first, and in which it says nothing of this type."""
    card = folder / "README.md"
    folder.mkdir(parents=True, exist_ok=True)
    existing = card.read_text(encoding="utf-8") if card.exists() else ""
    write_text(card, with_part(existing, f"{START}\n\n{_HOW_TO_OPEN}\n{END}"))


def _require_plan(plan: Any) -> None:
    if plan is None or isinstance(plan, (str, Mapping)):
        return
    if not (isinstance(plan, Sequence) and all(isinstance(name, str) for name in plan)):
        raise ValueError(
            f"plan={plan!r}: give the path of a plan.json, or the names of the targets that keep "
            "an adapter of their own"
        )


def to_peft(config: LoRAConfig, **options: Any) -> LoraConfig:
    """A loradrop configuration as PEFT's: `LoraDropConfig`, or `peft.LoraConfig` for plain LoRA.

    options   of PEFT alone, such as task_type. `strict` has no counterpart: PEFT warns where
              patterns match nothing. Raises ValueError for what PEFT's configuration cannot say.
    """
    if config.adapter_dtype != "float32":
        raise ValueError(
            f"adapter_dtype={config.adapter_dtype!r} is not an option of PEFT's configuration: "
            "pass autocast_adapter_dtype=False to get_peft_model"
        )
    given: dict[str, Any] = {name: getattr(config, name) for name in (*_COMMON, *_PATTERNS)}
    given["modules_to_save"] = config.modules_to_save
    for name, value in given.items():
        if isinstance(value, Mapping):
            given[name] = dict(value)
        elif isinstance(value, tuple):
            given[name] = list(value)
    if isinstance(config.method, LoRADrop):
        return LoraDropConfig(**dataclasses.asdict(config.method), **given, **options)
    if isinstance(config.method, LoRA):
        return LoraConfig(**given, **options)
    raise ValueError(
        f"the method {config.method.name!r} has no counterpart in PEFT: use loradrop.inject"
    )


def from_peft(config: LoraConfig, targets: Sequence[str] | None = None) -> LoRAConfig:
    """PEFT's configuration of LoRA, or a `LoraDropConfig`, as loradrop's.

    targets   the names of the modules that PEFT adapted, where it did: what else the configuration
              asks for is done, too

    The head that PEFT trains whole for a `task_type` is the model's: modules_to_save=None. Raises
    ValueError for an option that loradrop has not, naming it.
    """
    ours = isinstance(config, LoraDropConfig)
    if not ours:
        require_plain(config.to_dict())  # type: ignore[no-untyped-call]
    for name, (plain, why) in _ONLY_OF_PEFT.items() if targets is None else ():
        value = getattr(config, name, plain)
        if value != plain and not isinstance(value, Mapping):  # as a saved adapter has its plan
            raise ValueError(f"{name}={value!r} is not an option of loradrop.inject: {why}")
    given: dict[str, Any] = {name: getattr(config, name) for name in (*_COMMON, *_PATTERNS)}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(given[name], set):
            given[name] = sorted(given[name])
    if targets is not None:
        given |= {"target_modules": tuple(targets), "exclude_modules": None}
    saved: Any = tuple(config.modules_to_save or ())
    spelled = TASK_HEADS.get(config.task_type or "")  # PEFT names a head in every way
    if spelled is not None and set(saved) in (set(), set(spelled)):
        saved = None
    return LoRAConfig(
        method=config.method if isinstance(config, LoraDropConfig) else LoRA(),
        modules_to_save=saved, **given,
    )  # fmt: skip
