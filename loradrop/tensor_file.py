"""Tensors in a safetensors file: gathered where they are sharded, whole or not there, read back."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loradrop.files import replacing


def full(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous. A DTensor is gathered: every rank has to call this."""
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor.detach() if gather is None else gather().detach()
    return whole.cpu().contiguous()


def once(tensors: Iterable[Tensor], write: Callable[[], object]) -> None:
    """Calls `write`; where a tensor is sharded, on the first rank alone, and the others wait."""
    if not any(hasattr(tensor, "full_tensor") for tensor in tensors):
        write()
        return
    try:
        if torch.distributed.get_rank() == 0:
            write()
    finally:  # also after an error: the others must not wait for ever
        torch.distributed.barrier()


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Replace the file with these tensors, which are read back before they take its place.

    Raises OSError where it cannot be written, or does not read back bit for bit.
    """
    with replacing(path) as draft:
        try:
            save_file(dict(tensors), draft, dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}. Is the disk full?") from error
        differing = differences(draft, tensors)
        if differing:
            raise OSError(
                f"{path} does not read back as it was written ({', '.join(differing[:3])}): "
                "the disk or its file system is at fault. Write to another one"
            )


def differences(file: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that the file lacks, has too many, or has with other bits."""
    try:
        written = load_file(file)
    except SafetensorError as error:
        return [str(error)]
    names = dict.fromkeys((*tensors, *written))
    return [n for n in names if n not in written or not _equal(written[n], tensors.get(n))]


def _equal(one: Tensor, other: Tensor | None) -> bool:
    """Bit for bit, so that NaN equals itself."""
    if other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (one, other)))
