"""The dropout mask inside a kernel: one bit an element, the bits of `loradrop.op.philox`.

A word of 32 bits holds 32 neighbouring columns of a row, lowest bit first. A row takes whole words
(`tiles.row_bytes`).
"""

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, k0, k1):
    """Philox4x32-7 of the counter (c0, c1, c2, 0) under the key (k0, k1), all uint32.

    A product of two 32-bit words is taken in 64 bits: one instruction for both halves.
    """
    c3 = c2 * 0
    for _ in tl.static_range(7):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _at_least(kept, word, threshold, BIT: tl.constexpr):
    """One digit of 32 comparisons with a threshold: `word` holds the numbers' digit, `kept` is what
    the digits below it say. It is word & kept where the threshold has a 1, else word | kept.
    """
    word = word.to(tl.int32, bitcast=True)
    unset = ((threshold >> BIT) & 1) - 1  # all bits where the threshold has a 0
    return (word & kept) | (unset & (word | kept))


@triton.jit
def draw_words(seed, rows, first, words, threshold, WORDS: tl.constexpr):
    """The mask of `rows` (BM,), words first … first + WORDS − 1 of each: (BM, WORDS) int32.

    `seed` is an int64, a row has `words` words, `threshold` is p·2¹².
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    word = rows.to(tl.int64)[:, None] * words + (first + tl.arange(0, WORDS))[None, :]
    low, high = word.to(tl.uint32), (word >> 32).to(tl.uint32)
    kept = tl.full(word.shape, -1, tl.int32)
    for call in tl.static_range(3):  # the lowest digits first
        u0, u1, u2, u3 = philox4x32(low, high, low * 0 + (2 - call), k0, k1)
        kept = _at_least(kept, u3, threshold, 4 * call)
        kept = _at_least(kept, u2, threshold, 4 * call + 1)
        kept = _at_least(kept, u1, threshold, 4 * call + 2)
        kept = _at_least(kept, u0, threshold, 4 * call + 3)
    # A gather by its own index: without, Triton draws a word anew in each thread that reads it.
    own = tl.broadcast_to(tl.arange(0, WORDS)[None, :], word.shape)
    return tl.gather(kept, own, 1)


@triton.jit
def where_kept(words, tile):
    """`tile` (ROWS, 32·WORDS), zero where its bit in `words` (ROWS, WORDS) is not set.

    Half precision is masked as integers: as a choice it costs twice the instructions.
    """
    shape: tl.constexpr = tile.shape
    if tile.dtype.primitive_bitwidth == 16:
        spread = words[:, :, None] << (31 - tl.arange(0, 32))[None, None, :]
        kept = tl.reshape(spread >> 31, shape).to(tl.int16)
        return (tile.to(tl.int16, bitcast=True) & kept).to(tile.dtype, bitcast=True)
    else:
        spread = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        return tl.where(tl.reshape(spread, shape) != 0, tile, 0.0)
