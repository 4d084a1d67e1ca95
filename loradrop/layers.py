"""The layers: a frozen base plus a link into the bank. One mixin, three faces.

`LoRALinear` is an `nn.Linear` with the very same weight and bias Parameters, `LoRAConv1D` the same
for GPT-2's transposed layout, and `LoRAOver` adds the delta to the output of any other base module.
An adapted module keeps its identity, hooks and state-dict keys: `adapt` changes its class,
`restore` changes it back.
"""

import functools
import inspect
import re
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from loradrop import methods
from loradrop.bank import AdapterBank, Link, Observer, execution_device
from loradrop.config import LoRAConfig
from loradrop.injection import Injection
from loradrop.op.checks import check_base_gradient
from loradrop.op.linear import lora_add, lora_linear
from loradrop.pairs import LoRAPair
from loradrop.scores import Target, check_ranks
from loradrop.wrapped import parameters_of


def adapted_output(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y0: Tensor | None, A: Tensor, B: Tensor,
    s: float, dropout: float, observer: Observer | None,
) -> Tensor:  # fmt: skip
    """The op of a layer that is adapted: of its weight, or of the output y0 of its base.

    dropout    its probability, 0 outside of training; the seed is drawn here
    observer   what collects the statistics of the target, if anything does
    """
    seed = torch.randint(0, 1 << 62, (), device=x.device) if dropout > 0.0 else None
    more = {} if observer is None else observer.arguments(x)
    if y0 is not None:
        y = lora_add(y0, x, A, B, s, dropout=dropout, seed=seed, **more)
    else:
        assert weight is not None
        y = lora_linear(x, weight, bias, A, B, s, dropout=dropout, seed=seed, **more)
    if observer is not None and isinstance(y, tuple):  # of an offline probe
        y, norm = y
        observer.add(norm)
    result: Tensor = y
    return result


class LoRAMixin(nn.Module):
    """What the three faces share: from the link into the bank to the arguments of the op."""

    _lora: Link  # it refers to the bank, which must not be registered here
    _base: ClassVar[Any] = nn.Linear  # its class before `adapt`

    @property
    def base_layer(self) -> NoReturn:
        """Raises AttributeError: an adapted layer has no base_layer. PEFT asks for it before it
        wraps a layer, and would save its own adapter without ours: it gets a ValueError.
        """
        if sys._getframe(1).f_globals.get("__name__", "").startswith("peft."):
            raise ValueError(
                f"this {type(self).__name__} carries loradrop adapters, so PEFT cannot wrap it: "
                "call loradrop.remove(model) or merge(model) first, or export(model, path, "
                "format='peft') and load that with PEFT"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'base_layer'")

    def _adapted(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, y0: Tensor | None = None
    ) -> Tensor | None:
        """The op for the input x (..., K), None where this layer is its base alone.

        It runs in every call, so it makes nothing that nobody asked for.
        """
        link = self._lora
        bank = link.bank
        factors = link.factors() if bank.enabled else None
        if factors is None:
            return None
        A, B = factors
        if not x.device == A.device == B.device:  # a model spread over devices
            bank.bring_back()
            A, B = link.factors() or factors
            if A.is_meta or B.is_meta:
                raise ValueError(
                    "the adapters are on the meta device, without values: after model.to_empty "
                    "call reset_parameters() of every module in model.lora_bank that has it, or "
                    "inject once the model has its weights"
                )
            A, B = A.to(x.device), B.to(x.device)
        dropout = bank.dropout if self.training else 0.0
        return adapted_output(x, weight, bias, y0, A, B, link.scaling, dropout, link.observer)


class LoRALinear(LoRAMixin, nn.Linear):
    """y = xWᵀ + b + s·(x Aᵀ)Bᵀ in place of `nn.Linear`; `inject` makes them.

    `LoRALinear(in_features, out_features, r=8, ...)` is one on its own, with a bank of its own: the
    arguments of `nn.Linear`, then those of `LoRAConfig`. Use `inject` where a module reads the
    weight itself, as nn.TransformerEncoderLayer does in eval mode: it switches that off.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        config = LoRAConfig(**options)
        self._lora_injection = Injection(config, requires_grad=freeze(self))
        self.lora_bank = build_bank(config, [("", self)], self)
        adapt(self, self.lora_bank, 0)

    def reset_parameters(self) -> None:
        """Those of `nn.Linear`, and of an adapter of its own: A random, B zero."""
        super().reset_parameters()
        for module in self.children():  # the bank, once there is one
            for part in module.modules():
                if isinstance(part, LoRAPair):
                    part.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """x (..., K)  ->  (..., N); named as in `nn.Linear`"""
        y = self._adapted(input, self.weight, self.bias)
        return super().forward(input) if y is None else y


class LoRAConv1D(LoRAMixin):
    """GPT-2's `Conv1D`, whose weight is stored (K, N): the op reads it through its strides."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K)  ->  (..., N)"""
        y = self._adapted(x, self.weight.T, self.bias)
        return super().forward(x) if y is None else y


class LoRAOver(LoRAMixin):
    """Any base that maps (..., K) to (..., N): quantised layers, subclasses of `nn.Linear`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., K), the first argument of the base  ->  (..., N); all arguments go to the base"""
        y0: Tensor = super().forward(*args, **kwargs)
        base = self._base
        x = args[0] if args else kwargs[_first_argument(base)]
        if not isinstance(y0, Tensor) or y0.shape[:-1] != x.shape[:-1]:
            target, is_tensor = self._lora.bank.targets[self._lora.index], isinstance(y0, Tensor)
            raise TypeError(
                f"{target.name}, a {base.__name__}, made {tuple(y0.shape) if is_tensor else 'a '}"
                f"{'' if is_tensor else type(y0).__name__} of {tuple(x.shape)}, to which no "
                f"adapter can be added: exclude_modules=[{target.kind!r}] leaves it out"
            )
        check_base_gradient(x, y0, f"{base.__name__} under an adapter")
        y = self._adapted(x, None, None, y0)
        return y0 if y is None else y


@functools.cache
def _first_argument(base: Any) -> str:
    return list(inspect.signature(base.forward).parameters)[1]


class _Picklable:
    """Pickles an instance of a class that `adapted_class` made by what it was made from."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        if _Picklable not in type(self).__bases__:  # another library has extended the class
            return super().__reduce_ex__(protocol)
        face, base = type(self).__bases__[1:]
        return _blank, (face, base), self.__dict__


def _blank(face: type, base: type) -> Any:
    return object.__new__(adapted_class(face, base))


@functools.cache
def adapted_class(face: type, base: type) -> type[nn.Module]:
    """The class of a `base` with the forward of `face`; it pickles."""
    name = f"{face.__name__}[{base.__name__}]"
    return type(name, (_Picklable, face, base), {"__module__": face.__module__, "_base": base})


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, found without importing transformers."""
    return _is_conv1d(type(module))


def _is_conv1d(base: type) -> bool:
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in base.__mro__
    )


