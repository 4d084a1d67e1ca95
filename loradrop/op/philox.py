"""The dropout mask: Philox4x32-7 (Salmon et al., SC 2011) of the seed and the logical element.

Columns come in words of 32, so that one call of Philox serves 32 elements. A row of K columns has
⌈K/32⌉ words, and word w of the matrix gets twelve random words: u_4c … u_4c+3 are Philox of the
counter (w low, w high, c, 0), c = 0, 1, 2, under the 64-bit seed as the key. Seven rounds are the
fewest that pass BigCrush. Bit b of the twelve, u_0 first, is the number U of column b of the word;
the element is kept iff U is at least p·2¹². A pure function of (seed, row, column, K): every
backend, layout and recomputation draws the same mask.

As bits, a mask is what `draw` returns and the kernels keep: a bit is set where an element is kept,
32 columns a word, the lowest bit first. The bits behind the last column mean nothing.
"""

import torch
from torch import Tensor

from loradrop.kernels.tiles import row_bytes

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 7
_DIGITS = 12
_RESOLUTION = 1 << _DIGITS
_WORDS_PER_BLOCK = 1 << 13  # 64 KiB for each of three calls: the rounds stay in a CPU's cache
_WORDS_PER_LAUNCH = 1 << 18  # on a device, where each of some hundred calls is a launch


def quantize(p: float) -> float:
    """The dropout probability that is really applied: p rounded to a multiple of 2⁻¹².

    Raises ValueError where a p other than 0 would become 0 or 1: it must lie between 2⁻¹³ and
    1 − 2⁻¹³.
    """
    threshold = round(p * _RESOLUTION) if 0.0 <= p < 1.0 else -1
    if threshold < 0 or threshold == _RESOLUTION or (threshold == 0 and p > 0):
        raise ValueError(f"dropout={p!r}: choose 0, or a probability between 2**-13 and 1 - 2**-13")
    return threshold / _RESOLUTION


def gain(p: float) -> float:
    """1/(1−p): what the sum of the kept elements is multiplied by."""
    return 1.0 / (1.0 - p)


def philox4x32(counter: Tensor, call: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-7 of (counter low, counter high, call, 0) under the 64-bit key `seed`.

    counter and call int64 of shapes that broadcast, seed 0-dim int64  ->  four int64 tensors of
    that shape, which hold 32-bit words
    """
    rounds = torch.arange(_ROUNDS, device=seed.device)
    k0, k1 = (
        torch.bitwise_and(half + rounds * weyl, _LOW).unbind()
        for half, weyl in zip((seed, seed >> 32), _WEYL, strict=True)
    )
    c0, c1, c2, c3 = counter & _LOW, counter >> 32, call, torch.zeros_like(counter)
    for key in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps all 64 bits of a 32 x 32 product. As c1 and
        # c3 they stay whole: their upper halves go with the mask of the next round.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((p1 >> 32) ^ c1).bitwise_xor_(k0[key]).bitwise_and_(_LOW)
        c2 = ((p0 >> 32) ^ c3).bitwise_xor_(k1[key]).bitwise_and_(_LOW)
        c1, c3 = p1, p0
    return c0, c1 & _LOW, c2, c3 & _LOW


def draw(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The elements of a (rows, columns) matrix that dropout with probability p keeps, as bits.

    seed 0-dim int64 on the wanted device  ->  (rows, row_bytes(columns)) uint8
    """
    threshold, size = round(p * _RESOLUTION), row_bytes(columns)
    words = torch.empty(rows * size // 4, dtype=torch.int32, device=seed.device)
    calls = torch.arange(_DIGITS // 4, device=seed.device).unsqueeze(1)
    block = _WORDS_PER_BLOCK if seed.is_cpu else _WORDS_PER_LAUNCH
    for start in range(0, words.numel(), block):
        stop = min(start + block, words.numel())
        found = philox4x32(torch.arange(start, stop, device=seed.device), calls, seed)
        digits = [word for call in zip(*(f.unbind() for f in found), strict=True) for word in call]
        # 32 comparisons at a time, from the last digit on: those equal so far count as kept.
        kept = torch.full_like(digits[0], -1)
        for place, digit in enumerate(reversed(digits)):
            if threshold >> place & 1:
                kept &= digit
            else:
                kept |= digit
        words[start:stop] = kept
    return words.view(torch.uint8).view(rows, size)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """A mask of bits as booleans: (rows, row_bytes(columns)) uint8  ->  (rows, columns) bool."""
    byte, bit = (torch.arange(count, device=bits.device) for count in (256, 8))
    octets = (byte.unsqueeze(1) >> bit & 1).to(torch.uint8).view(torch.int64)  # a byte's, in one
    return octets.squeeze(1)[bits.int()].view(torch.bool)[:, :columns]


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """As `draw`, as booleans: (rows, columns) bool."""
    return unpack(draw(seed, rows, columns, p), columns)


def keep(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """mask∘x for an x (M, K): zero where dropout drops, whatever x holds there.

    Without a seed nothing is dropped.
    """
    return x if seed is None else torch.where(keep_mask(seed, x.shape[0], x.shape[1], p), x, 0.0)
