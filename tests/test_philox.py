"""The dropout mask: known vectors, a second Philox in Python's integers, its statistics."""

import math

import pytest
import torch

from loradrop.op import philox

LOW = 0xFFFFFFFF


def oracle(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as in Random123, written again with Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def words_of(seed: int, counter: int) -> tuple[int, ...]:
    """The four words of a 64-bit counter under a signed 64-bit seed."""
    seed %= 1 << 64
    return oracle((counter & LOW, counter >> 32, 0, 0), (seed & LOW, seed >> 32))


def lane(seed: int, element: int) -> int:
    """The 16 bits of an element: its lane of Philox(element >> 3), low half first."""
    word = words_of(seed, element >> 3)[(element & 7) >> 1]
    return word >> (16 * (element & 1)) & 0xFFFF


def oracle_kept(seed: int, element: int, p: float) -> bool:
    """Whether dropout keeps an element."""
    return lane(seed, element) >= round(p * 65536)


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


KNOWN = {  # Random123, examples/kat_vectors, philox 4x32, 10 rounds: counter, key, words
    "zeros": ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((LOW,) * 4, (LOW,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
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
    words = torch.stack(philox.philox4x32(torch.tensor(counters), seed_of(seed)), 1)
    assert words.tolist() == [list(words_of(seed, counter)) for counter in counters]


GOLDEN = {
    "seed 0, p 0.5": (0, 0.5, "101111111100011010000000110001001111011110100110011111000100"),
    "seed 42, p 0.1": (42, 0.1, "111110111111110101111111010111111111111111111010111111111111"),
    "seed 2**62-1, p 0.9": (2**62 - 1, 0.9, f"{'0' * 36}100000000000000100010000"),
}


@pytest.mark.parametrize(("seed", "p", "bits"), GOLDEN.values(), ids=GOLDEN)
def test_golden_mask(seed: int, p: float, bits: str) -> None:
    mask = philox.keep_mask(seed_of(seed), 4, 15, p)
    assert mask.dtype == torch.bool
    assert "".join("01"[kept] for kept in mask.flatten().tolist()) == bits


SHAPES = [(1, 1), (3, 7), (5, 8), (2, 33), (0, 37), (120, 1), (8, 15), (15, 8), (50, 37)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("p", [0.2, 0.3, 0.6])
@pytest.mark.parametrize("seed", [3, -5])
def test_mask_is_a_function_of_seed_and_element(
    rows: int, columns: int, p: float, seed: int
) -> None:
    mask = philox.keep_mask(seed_of(seed), rows, columns, p)
    kept = [oracle_kept(seed, element, p) for element in range(rows * columns)]
    assert (mask.shape, mask.flatten().tolist()) == ((rows, columns), kept)


def test_mask_far_from_the_start() -> None:
    rows, columns = 1_000, 601  # past several blocks of any block size below half a million
    mask = philox.keep_mask(seed_of(9), rows, columns, 0.5).flatten()
    assert mask.numel() == rows * columns
    near_powers = {(1 << k) + d for k in range(3, 20) for d in range(-9, 10)}
    for element in sorted(e for e in near_powers | {rows * columns - 1} if 0 <= e < mask.numel()):
        assert bool(mask[element]) == oracle_kept(9, element, 0.5), element


# Seed 9 gives them the lane 2¹⁵, the threshold of p = 0.5; only the last is a word's high half.
@pytest.mark.parametrize("element", [217098, 276382, 369614, 514830, 38833])
def test_a_lane_at_the_threshold_is_kept(element: int) -> None:
    assert lane(9, element) == 1 << 15
    assert philox.keep_mask(seed_of(9), 1_000, 601, 0.5).flatten()[element]


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
    mask = philox.keep_mask(seed_of(seed), 1024, 512, p)
    assert abs(float(mask.double().mean()) - (1 - p)) < bound(mask.numel(), p) + 2**-17
    lanes = mask.view(-1, 8).double().mean(0)
    assert float((lanes - (1 - p)).abs().max()) < bound(mask.numel() // 8, p) + 2**-17


@pytest.mark.parametrize("shift", [1, 2, 8, 512])
def test_neighbours_are_independent(shift: int) -> None:
    mask = philox.keep_mask(seed_of(77), 1024, 512, 0.5).flatten()
    agree = (mask[shift:] == mask[:-shift]).double().mean()
    assert abs(float(agree) - 0.5) < bound(mask.numel() - shift, 0.5)


@pytest.mark.parametrize("other", [78, 77 + (1 << 32), -77])
def test_seeds_are_independent(other: int) -> None:
    one, two = (philox.keep_mask(seed_of(seed), 512, 512, 0.5) for seed in (77, other))
    assert abs(float((one == two).double().mean()) - 0.5) < bound(one.numel(), 0.5)


@pytest.mark.parametrize("p", [0.0, 0.1, 1 / 3, 0.5, 2**-17 * 1.01, 1 - 2**-16])
def test_quantize_is_close_and_stable(p: float) -> None:
    q = philox.quantize(p)
    assert abs(q - p) <= 2**-17
    assert philox.quantize(q) == q
    assert (q * 65536).is_integer()
    assert 0.0 <= q < 1.0
    assert (q > 0) == (p > 0)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan, math.inf, -math.inf, 1e-9, 1 - 1e-9])
def test_quantize_refuses(p: float) -> None:
    with pytest.raises(ValueError, match="dropout="):
        philox.quantize(p)