def as_weight(module: nn.Module, delta: Tensor) -> Tensor:
    """A delta (N, K) as the module stores its weight."""
    return delta.T if is_conv1d(module) else delta


def base_class(module: nn.Module) -> Any:
    """The class that an adapted module had before `adapt`; that of any other module."""
    return module._base if isinstance(module, LoRAMixin) else type(module)


def is_plain(module: nn.Module) -> bool:
    """Whether an adapted module's base computes xWᵀ + b and nothing else.

    A forward of its own is tried, in float64 and on a random weight, with rows of several sizes.
    """
    base: Any = base_class(module)
    if is_conv1d(module) or getattr(base, "forward", None) is nn.Linear.forward:
        return True
    random = torch.Generator().manual_seed(0)
    own = {k: v for k, v in module._parameters.items() if v is not None}
    made = {k: torch.randn(v.shape, generator=random, dtype=torch.float64) for k, v in own.items()}
    twin = _twin(module, made, {k: b.clone() for k, b in module._buffers.items() if b is not None})
    x = torch.randn(3, made["weight"].shape[1], generator=random, dtype=torch.float64)
    x *= torch.tensor([[0.01], [1.0], [100.0]])
    try:
        found: Tensor = base.forward(twin, x)
        expected = nn.functional.linear(x, made["weight"], made.get("bias"))
        return found.shape == expected.shape and torch.allclose(found, expected)
    except Exception:  # whatever a forward that is not a linear map raises
        return False


def keeps_rows(module: nn.Module) -> bool:
    """Whether (..., K) -> (..., N) is what a subclass of `nn.Linear` with a forward of its own
    computes, by trying it without values. One that cannot be tried so counts as if it did.
    """
    base, weight = base_class(module), module._parameters.get("weight")
    own = isinstance(module, nn.Linear) and base.forward is not nn.Linear.forward
    if not own or type(weight) is not nn.Parameter or not weight.is_floating_point():
        return True
    kinds = module._parameters, module._buffers
    empty = [{k: t.to("meta") for k, t in of.items() if t is not None} for of in kinds]
    x = torch.empty(2, 3, weight.shape[1], dtype=weight.dtype, device="meta")
    try:
        found = base.forward(_twin(module, *empty), x)
    except Exception:  # whatever it asks for
        return True
    return isinstance(found, Tensor) and found.shape == (2, 3, weight.shape[0])


