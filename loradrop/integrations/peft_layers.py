"""PEFT's LoRA layers with our op: with adapters of their own, or with those of a bank.

A layer of PEFT gets another class, as `layers.adapt` does it: its modules, hooks and state-dict
keys stay, and only its forward is ours. What the op does not compute is left to PEFT's forward.
"""

from typing import Any

from peft.tuners.lora import LoraConfig
from torch import Tensor, nn

from loradrop.bank import Link, Observer, Pair
from loradrop.layers import adapted_output, is_conv1d

_PLAIN = (nn.Parameter, Tensor)
_LINEAR = ("Linear", "Linear8bitLt", "Linear4bit", "TorchaoLoraLinear")
_OF_PEFT = ("adapter_names", "alora_offsets")  # arguments that only PEFT's forward understands


class Accelerated(nn.Module):
    """Over a layer of PEFT that adds s·B·A·x to its base: the same from our op.

    It runs in every call, so it asks the dictionaries of modules, not their attributes, which are
    microseconds slower.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., K)  ->  (..., N), as PEFT's"""
        names = None if self._left_to_peft(kwargs) else self._served()
        if names is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base: Any = self._modules["base_layer"]
        dropouts: Any = self._modules["lora_dropout"]
        scaling: Any = self.scaling
        weight, bias = None, None
        y: Tensor | None = None
        if names and not (args or kwargs) and called_plainly(base):
            weight, bias = _matrix_of(base)
        if weight is None:
            y = base(x, *args, **kwargs)
        for name in names:
            A, B = self._factors(name)
            if x.device != A.device:
                A, B = A.to(x.device), B.to(x.device)
            dropout = dropouts._modules[name]
            p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
            how = (A, B, scaling[name], p, self._observer(name))
            y = adapted_output(x, weight, bias, y, *how)
        assert y is not None
        return y

    def _left_to_peft(self, kwargs: Any) -> bool:
        """Whether the op does not compute this call."""
        layer: Any = self
        if layer._disable_adapters or layer.merged_adapters:
            return True
        return bool(kwargs) and any(name in kwargs for name in _OF_PEFT)

    def _active(self) -> Any:
        active: Any = self._active_adapter
        return (active,) if isinstance(active, str) else active

    def _served(self) -> list[str] | None:
        """The active adapters that this layer has; None where one of them is not s·B·A·x."""
        here: Any = self._modules["lora_A"]
        names = [name for name in self._active() if name in here._modules]
        for name in names:
            if why_not(self, name) is not None:
                return None
        return names

    def _factors(self, name: str) -> Pair:
        A, B = _pair_of(self, name)
        return A._parameters["weight"], B._parameters["weight"]

    def _observer(self, name: str) -> Observer | None:
        return None


class Banked(Accelerated):
    """Over a layer of PEFT whose adapters are those of a bank."""

    links: dict[str, Link]
    r: dict[str, int]

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **_: Any
    ) -> None:
        """One more adapter, as PEFT calls it; the tuner links its factors to a bank."""
        layer: Any = self
        if not isinstance(layer.lora_A, References):
            layer.lora_A, layer.lora_B = References(), References()
            self.links = {}
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = r, lora_alpha
        layer.scaling[adapter_name] = lora_alpha / (r**0.5 if config.use_rslora else r)
        layer.use_rslora[adapter_name] = config.use_rslora
        layer.use_dora[adapter_name] = layer.lora_bias[adapter_name] = False
        p = config.lora_dropout
        layer.lora_dropout[adapter_name] = nn.Dropout(p) if p > 0.0 else nn.Identity()
        layer.lora_A[adapter_name], layer.lora_B[adapter_name] = Factor(0), Factor(1)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def link(self, name: str, link: Link) -> None:
        """The adapter `name` is target `link` of a bank."""
        layer: Any = self
        self.links[name] = link
        for factors in (layer.lora_A, layer.lora_B):
            factors.held(name).link = link

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, also where this target has lost its adapter."""
        layer: Any = self
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self.links.pop(adapter_name, None)
        for factors in (layer.lora_A, layer.lora_B):
            factors.forget(adapter_name)

    def _served(self) -> list[str]:
        links = self.links
        names = [name for name in self._active() if name in links]
        return [name for name in names if links[name].factors() is not None]

    def _factors(self, name: str) -> Pair:
        link = self.links[name]
        pair = link.factors()
        assert pair is not None
        if pair[0].is_meta:
            link.bank.bring_back()
            pair = link.factors() or pair
        return pair

    def _observer(self, name: str) -> Observer | None:
        return self.links[name].observer


class Factor(nn.Module):
    """A (side 0) or B (side 1) of a target, where PEFT looks for it: `lora_A[name].weight`.

    It owns nothing, so the tensor is in the model once, in the bank.
    """

    bias = None

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.link: Link | None = None

    @property
    def weight(self) -> Tensor:
        """The Parameter in the bank, whichever it is now."""
        assert self.link is not None
        pair = self.link.factors()
        assert pair is not None
        return pair[self.side]

    @property
    def gone(self) -> bool:
        """Whether the target has no adapter any more."""
        return self.link is not None and self.link.factors() is None

    def parameters(self, recurse: bool = True) -> Any:
        """The Parameter, which PEFT freezes and trains by this."""
        return iter(() if self.link is None or self.gone else (self.weight,))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K)  ->  (..., r), or (..., r)  ->  (..., N)"""
        return nn.functional.linear(x, self.weight)


