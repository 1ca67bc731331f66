from __future__ import annotations

import pytest
import torch

from mowe_kernels import use_backend
from mowe_kernels.triton._launch import override
from tests.mowe_kernels.checks import normal, raises, table
from tests.mowe_kernels.test_varlen_stft import CLIPS, op
from tests.mowe_kernels.triton.accuracy import DEVICE, assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poisoned")

WINDOW = 480_000
NEAR_30_S = {
    "short and nearly full": (400, 479_640),
    "ends in the padding": (479_801, 479_959),
    "full": (480_000, 479_999),
}


def check(clips: tuple[int, ...], padded_to: int) -> None:
    inputs = {"samples": normal(sum(clips))}
    frames = len(op(clips, padded_to)(inputs["samples"]))
    assert_as_accurate_as_torch(op(clips, padded_to), inputs, frames, torch.float32, ("samples",))


@table(CLIPS, "batch")
@pytest.mark.parametrize("block", [1, 4, 16])
def test_is_as_accurate_as_torch(batch, block):
    with override(stft_block=block):
        check(*batch)


@table(NEAR_30_S, "clips")
def test_windows_of_30_s(clips):
    with override(stft_block=128):
        check(clips, WINDOW)


def test_more_clips_than_are_looked_at_at_once():
    check((400, 481, 560) * 50, 0)


def test_two_runs_are_bitwise_equal():
    samples = normal(7_721).float().to(DEVICE)
    with use_backend("triton"):
        assert torch.equal(*(op((7_321, 400))(samples) for _ in range(2)))


def test_refuses_types_it_cannot_compute_in():
    with use_backend("triton"), raises("varlen_stft", "float64"):
        op((400,))(normal(400).to(DEVICE))
