"""Writing a safetensors file: whole or not there, and read back bit for bit."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loradrop.files import replacing


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Replace the file with these tensors, which are read back before they take its place.

    Raises OSError where it cannot be written, or does not read back.
    """
    with replacing(path) as draft:
        try:
            save_file(dict(tensors), draft, dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}. Is the disk full?") from error
        if not _holds(draft, tensors):
            raise OSError(f"{path} does not hold what was written into it: check the disk")


def _holds(file: Path, tensors: Mapping[str, Tensor]) -> bool:
    written = load_file(file)
    complete = written.keys() == tensors.keys()
    return complete and all(same(written[name], tensor) for name, tensor in tensors.items())


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, so that NaN equals itself."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))
