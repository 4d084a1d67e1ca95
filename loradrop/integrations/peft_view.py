"""A PeftModel's base model as `loradrop.inject` leaves one, for as long as a block of code runs.

Whatever works on an injected model then works on a PeftModel: probing, files, exports.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from loradrop.bank import AdapterBank
from loradrop.injection import Injection
from loradrop.layers import adapt, restore
from loradrop.wrapped import modules_of


@contextmanager
def viewed(
    model: nn.Module,
    layers: Sequence[tuple[str, Any]],
    bank: AdapterBank,
    injection: Injection,
    adapter: str,
) -> Iterator[nn.Module]:
    """Inside, the base layers carry the targets of `bank`, and PEFT's wrappers are out of the way:
    all `layers` (name in the model, layer), also those of other adapters.

    Modules that are trained whole stand where they belong, and `injection` knows their originals.
    """
    places = modules_of(model)
    wrappers = [
        (name, module)
        for name, module in places.items()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    ]
    numbers = {target.name: i for i, target in enumerate(bank.targets)}
    with ExitStack() as undo:
        for name, layer in layers:
            base = layer.base_layer
            _put(places, name, base, undo)
            if name in numbers:
                adapt(base, bank, numbers[name])
                undo.callback(restore, base)
        for name, wrapper in wrappers:
            _put(places, name, wrapper.modules_to_save[adapter], undo)
            for key, tensor in wrapper.original_module.state_dict(prefix=name + ".").items():
                injection.originals[key] = tensor.detach()
        undo.callback(injection.originals.clear)
        model.lora_bank, model._lora_injection = bank, injection  # type: ignore[assignment]
        undo.callback(delattr, model, "_lora_injection")
        undo.callback(delattr, model, "lora_bank")
        if "peft_config" in model.__dict__:  # by which PEFT takes a model for its own
            undo.callback(setattr, model, "peft_config", model.__dict__.pop("peft_config"))
        yield model


def _put(places: Mapping[str, nn.Module], name: str, module: nn.Module, undo: ExitStack) -> None:
    """Put the module in the place `name`, until `undo` puts back what is there."""
    parent, _, attribute = name.rpartition(".")
    place = places[parent]
    undo.callback(setattr, place, attribute, getattr(place, attribute))
    setattr(place, attribute, module)
