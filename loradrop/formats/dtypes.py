"""The dtypes of an adapter's file, which what is made of the adapter keeps."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loradrop import native
from loradrop.config import DTYPES
from loradrop.formats import peft_file, peft_load
from loradrop.formats.peft_file import PREFIX, base_state


class FileDtypes(NamedTuple):
    """adapters   the widest of all A and B: one of `DTYPES`
    whole         name in the model -> that of a tensor trained whole
    """

    adapters: str
    whole: Mapping[str, torch.dtype]


def dtypes_in(path: str | os.PathLike[str], model: nn.Module) -> FileDtypes:
    """Those of the adapter in the folder `path`, native or PEFT's, which fits `model`."""
    if not native.is_native(path) and peft_load.is_peft(path):
        tensors = peft_file.read(path).tensors
        found = {k.removeprefix(PREFIX).replace(".base_layer.", "."): v for k, v in tensors.items()}
        state = base_state(model)
        whole = {name: tensor for name, tensor in found.items() if name in state}
        adapters = [tensor for name, tensor in found.items() if name not in state]
    else:
        file = native.read(path)
        whole, adapters = file.trained, [*file.bank.values()]
    return FileDtypes(_widest(adapters), {name: tensor.dtype for name, tensor in whole.items()})


def _widest(tensors: Iterable[Tensor]) -> str:
    kinds = {tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point}
    names = {dtype: name for name, dtype in DTYPES.items()}
    if not kinds <= names.keys():  # float64, or fewer bits than are written
        return "float32"
    return names[reduce(torch.promote_types, kinds)] if kinds else "float32"


@contextmanager
def no_wider(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Inside, these tensors of the model are in their dtypes where those are narrower."""
    state = base_state(model)
    given = [(state[name], dtype) for name, dtype in dtypes.items() if name in state]
    before = [(tensor, tensor.data) for tensor, _ in given]
    try:
        for tensor, dtype in given:
            if dtype.itemsize < tensor.dtype.itemsize:
                tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, values in before:
            tensor.data = values
