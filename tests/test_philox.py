"""The dropout mask: known vectors, a second Philox in Python's integers, its statistics."""

import math

import pytest
import torch

from loradrop.op import philox

LOW = 0xFFFFFFFF


def oracle(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-7 as in Random123, written again with Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def words_of(seed: int, counter: int, call: int) -> tuple[int, ...]:
    """The four words of a 64-bit counter and a call under a signed 64-bit seed."""
    seed %= 1 << 64
    return oracle((counter & LOW, counter >> 32, call, 0), (seed & LOW, seed >> 32))


def number(seed: int, row: int, column: int, columns: int) -> int:
    """The 12 bits of an element of a matrix with so many columns."""
    word = row * math.ceil(columns / 32) + column // 32
    digits = [u >> column % 32 & 1 for call in range(3) for u in words_of(seed, word, call)]
    return int("".join(map(str, digits)), 2)


def oracle_kept(seed: int, row: int, column: int, columns: int, p: float) -> bool:
    """Whether dropout keeps an element."""
    return number(seed, row, column, columns) >= round(p * 4096)


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


KNOWN = {  # Random123, tests/kat_vectors, philox 4x32, 7 rounds: counter, key, words
    "zeros": ((0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    "ones": ((LOW,) * 4, (LOW,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
}


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN.values(), ids=KNOWN)
def test_oracle_against_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert oracle(counter, key) == words


SEEDS = [0, 1, 0xA4093822299F31D0 - (1 << 64), -1, (1 << 62) - 1, 1 << 32, 1234567890123456789]


@pytest.mark.parametrize("seed", SEEDS)
def test_words_equal_the_oracle(seed: int) -> None:
    many = torch.randint(0, 1 << 62, (200,), generator=torch.Generator().manual_seed(0))
    counters = [0, 1, LOW, 1 << 32, (1 << 32) + 7, 0x05A308D3243F6A88, 1 << 60, *many.tolist()]
    calls = torch.arange(3).unsqueeze(1)
    words = torch.stack(philox.philox4x32(torch.tensor(counters), calls, seed_of(seed)), 2)
    wanted = [[list(words_of(seed, counter, call)) for counter in counters] for call in range(3)]
    assert words.tolist() == wanted


GOLDEN = {  # two rows of 33 columns
    "seed 0, p 0.5": (
        *(0, 0.5),
        "100100001110110111110110111110100" "001001001010010011100100011111000",
    ),
    "seed 42, p 0.1": (
        *(42, 0.1),
        "011111111101111111011111010111111" "101111111111111111111111110111111",
    ),
    "seed 2**62-1, p 0.9": (
        *(2**62 - 1, 0.9),
        "000000100010111000100001010100000" "000000001000000000000000011001000",
    ),
}


@pytest.mark.parametrize(("seed", "p", "bits"), GOLDEN.values(), ids=GOLDEN)
def test_golden_mask(seed: int, p: float, bits: str) -> None:
    mask = philox.keep_mask(seed_of(seed), 2, 33, p)
    assert mask.dtype == torch.bool
    assert "".join("01"[kept] for kept in mask.flatten().tolist()) == bits


SHAPES = [(1, 1), (3, 7), (5, 8), (2, 33), (0, 37), (3, 0), (20, 1), (4, 32), (3, 64), (5, 97)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("p", [0.2, 0.3, 0.5, 4095 / 4096])
@pytest.mark.parametrize("seed", [3, -5])
def test_mask_is_a_function_of_seed_and_element(
    rows: int, columns: int, p: float, seed: int
) -> None:
    mask = philox.keep_mask(seed_of(seed), rows, columns, p)
    kept = [
        [oracle_kept(seed, row, column, columns, p) for column in range(columns)]
        for row in range(rows)
    ]
    assert mask.shape == (rows, columns)
    assert mask.tolist() == kept


def test_mask_far_from_the_start() -> None:
    rows, columns = 1_000, 1_201  # past several blocks of any block size below 38,000 words
    mask = philox.keep_mask(seed_of(9), rows, columns, 0.5)
    assert mask.shape == (rows, columns)
    near_powers = {(1 << k) + d for k in range(3, 16) for d in range(-2, 3)}
    for word in sorted(w for w in near_powers | {rows * 38 - 1} if w < rows * 38):
        row, column = word // 38, min(word % 38 * 32 + word % 32, columns - 1)
        assert bool(mask[row, column]) == oracle_kept(9, row, column, columns, 0.5), word


def test_blocks_are_of_no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device draws as many words at once as make its launches worth while."""
    expected = philox.draw(seed_of(5), 300, 320, 0.3)
    for words in (7, philox._WORDS_PER_LAUNCH):
        monkeypatch.setattr(philox, "_WORDS_PER_BLOCK", words)
        assert torch.equal(philox.draw(seed_of(5), 300, 320, 0.3), expected)


@pytest.mark.parametrize("column", [0, 31, 32, 69])
@pytest.mark.parametrize("seed", [9, -1])
def test_a_number_at_the_threshold_is_kept(column: int, seed: int) -> None:
    """And one below it is not: all twelve digits count, the first the most."""
    own = number(seed, 2, column, 70)
    assert philox.keep_mask(seed_of(seed), 3, 70, own / 4096)[2, column]
    assert not philox.keep_mask(seed_of(seed), 3, 70, (own + 1) / 4096)[2, column]


@pytest.mark.parametrize("columns", [1, 8, 32, 45])
def test_bits_are_the_mask(columns: int) -> None:
    """Bit b of byte i of a row is column 8i + b; rows are whole words."""
    bits = philox.draw(seed_of(4), 6, columns, 0.3)
    assert (bits.shape, bits.dtype) == ((6, philox.row_bytes(columns)), torch.uint8)
    kept = [[bool(row[c // 8] >> c % 8 & 1) for c in range(columns)] for row in bits.tolist()]
    assert philox.unpack(bits, columns).tolist() == kept
    assert philox.keep_mask(seed_of(4), 6, columns, 0.3).tolist() == kept


def test_what_is_dropped_is_zero_whatever_it_was() -> None:
    x = torch.full((4, 15), math.nan)
    mask = philox.keep_mask(seed_of(3), 4, 15, 0.5)
    x[mask] = 2.0
    assert torch.equal(philox.keep(x, seed_of(3), 0.5), 2.0 * mask)
    assert philox.keep(x, None, 0.0) is x
    assert (philox.gain(0.0), philox.gain(0.75)) == (1.0, 4.0)


def bound(n: int, p: float) -> float:
    """Five standard deviations of a frequency: one false alarm in two million."""
    return 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 987654321987654321])
def test_frequency(p: float, seed: int) -> None:
    mask, kept = philox.keep_mask(seed_of(seed), 1024, 512, p), 1 - philox.quantize(p)
    assert abs(float(mask.double().mean()) - kept) < bound(mask.numel(), p)
    columns = mask.view(-1, 32).double().mean(0)  # of a word
    assert float((columns - kept).abs().max()) < bound(mask.numel() // 32, p)


@pytest.mark.parametrize("shift", [1, 2, 8, 32, 64, 512, 1024])
def test_neighbours_are_independent(shift: int) -> None:
    mask = philox.keep_mask(seed_of(77), 1024, 512, 0.5).flatten()
    agree = (mask[shift:] == mask[:-shift]).double().mean()
    assert abs(float(agree) - 0.5) < bound(mask.numel() - shift, 0.5)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(
    "between", ["columns of a word", "neighbouring words", "distant words", "rows"]
)
def test_nothing_is_correlated(between: str, p: float) -> None:
    """The correlation of each bit of a word with each of its own and of other words.

    A correlation of n pairs is near N(0, 1/n); 1024 of them stay within six deviations but for one
    set in half a million.
    """
    q = philox.quantize(p)
    mask = philox.keep_mask(seed_of(11), 4096, 256, q)
    bits = (mask.double() - (1 - q)).view(4096, 8, 32) / math.sqrt(q * (1 - q))
    other = {
        "columns of a word": bits,
        "neighbouring words": bits.roll(1, 1),
        "distant words": bits.roll(4, 1),
        "rows": bits.roll(1, 0),
    }[between]
    one, two, n = bits.flatten(0, 1), other.flatten(0, 1), 4096 * 8
    found = one.T @ two / n
    if between == "columns of a word":
        found.fill_diagonal_(0.0)  # each with itself
    assert float(found.abs().max()) < 6 / math.sqrt(n)


@pytest.mark.parametrize("other", [78, 77 + (1 << 32), -77])
def test_seeds_are_independent(other: int) -> None:
    one, two = (philox.keep_mask(seed_of(seed), 512, 512, 0.5) for seed in (77, other))
    assert abs(float((one == two).double().mean()) - 0.5) < bound(one.numel(), 0.5)


@pytest.mark.parametrize("p", [0.0, 0.1, 1 / 3, 0.5, 2**-13 * 1.01, 1 - 2**-12])
def test_quantize_is_close_and_stable(p: float) -> None:
    q = philox.quantize(p)
    assert abs(q - p) <= 2**-13
    assert philox.quantize(q) == q
    assert (q * 4096).is_integer()
    assert 0.0 <= q < 1.0
    assert (q > 0) == (p > 0)


@pytest.mark.parametrize(
    "p", [-0.1, 1.0, 1.5, math.nan, math.inf, -math.inf, 1e-9, 2**-13, 1 - 2**-13, 1 - 1e-9]
)
def test_quantize_refuses(p: float) -> None:
    with pytest.raises(ValueError, match="dropout="):
        philox.quantize(p)
