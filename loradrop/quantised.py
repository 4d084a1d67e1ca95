"""Quantised weights of other libraries: read as a matrix, and made again in the same format.

A library is known by where its classes are defined, so none is imported that the model does not
use. What is not here trains as any base does (`layers.LoRAOver`), but cannot be merged.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loradrop.layers import base_class, is_plain, shape_of
from loradrop.op.checks import no_gradient_of
from loradrop.ranks import is_sharded
from loradrop.wrapped import modules_of

Stored = Tensor | Mapping[str, Any]
_FOUR_BITS, _EIGHT_BITS = ("Linear4bit", "LinearNF4", "LinearFP4"), ("Linear8bitLt",)


class Format(NamedTuple):
    """How a layer holds a quantised weight.

    stored   the layer's attributes that hold it
    dense    such attributes -> the matrix (N, K) that they stand for, in float32
    again    such a matrix -> attributes that hold it with the same settings
    """

    stored: Mapping[str, Any]
    dense: Callable[[Mapping[str, Any]], Tensor]
    again: Callable[[Tensor], Mapping[str, Any]]


def format_of(module: nn.Module) -> Format | None:
    """The format of an adapted module's weight; None where it is not one that is known here."""
    for known in (_four_bits, _eight_bits, _torchao):
        if (found := known(module)) is not None:
            return found
    return None


def _of_bitsandbytes(module: nn.Module, names: tuple[str, ...]) -> bool:
    base = base_class(module)
    return base.__module__ == "bitsandbytes.nn.modules" and base.__name__ in names


def _four_bits(module: Any) -> Format | None:
    """NF4 and FP4 of bitsandbytes, with their blocks, and their absmax quantised or not."""
    if not _of_bitsandbytes(module, _FOUR_BITS) or module.weight.quant_state is None:
        return None
    from bitsandbytes.functional import dequantize_4bit

    old = module.weight

    def dense(stored: Mapping[str, Any]) -> Tensor:
        found: Tensor = dequantize_4bit(stored["weight"].data, stored["weight"].quant_state)
        return found.float()

    def again(matrix: Tensor) -> Mapping[str, Any]:
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        settings = {name: getattr(old, name) for name in names}
        new = type(old)(matrix, requires_grad=False, **settings).to(matrix.device)
        new.quant_state.dtype = old.quant_state.dtype  # of the matrix that its layer makes
        return {"weight": new, "quant_state": new.quant_state}

    return Format({"weight": old, "quant_state": module.quant_state}, dense, again)


def _eight_bits(module: Any) -> Format | None:
    """LLM.int8() of bitsandbytes: a scale for each row, which the layer's state may hold."""
    if not _of_bitsandbytes(module, _EIGHT_BITS) or module.weight.dtype != torch.int8:
        return None
    from bitsandbytes.functional import int8_vectorwise_dequant

    old, state = module.weight, module.state

    def dense(stored: Mapping[str, Any]) -> Tensor:
        weight = stored["weight"]
        scales = stored["state"].SCB if weight.SCB is None else weight.SCB
        found: Tensor = int8_vectorwise_dequant(weight.data, scales)
        return found.float()

    def again(matrix: Tensor) -> Mapping[str, Any]:
        # It quantises what comes from a CPU.
        new = type(old)(matrix.cpu(), requires_grad=False, has_fp16_weights=False)
        fresh = copy.copy(state)
        fresh.CB = fresh.SCB = None  # the next forward takes them from the weight
        return {"weight": new.to(old.device), "state": fresh}

    return Format({"weight": old, "state": state}, dense, again)


def _torchao(module: Any) -> Format | None:
    """torchao's int8, float8 and intx, weights only: a scale for each block, as in the old weight.

    The matrix is rounded to the weight's outer dtype first, as torchao quantises from that. How the
    scales were searched is not in a weight: the new ones are from the largest value of each block.
    """
    old = module.weight
    if not type(old).__module__.startswith("torchao.") or not is_plain(module):
        return None
    make = _MAKERS.get(type(old).__name__)
    active = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")
    if make is None or any(getattr(old, name, None) is not None for name in active):
        return None

    def dense(stored: Mapping[str, Any]) -> Tensor:
        found: Tensor = stored["weight"].dequantize()
        return found.float()

    def again(matrix: Tensor) -> Mapping[str, Any]:
        return {"weight": nn.Parameter(make(old, matrix.to(old.dtype)), requires_grad=False)}

    return Format({"weight": old}, dense, again)


def _int8(old: Any, matrix: Tensor) -> Tensor:
    from torchao.quantization import PerBlock

    blocks, reduce = PerBlock(tuple(old.block_size)), getattr(old, "reduce_range", False)
    made: Tensor = type(old).from_hp(matrix, blocks, _mapping(old), reduce_range=reduce)
    return made


