"""The dropout mask: Philox4x32-10 (Salmon et al., SC 2011) of the seed and the logical element.

Element (row, column) of an x with K columns has the index e = row·K + column. The counter is
e >> 3, the key is the 64-bit seed; the four 32-bit outputs hold eight 16-bit lanes, low half first,
and element e takes lane e & 7. It is kept iff its lane is at least round(p·2¹⁶). A pure function of
(seed, e): every backend, layout and recomputation draws the same mask.
"""

import torch
from torch import Tensor

from loradrop.kernels.tiles import row_bytes as row_bytes

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_LANES = 8
_RESOLUTION = 1 << 16
_GROUPS_PER_BLOCK = 1 << 15  # 256 KiB a word: the ten rounds stay in the cache


def quantize(p: float) -> float:
    """The dropout probability that is really applied: p rounded to a multiple of 2⁻¹⁶.

    Raises ValueError unless p is 0 or in [2⁻¹⁷, 1 − 2⁻¹⁷].
    """
    lanes = round(p * _RESOLUTION) if 0.0 <= p < 1.0 else -1
    if lanes < 0 or lanes == _RESOLUTION or (lanes == 0 and p > 0):
        raise ValueError(f"dropout={p!r}: choose 0, or a probability in [2**-17, 1 - 2**-17]")
    return lanes / _RESOLUTION


def gain(p: float) -> float:
    """1/(1−p): what the sum of the kept elements is multiplied by."""
    return 1.0 / (1.0 - p)


def philox4x32(counter: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of (counter, 0, 0) under the 64-bit key `seed`.

    counter (n,) int64, seed 0-dim int64  ->  four (n,) int64 tensors holding 32-bit words
    """
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps all 64 bits of a 32 x 32 product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_and_(_LOW).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (p0 >> 32).bitwise_and_(_LOW).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_LOW), p0.bitwise_and_(_LOW)
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The elements of a (rows, columns) matrix that dropout with probability p keeps.

    seed 0-dim int64 on the wanted device  ->  (rows, columns) bool
    """
    total, threshold = rows * columns, round(p * _RESOLUTION)
    groups = -(-total // _LANES)
    kept = torch.empty(groups * _LANES, dtype=torch.bool, device=seed.device)
    for start in range(0, groups, _GROUPS_PER_BLOCK):
        stop = min(start + _GROUPS_PER_BLOCK, groups)
        words = philox4x32(torch.arange(start, stop, device=seed.device), seed)
        lanes = kept[start * _LANES : stop * _LANES].view(-1, _LANES)
        for index, word in enumerate(words):
            torch.ge(word & 0xFFFF, threshold, out=lanes[:, 2 * index])
            torch.ge(word >> 16, threshold, out=lanes[:, 2 * index + 1])
    return kept[:total].view(rows, columns)


def keep(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """mask∘x for an x (M, K): zero where dropout drops, whatever x holds there.

    Without a seed nothing is dropped.
    """
    return x if seed is None else torch.where(keep_mask(seed, x.shape[0], x.shape[1], p), x, 0.0)
