from __future__ import annotations

import pytest
import torch

from mowe_kernels import use_backend
from mowe_kernels.triton._launch import override
from mowe_kernels.triton.varlen_log_mel import Tile
from tests.mowe_kernels.checks import normal, raises, table
from tests.mowe_kernels.test_varlen_log_mel import LAYOUTS, Layout, bank, check_not_a_number, op, spectrum_of
from tests.mowe_kernels.triton.accuracy import DEVICE, assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poisoned")

LARGER = {
    "valid": ((131, 64, 2, 300), (131, 64, 2, 300)),
    "padded": ((131, 64, 2), (300, 300, 300)),
    "one of two windows is full": ((3000, 5), (3000, 3000)),
}


def check(layout: Layout, k: int, n: int) -> None:
    """Clips so faint that the peak bounds none of their values are as near to float64 as plain torch's."""
    inputs = {"parts": 1e-2 * normal(sum(layout[0]), k, 2), "filters": bank(k, n)}
    assert_as_accurate_as_torch(op(layout), inputs, sum(layout[1]), torch.float32, tuple(inputs))
    check_bounded(layout, k, n)


def check_bounded(layout: Layout, k: int, n: int) -> None:
    """What the peak bounds has the rounding of this one number: the error of many values is the luck of one."""
    parts, filters = spectrum_of(sum(layout[0]), k).float(), bank(k, n).float()
    with use_backend("triton"):
        rows = op(layout)(parts.to(DEVICE), filters.to(DEVICE)).cpu()
    with use_backend("reference"):
        expected = op(layout)(parts.double(), filters.double())
    torch.testing.assert_close(rows.double(), expected, rtol=0, atol=1e-6)


@table(LAYOUTS, "layout")
@pytest.mark.parametrize("n", [23, 80])
@pytest.mark.parametrize("tile", [Tile(16, 16, 16, 4), Tile(16, 64, 32, 4)])
def test_is_as_accurate_as_torch(layout, n, tile):
    with override(log_mel_tile=tile, log_mel_finish=(4, 64)):
        check(layout, 37, n)


@table(LAYOUTS, "layout")
def test_one_filter(layout):
    check_bounded(layout, 37, 1)


@table(LARGER, "layout")
@pytest.mark.parametrize("n", [80, 128])
def test_banks_of_real_encoders(layout, n):
    check(layout, 201, n)


def test_more_tiles_than_are_looked_at_at_once():
    with override(log_mel_tile=Tile(16, 16, 16, 4)):
        check(((1_500, 3), (1_500, 3)), 5, 40)


def test_more_clips_than_are_looked_at_at_once():
    check(((1, 5, 3) * 50, (3, 5, 4) * 50), 5, 8)


def test_what_is_not_a_number_takes_its_clip_alone():
    with use_backend("triton"), override(log_mel_tile=Tile(16, 16, 16, 4)):
        check_not_a_number(DEVICE)


def test_two_runs_are_bitwise_equal():
    parts, filters = (x.float().to(DEVICE) for x in (spectrum_of(140, 201), bank(201, 80)))
    with use_backend("triton"):
        assert torch.equal(*(op(((133, 7), (133, 9)))(parts, filters) for _ in range(2)))


def test_refuses_types_it_cannot_compute_in():
    with use_backend("triton"), raises("varlen_log_mel", "float64"):
        op(((2,), (2,)))(normal(2, 5, 2).to(DEVICE), normal(5, 8).to(DEVICE))