class References(nn.ModuleDict):
    """Adapter name -> its `Factor`, where PEFT looks for it; it is not among the submodules."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "_held", {})

    _held: dict[str, Factor]

    def held(self, name: str) -> Factor:
        """The factor, also of a target without an adapter."""
        return self._held[name]

    def extra_repr(self) -> str:
        """The names; what they refer to is shown where the banks are."""
        return ", ".join(f"({name}): in lora_banks" for name in self.keys())

    def forget(self, name: str) -> None:
        """Without the adapter `name`, if it is here."""
        self._held.pop(name, None)

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(key)
        return self._held[key]

    def __setitem__(self, key: str, module: Any) -> None:
        self._held[key] = module

    def __delitem__(self, key: str) -> None:
        del self._held[key]

    def __contains__(self, key: str) -> bool:
        return key in self._held and not self._held[key].gone

    def __len__(self) -> int:
        return len(self.keys())

    def __iter__(self) -> Any:
        return iter(self.keys())

    def keys(self) -> Any:
        """The adapters that this target has."""
        return dict.fromkeys(name for name, factor in self._held.items() if not factor.gone).keys()

    def items(self) -> Any:
        """Pairs of a name and its factor."""
        return [(name, self._held[name]) for name in self.keys()]

    def values(self) -> Any:
        """The factors."""
        return [self._held[name] for name in self.keys()]


def is_linear(kind: type) -> bool:
    """Whether a class of PEFT's layers adds s·B·A·x to a linear layer, plain or quantised."""
    return kind.__name__ in _LINEAR and kind.__module__.startswith("peft.tuners.lora.")


def why_not(layer: Any, name: str) -> str | None:
    """Why the op does not compute the adapter `name` of a layer of PEFT; None where it does."""
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is not plain LoRA"
    if layer.lora_bias.get(name):
        return "lora_bias=True: B has a bias"
    for factor in _pair_of(layer, name):
        if type(factor) is not nn.Linear or not called_plainly(factor):
            return "hooks or another class around A or B have to see them called"
        weight: Any = factor._parameters["weight"]
        if type(weight) not in _PLAIN or weight.is_meta:
            return f"A or B is a {type(weight).__name__}, or offloaded: it comes when it is called"
    dropout = layer._modules["lora_dropout"]._modules[name]
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"its dropout is a {type(dropout).__name__}"
    return None


def _pair_of(layer: Any, name: str) -> tuple[Any, Any]:
    """PEFT's modules of A and B."""
    modules = layer._modules
    return modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]


def called_plainly(module: Any) -> bool:
    """Whether calling the module runs the forward of its class and nothing around it."""
    hooks = (
        module._forward_hooks or module._forward_pre_hooks
        or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip
    return not hooks and "forward" not in module.__dict__


def _matrix_of(base: Any) -> tuple[Tensor | None, Tensor | None]:
    """(weight (N, K), bias) of a base that is a plain linear map of them, else (None, None)."""
    if type(base) is nn.Linear:
        own = base._parameters
        return own["weight"], own["bias"]
    if type(base).__name__ == "Conv1D" and is_conv1d(base):
        return base.weight.T, base.bias
    return None, None
