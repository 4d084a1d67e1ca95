"""A byte an element to a bit an element, as `gemm_ext` reads a mask; for `graph_split`."""

import triton
import triton.language as tl

WORDS = 128  # words of 32 bits that a program writes


@triton.jit
def pack_bits(BYTES, BITS, words, WORDS: tl.constexpr):
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    lane = tl.arange(0, 32)
    place = word.to(tl.int64)[:, None] * 32 + lane[None, :]
    bytes_ = tl.load(BYTES + place, mask=(word < words)[:, None], other=0)  # (WORDS, 32)
    tl.store(BITS + word, tl.sum(bytes_.to(tl.int32) << lane[None, :], 1), mask=word < words)