def _float8(old: Any, matrix: Tensor) -> Tensor:
    from torchao.quantization import PerBlock

    blocks, kernels = PerBlock(tuple(old.block_size)), old.kernel_preference
    more = {"mm_config": old.mm_config, "kernel_preference": kernels}
    made: Tensor = type(old).from_hp(matrix, old.qdata.dtype, blocks, **more)
    return made


def _intx(old: Any, matrix: Tensor) -> Tensor:
    blocks, mapping = tuple(old.block_size), _mapping(old)
    made: Tensor = type(old).from_hp(matrix, blocks, old.target_dtype, mapping_type=mapping)
    return made


_MAKERS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "IntxUnpackedToInt8Tensor": _intx,
}


def _mapping(old: Any) -> Any:
    from torchao.quantization import MappingType

    shifted = old.zero_point is not None and bool(old.zero_point.any())
    return MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC


def packed(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor: the quantised weights of the model, of whatever library, which cannot train:
    whole numbers, float8, tensors of a type of their own and bitsandbytes' four bits, whose
    storage may have any dtype.
    """
    return {
        f"{name}.{key}".removeprefix("."): tensor
        for name, module in modules_of(model).items()
        for key, tensor in _packed(module)
    }


def _packed(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    own: dict[str, Tensor] = {k: p for k, p in module._parameters.items() if p is not None}
    if shape_of(module) is not None and all(p.ndim < 2 for p in own.values()):
        # GPTQ and AWQ keep the weight of a layer in buffers.
        own |= {k: b for k, b in module._buffers.items() if b is not None and b.ndim == 2}
    four_bits = _of_bitsandbytes(module, _FOUR_BITS)
    for key, tensor in own.items():
        number = tensor.is_floating_point() or tensor.is_complex()
        typed = hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor)
        if typed or not number or tensor.itemsize == 1 or (four_bits and key == "weight"):
            yield key, tensor


def require_gradients(model: nn.Module) -> None:
    """Raises ValueError where `without_gradients` has a reason."""
    if (reason := without_gradients(model)) is not None:
        raise ValueError(reason)


def without_gradients(model: nn.Module) -> str | None:
    """Which quantised layer of the model, adapted or not, gives its input no gradient, so that what
    comes before it would train on a wrong one; None where all do. One of each kind is tried.
    """
    tried = set()
    for name, module in modules_of(model).items():
        weight = next((tensor for _, tensor in _packed(module)), None)
        if weight is None or shape_of(module) is None or weight.is_meta:
            continue
        if _of_bitsandbytes(module, _FOUR_BITS + _EIGHT_BITS):  # they do, and trying may repack one
            continue
        inside = tuple(type(value) for value in vars(weight).values())
        kind = base_class(module), type(weight), inside
        if kind in tried:
            continue
        tried.add(kind)
        if _stops_gradients(module, weight):
            return no_gradient_of(f"{name}, a {kind[0].__name__} on a {kind[1].__name__},")
    return None


def _stops_gradients(module: nn.Module, weight: Tensor) -> bool:
    """Whether it does, by trying; False where it cannot be tried so."""
    k, _ = shape_of(module) or (0, 0)
    wide = weight.is_floating_point() and weight.itemsize > 1
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    x = torch.ones(1, k, dtype=weight.dtype if wide else own, device=weight.device)
    try:
        with torch.enable_grad():
            y = base_class(module).forward(module, x.requires_grad_())
    except Exception:  # whatever a kernel refuses
        return False
    return isinstance(y, Tensor) and not y.requires_grad


def put(module: Any, stored: Stored) -> None:
    """Give a layer a weight: the values of a plain one, or the attributes of a quantised one."""
    if isinstance(stored, Tensor):
        module.weight.copy_(stored)
        return
    for name, value in stored.items():
        setattr(module, name, value)


def kept(stored: Stored, device: str | None = None) -> Stored:
    """What `put` brings back later, a plain weight on this `device` (None: its own); the attributes
    of a quantised one never change.
    """
    if not isinstance(stored, Tensor):
        return stored
    return stored.detach().to(device or stored.device, copy=True)


# bitsandbytes' 4-bit layers repack their weight for an evaluation on some CPUs, which their own
# training forward cannot read.
_REPACKS = "support_avx512bf16_for_cpu"


def keep_unpacked(module: Any) -> list[tuple[str, Any]]:
    """Let the module's weight be as its training reads it. Returns (attribute, value before)."""
    if not _of_bitsandbytes(module, _FOUR_BITS) or not getattr(module, _REPACKS, False):
        return []
    module.state_dict()  # it unpacks the weight
    setattr(module, _REPACKS, False)
    return [(_REPACKS, True)]
