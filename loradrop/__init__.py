"""LoRA-drop (Zhou et al., COLING 2025): train LoRA briefly, keep it where its output matters,
share one elsewhere.

inject -> probe -> select -> share -> train -> export. Importing this package loads nothing; each
name is loaded when it is first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loradrop.bank import AdapterBank, Target
    from loradrop.config import LoRAConfig, LoraDropConfig
    from loradrop.data import DataConfig, load_task
    from loradrop.export import export
    from loradrop.inject import disabled, inject, merge, remove
    from loradrop.layers import LoRALinear
    from loradrop.methods import LoRA, LoRADrop, Method
    from loradrop.ops import lora_add, lora_linear
    from loradrop.plan import Plan
    from loradrop.probe import probe
    from loradrop.selection import Scores, select
    from loradrop.settings import TrainConfig
    from loradrop.share import share
    from loradrop.store import load, save
    from loradrop.train import fit
    from loradrop.verify import verify

__version__ = "0.1.0"

_HOME = {
    "AdapterBank": "bank",
    "DataConfig": "data",
    "LoRA": "methods",
    "LoRAConfig": "config",
    "LoRADrop": "methods",
    "LoRALinear": "layers",
    "LoraDropConfig": "config",
    "Method": "methods",
    "Plan": "plan",
    "Scores": "selection",
    "Target": "bank",
    "TrainConfig": "settings",
    "disabled": "inject",
    "export": "export",
    "fit": "train",
    "inject": "inject",
    "load": "store",
    "load_task": "data",
    "lora_add": "ops",
    "lora_linear": "ops",
    "merge": "inject",
    "probe": "probe",
    "remove": "inject",
    "save": "store",
    "select": "selection",
    "share": "share",
    "verify": "verify",
}

__all__ = [
    "AdapterBank",
    "DataConfig",
    "LoRA",
    "LoRAConfig",
    "LoRADrop",
    "LoRALinear",
    "LoraDropConfig",
    "Method",
    "Plan",
    "Scores",
    "Target",
    "TrainConfig",
    "disabled",
    "export",
    "fit",
    "inject",
    "load",
    "load_task",
    "lora_add",
    "lora_linear",
    "merge",
    "probe",
    "remove",
    "save",
    "select",
    "share",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'loradrop' has no attribute {name!r}")
    return getattr(importlib.import_module(f"loradrop.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """Keeps `loradrop.probe` the function, also once the submodule of the same name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
