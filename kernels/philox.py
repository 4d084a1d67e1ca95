"""The dropout mask inside a kernel: one bit an element, the bits of `loradrop.op.philox`.

A byte holds eight neighbouring columns of a row, lowest bit first; a word of 32 bits holds 32. A
row takes whole words (`tiles.row_bytes`).
"""

import triton
import triton.language as tl


@triton.jit
def _bits(word, threshold, AT: tl.constexpr):
    """Bits AT and AT + 1: whether the low and the high half of `word` are at least `threshold`.

    `threshold` stands in the upper half of its word. There the half below decides nothing.
    """
    low = tl.where((word << 16) >= threshold, 1 << AT, 0)
    return low | tl.where(word >= threshold, 2 << AT, 0)


@triton.jit
def _octet(k0, k1, group, threshold):
    """The byte of elements 8·group … 8·group + 7: a bit is set where the element is kept.

    Philox4x32-10. A product of two 32-bit words is taken in 64 bits: one instruction for both
    halves.
    """
    c0, c1 = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    byte = _bits(c0, threshold, 0) | _bits(c1, threshold, 2)
    return byte | _bits(c2, threshold, 4) | _bits(c3, threshold, 6)


@triton.jit
def draw_bytes(seed, rows, first, K, lanes, BYTES: tl.constexpr, ALIGNED: tl.constexpr):
    """The mask of `rows` (BM,), columns first … first + 8·BYTES − 1, as (BM, BYTES) bytes in int32.

    `seed` is an int64, `lanes` is p·2¹⁶. ALIGNED: K is a multiple of eight, so that no row begins
    within a group of Philox.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    threshold = lanes.to(tl.uint32) << 16
    element = rows.to(tl.int64)[:, None] * K + (first + 8 * tl.arange(0, BYTES))[None, :]
    byte = _octet(k0, k1, element >> 3, threshold)
    if not ALIGNED:
        byte |= _octet(k0, k1, (element >> 3) + 1, threshold) << 8
        byte = (byte >> (element & 7).to(tl.int32)) & 0xFF
    return byte


@triton.jit
def where_kept(bits, tile, WIDTH: tl.constexpr):
    """`tile` (ROWS, WORDS·WIDTH), zero where its bit in `bits` (ROWS, WORDS) is not set."""
    spread = (bits[:, :, None] >> tl.arange(0, WIDTH)[None, None, :]) & 1
    return tl.where(tl.reshape(spread, tile.shape) != 0, tile, 0.0)
