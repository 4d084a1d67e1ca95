"""What a cut leaves makes up for what it takes: a ridge regression over all adapters at once.

In the coordinates of their cores the gradient of batch b is S_b for each adapter, and a change of
its core by D changes the loss of that batch by Σ ⟨S_b, D⟩ to first order. Half the mean square of
that over the batches is the Fisher quadratic form, the predicted rise of the loss: errors of
different adapters add up in it before they are squared. A cut takes the directions after the k-th
away, D = −e_j e_jᵀ for each, and leaves k·r entries of the core free, the rows of the kept ones.
Those that minimise the form solve a least-squares problem with one row for each batch, here in its
dual. Batches are few and entries many, so a ridge holds them, as large as leave-one-out says best
(Golub, Heath & Wahba, 1979), which also says what rise of the loss to expect.

Pure functions on plain data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RIDGES = tuple(10.0 ** (k / 2) for k in range(-5, 5))  # parts of the mean square of a batch


class Compensation(NamedTuple):
    """rows   (k, r) for each adapter: the k-th row of its right factor gets rows @ right added

    ridge   the part of the mean square that was added; None where nothing is worth adding
    rise    the predicted rise of the mean loss with it;  before   without it
    """

    rows: list[Tensor]
    ridge: float | None
    rise: float
    before: float


def rise(gone: Tensor, samples: float) -> float:
    """The predicted rise of the mean loss of a sample, from Σ ⟨S_b, D⟩ of each batch (n,)."""
    return float(gone.square().sum()) / (2.0 * max(samples, 1.0))


def lost(gradients: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """Σ ⟨S_b, D⟩ over the adapters of what these ranks take away, (n,): see `compensate`."""
    gone = torch.zeros(len(gradients[0]), dtype=torch.float64)
    for given, k in zip(gradients, ranks, strict=True):
        gone = gone - given.diagonal(dim1=1, dim2=2)[:, k:].double().sum(1)
    return gone


def compensate(gradients: Sequence[Tensor], ranks: Sequence[int], samples: float) -> Compensation:
    """The best rows for what these ranks take away.

    gradients   (n, r, r) for each adapter: S_b between its left and right factors, the directions
                in falling order
    samples     how many losses the n batches sum
    """
    gone = lost(gradients, ranks)
    rows = [
        torch.zeros(k, given.shape[2], dtype=torch.float64)
        for given, k in zip(gradients, ranks, strict=True)
    ]
    before = rise(gone, samples)
    free = [given[:, :k].flatten(1) for given, k in zip(gradients, ranks, strict=True)]
    kernel = gone.new_zeros(len(gone), len(gone))
    for part in free:
        wide = part.double()
        kernel += wide @ wide.T
    unit = float(kernel.diagonal().mean())
    if before == 0.0 or unit == 0.0:
        return Compensation(rows, None, before, before)
    values, vectors = torch.linalg.eigh(kernel)
    seen, least, chosen = vectors.T @ gone, before, None
    for ridge in RIDGES:
        inverse = 1.0 / (values.clamp_min(0.0) + ridge * unit)
        left_out = vectors @ (inverse * seen) / (vectors.square() @ inverse)
        if (found := rise(left_out, samples)) < least:
            least, chosen, dual = found, ridge, vectors @ (inverse * seen)
    if chosen is None:
        return Compensation(rows, None, before, before)
    rows = [
        -(part.double().T @ dual).view(k, given.shape[2])
        for part, given, k in zip(free, gradients, ranks, strict=True)
    ]
    return Compensation(rows, chosen, least, before)
