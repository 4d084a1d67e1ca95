"""LoRA-drop (Zhou et al., COLING 2025): keep LoRA where its output matters, share one elsewhere.

inject -> probe -> select -> share -> train -> export. Importing this package loads nothing; each
name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from loradrop._version import __version__ as __version__

if TYPE_CHECKING:
    from loradrop.bank import AdapterBank as AdapterBank
    from loradrop.config import LoRAConfig as LoRAConfig
    from loradrop.config import LoraDropConfig as LoraDropConfig
    from loradrop.config import TrainConfig as TrainConfig
    from loradrop.formats.check import verify as verify
    from loradrop.formats.in_memory import AdapterTensors as AdapterTensors
    from loradrop.formats.in_memory import adapter_tensors as adapter_tensors
    from loradrop.formats.peft import export as export
    from loradrop.integrations.peft import accelerate_peft as accelerate_peft
    from loradrop.integrations.peft import restore_peft as restore_peft
    from loradrop.layers import LoRALinear as LoRALinear
    from loradrop.loading import load as load
    from loradrop.merging import merge as merge
    from loradrop.methods import LoRA as LoRA
    from loradrop.methods import LoRADrop as LoRADrop
    from loradrop.methods import Method as Method
    from loradrop.methods import Spectral as Spectral
    from loradrop.native import save as save
    from loradrop.op.linear import lora_add as lora_add
    from loradrop.op.linear import lora_linear as lora_linear
    from loradrop.optimizers import parameter_groups as parameter_groups
    from loradrop.plan import Plan as Plan
    from loradrop.probing import probe as probe
    from loradrop.scores import Scores as Scores
    from loradrop.scores import Target as Target
    from loradrop.selection import select as select
    from loradrop.sharing import share as share
    from loradrop.spectral.allocation import allocate as allocate
    from loradrop.spectral.spectra import Spectrum as Spectrum
    from loradrop.spectral.spectra import spectrum as spectrum
    from loradrop.surgery import disabled as disabled
    from loradrop.surgery import inject as inject
    from loradrop.surgery import remove as remove
    from loradrop.text.task import DataConfig as DataConfig
    from loradrop.text.task import load_task as load_task
    from loradrop.training.any_trainer import LoraDropCallback as LoraDropCallback
    from loradrop.training.averaging import keep_whole as keep_whole
    from loradrop.training.fit import fit as fit
    from loradrop.truncation import truncate as truncate

_NAMES = {
    "bank": "AdapterBank",
    "config": "LoRAConfig LoraDropConfig TrainConfig",
    "formats.check": "verify",
    "formats.in_memory": "AdapterTensors adapter_tensors",
    "formats.peft": "export",
    "integrations.peft": "accelerate_peft restore_peft",
    "layers": "LoRALinear",
    "loading": "load",
    "merging": "merge",
    "methods": "LoRA LoRADrop Method Spectral",
    "native": "save",
    "op.linear": "lora_add lora_linear",
    "optimizers": "parameter_groups",
    "plan": "Plan",
    "probing": "probe",
    "scores": "Scores Target",
    "selection": "select",
    "sharing": "share",
    "spectral.allocation": "allocate",
    "spectral.spectra": "Spectrum spectrum",
    "surgery": "disabled inject remove",
    "text.task": "DataConfig load_task",
    "training.any_trainer": "LoraDropCallback",
    "training.averaging": "keep_whole",
    "training.fit": "fit",
    "truncation": "truncate",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        return _module(name)
    return getattr(importlib.import_module(f"loradrop.{_HOME[name]}"), name)


def _module(name: str) -> Any:
    """A module of the package by its name, which `import loradrop` has not loaded."""
    whole = f"loradrop.{name}"
    try:
        if not name.startswith("_"):
            return importlib.import_module(whole)
    except ModuleNotFoundError as error:
        if error.name != whole:
            raise
    raise AttributeError(f"module 'loradrop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