def _twin(module: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Any]) -> Any:
    """An instance of the class before `adapt`, with these tensors in place of the module's own."""
    twin = object.__new__(base_class(module))
    own = {name: nn.Parameter(tensor, False) for name, tensor in parameters.items()}
    parts = {
        "_parameters": {**module._parameters, **own},
        "_buffers": {**module._buffers, **buffers},
    }
    twin.__dict__ = module.__dict__ | parts
    return twin


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a module that can be adapted, None for any other."""
    if is_conv1d(module):
        weight: Any = module.weight
        k, n = weight.shape
        return int(k), int(n)
    k, n = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (k, n) if isinstance(k, int) and isinstance(n, int) else None


def weight_of(module: nn.Module) -> Tensor:
    """The tensor that gives an adapter of `module` its device and dtype: the weight, or any."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    return (*module.parameters(), *module.buffers(), torch.empty(0))[0]


def freeze(model: nn.Module) -> dict[str, bool]:
    """Freeze every parameter. Returns name -> whether it was trainable."""
    before = {name: p.requires_grad for name, p in parameters_of(model).items()}
    model.requires_grad_(False)
    return before


def build_bank(
    config: LoRAConfig, found: Sequence[tuple[str, nn.Module]], model: nn.Module
) -> AdapterBank:
    """The bank that the method of `config` makes for these (name, module) of the model.

    Raises ValueError for a rank beyond min(in_features, out_features), where it adds nothing.
    """
    targets, likes = [], []
    for name, module in found:
        shape, weight = shape_of(module), weight_of(module)
        assert shape is not None
        targets.append(Target(name, name.rpartition(".")[2], *shape, config.rank(name)))
        narrow = config.adapter_dtype == "base" and weight.is_floating_point()
        dtype = weight.dtype if narrow else torch.float32
        likes.append(torch.empty(0, dtype=dtype, device=_home(model, name, weight)))
    scaling = [config.scaling(target.name) for target in targets]
    bank = config.method.bank(targets, scaling, likes)
    methods.require_bank(config.method, bank, targets)
    if config.method.rank_limited:
        check_ranks(bank.targets)
    bank.dropout, bank.composition = config.lora_dropout, config.method.composition
    return bank


def _home(model: nn.Module, name: str, weight: Tensor) -> torch.device:
    """Where the adapter of the module `name` is used, also if accelerate offloads the weight."""
    parents = [name, *(name[: dot.start()] for dot in re.finditer(r"\.", name))][::-1]
    offloads = (model.get_submodule(parent) for parent in (*parents, ""))
    return (execution_device(*offloads) if weight.is_meta else None) or weight.device


def adapt(module: nn.Module, bank: AdapterBank, index: int) -> None:
    """Give `module` the class that adds target `index` of `bank` to it."""
    module._lora = bank.links[index]  # type: ignore[assignment]
    base: type = type(module)
    if base is nn.Linear:
        become(module, LoRALinear)
    elif base is not LoRALinear:
        become(module, adapted_class(_face(base), base))


def _face(base: Any) -> Any:
    return LoRAConv1D if _is_conv1d(base) else LoRAOver


@functools.cache
def is_extensible(base: Any) -> bool:
    """Whether a module of this class can be given the class that adds an adapter.

    Python refuses it where a base beside `nn.Module` lays out attributes of its own (quanto).
    """
    try:
        object.__new__(base).__class__ = adapted_class(_face(base), base)
    except TypeError:
        return False
    return True


def restore(module: nn.Module) -> None:
    """Give `module` back the class it had before `adapt`."""
    del module.__dict__["_lora"]
    become(module, base_class(module))


def is_extended(module: nn.Module) -> bool:
    """Whether another library made a class of its own of an adapted module's."""
    return type(module) is not LoRALinear and _Picklable not in type(module).__bases__


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change its class, and the forward of the old one that accelerate's hooks hold."""
    old = type(module).forward
    module.__class__ = cls
    for key in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(key), "__func__", None) is old:
            module.__dict__[key] = types.MethodType(cls.forward, module)


def is_patched(module: nn.Module) -> bool:
    """Whether this instance has a forward of its own, other than accelerate's hooks around its
    class's: `become` cannot get into it.
    """
    own = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward
