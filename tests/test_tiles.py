"""How the wide product is cut: the machine is kept busy, and little is computed for nothing."""

import pytest
import torch

from loradrop.kernels import tiles
from loradrop.kernels.tiles import Machine, cdiv

H100 = Machine(90, 132)


def columns(m: int, c: int, machine: Machine = H100) -> int:
    """The columns of a tile for an output (m, c)."""
    return tiles.gemm_ext(machine, torch.bfloat16, m, c).BN


def busy(m: int, c: int, width: int) -> float:
    """The useful part of all waves of tiles of 128 rows."""
    waves = cdiv(cdiv(m, 128) * cdiv(c, width), H100.sms)
    return m * c / (waves * H100.sms * 128 * width)


@pytest.mark.parametrize(
    ("m", "c", "width", "least"),
    [
        (8192, 4096, 256, 0.96),
        (8192, 1024, 256, 0.96),
        (8192, 14336, 256, 0.96),
        (4096, 4096, 256, 0.96),
        (2048, 5120, 128, 0.96),  # 256 wide: 0.81
        (8192, 768, 128, 0.96),  # 256 wide: 0.72
        (8192, 1152, 128, 0.85),  # 256 wide: 0.72
        (8192, 384, 256, 0.72),  # as good as twice as many of 128 columns, with fewer ends
        (32768, 64, 128, 0.48),  # 256 wide: 0.24
        (256, 4096, 128, 0.48),  # 256 wide: 0.24
    ],
)
def test_the_tiles_fit_the_waves_and_the_columns(m: int, c: int, width: int, least: float) -> None:
    assert columns(m, c) == width
    assert busy(m, c, width) >= least
    assert busy(m, c, width) >= busy(m, c, 384 - width) / 1.1


def test_a_first_product_leaves_room_in_shared_memory() -> None:
    """Either width, one stage less; the widest tile is stored in halves."""
    for m in (256, 8192):
        last, first = (
            tiles.gemm_ext(H100, torch.bfloat16, m, 4096, first=first) for first in (False, True)
        )
        assert (last.stages, first.stages) == (4, 3)
        assert first == last._replace(stages=3)
        assert last.halves == last.BN // 128


@pytest.mark.parametrize(("arch", "columns", "widest"), [(80, 128, 16), (90, 256, 32)])
def test_one_read_of_dy_where_it_moves_less(arch: int, columns: int, widest: int) -> None:
    """Planes of t are less than a read of dy, of which something does not stay in L2."""
    machine, m, n = Machine(arch, 132), 8192, 4096
    for r in (8, 16, 32, 64, 256):
        cut = tiles.backward(machine, torch.bfloat16, m, n, r)
        assert (cut is not None) == (r <= widest)
        if cut is not None:
            assert columns == cut.BC and 8 * tiles.rank_tile(r) / cut.BC < 2
            assert 1 <= cut.split <= m // 256
    for dtype, rows, width in (
        (torch.float32, m, n), (torch.bfloat16, 512, n), (torch.bfloat16, m, n + 1)
    ):  # fmt: skip
        assert tiles.backward(machine, dtype, rows, width, 16) is None
