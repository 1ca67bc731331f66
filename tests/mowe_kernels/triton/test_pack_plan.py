from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from mowe_kernels import pack_plan, use_backend
from mowe_kernels.triton._launch import override
from tests.mowe_kernels.test_pack_plan import as_tensors, random_routing
from tests.mowe_kernels.triton.accuracy import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned")


def assert_same_plan(indices: Tensor, lengths: Tensor, rank: Tensor, level_bounds: Tensor) -> None:
    arguments = [x.to(DEVICE) for x in (indices, lengths, rank, level_bounds)]
    with use_backend("triton"):
        plan = pack_plan(*arguments)
    with use_backend("reference"):
        expected = pack_plan(*arguments)
    for ours, theirs in zip(plan, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def large_routing(batch: int, slots: int, encoders: int, levels: int):
    generator = torch.Generator().manual_seed(0)
    bounds = torch.randint(0, encoders + 1, (levels, 2), generator=generator, dtype=torch.int32).sort(1).values
    return (
        torch.randint(-1, encoders, (batch, slots), generator=generator),
        torch.randint(0, 1500, (levels, batch), generator=generator, dtype=torch.int32),
        torch.randperm(encoders, generator=generator).int(),
        bounds,
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("block", [16, 2048])
def test_matches_plain_torch(seed, block):
    """16: so small that every batch takes several blocks of clips and of pairs."""
    with override(pack_block=block):
        assert_same_plan(*as_tensors(*random_routing(random.Random(seed))))


@pytest.mark.parametrize(
    ("batch", "slots", "encoders", "levels"), [(300, 2, 16, 11), (37, 8, 128, 3), (1, 1, 1, 1), (64, 4, 4, 18)]
)
def test_sizes(batch, slots, encoders, levels):
    assert_same_plan(*large_routing(batch, slots, encoders, levels))


@pytest.mark.parametrize("encoder", [-1, 0, 2])
def test_all_slots_alike(encoder):
    _, *layout = large_routing(7, 3, 3, 2)
    with override(pack_block=8):
        assert_same_plan(torch.full((7, 3), encoder), *layout)


def test_an_encoder_that_is_not_there_is_an_unused_slot():
    """What cannot be an error without waiting for the device is nobody's address either."""
    indices, *layout = (x.to(DEVICE) for x in large_routing(9, 3, 4, 2))
    indices[::2, 1], beyond = -1, indices.clone()
    beyond[::2, 1] = 4
    with use_backend("triton"):
        for ours, theirs in zip(pack_plan(beyond, *layout), pack_plan(indices, *layout), strict=True):
            assert torch.equal(ours, theirs)


def test_no_clips():
    assert_same_plan(*large_routing(0, 2, 3, 2))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_types_and_strides_of_the_indices(dtype):
    indices, lengths, *layout = large_routing(9, 2, 5, 2)
    assert_same_plan(indices.to(dtype).T.contiguous().T, lengths.T.contiguous().T, *layout)
