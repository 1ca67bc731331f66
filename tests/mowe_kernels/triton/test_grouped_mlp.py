from __future__ import annotations

import pytest
import torch

from mowe_kernels import grouped_mlp, use_backend
from mowe_kernels.triton import _descriptors
from mowe_kernels.triton._launch import ARCHITECTURES, assume, override
from mowe_kernels.triton.grouped_linear import Tile
from mowe_kernels.triton.grouped_mlp import Block
from tests.mowe_kernels.checks import GROUPS, Inputs, normal, offsets, raises, rows_with_tail, table
from tests.mowe_kernels.triton.accuracy import DEVICE, DTYPES, assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poisoned")

FUSED = {"fused": Block(16, 16, 16, 4, 2), "composed": None}
SMALL = {
    "gemm_tile": Tile(16, 32, 32, 4, 2),
    "wgrad_tile": Tile(32, 32, 16, 4, 2),
    "wgrad_chunk": 6,
    "layer_norm_block": 128,
    "layer_norm_chunk": 6,
}


def make_inputs(sizes: tuple[int, ...], tail: int, d: int, f: int, norm: bool = True) -> Inputs:
    encoders = len(sizes)
    return {
        "x": 3 * rows_with_tail(sum(sizes), tail, d) + 1,
        "norm_weight": normal(encoders, d) if norm else None,
        "norm_bias": normal(encoders, d) if norm else None,
        "fc1_weight": normal(encoders, f, d) / d**0.5,
        "fc1_bias": normal(encoders, f),
        "fc2_weight": normal(encoders, d, f) / f**0.5,
        "fc2_bias": normal(encoders, d),
    }


def op(sizes: tuple[int, ...]):
    return lambda **inputs: grouped_mlp(**inputs, group_offsets=offsets(sizes).to(DEVICE), eps=0.1)


@table(GROUPS, "sizes")
@table(FUSED, "block")
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_is_as_accurate_as_torch(sizes, block, norm):
    inputs = make_inputs(sizes, 3, 29, 37, norm)
    with override(mlp_block=block, **SMALL):
        assert_as_accurate_as_torch(op(sizes), inputs, sum(sizes), torch.float32)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2])
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("d", [136, 264])
def test_settings_of_every_architecture(dtype, capability, d):
    """The blocks of the tables, several of them in each direction."""
    sizes = (130, 0, 3)
    inputs = make_inputs(sizes, 5, d, 72)
    with assume(ARCHITECTURES[capability]):
        assert_as_accurate_as_torch(op(sizes), inputs, sum(sizes), dtype, frozen=tuple(inputs))


@pytest.mark.parametrize("f", [72, 96])
def test_blocks_fetched_through_descriptors(f, monkeypatch):
    """What another encoder's weights hold spreads to nobody's rows, nor where a block ends past an encoder's own."""
    sizes, described = (130, 0, 3), []
    inputs = make_inputs(sizes, 5, 136, f)
    inputs["fc1_weight"][1] = inputs["fc2_weight"][1] = torch.inf
    describe = _descriptors._described
    monkeypatch.setattr(_descriptors, "_described", lambda *args: described.append(args) or describe(*args))
    with assume(ARCHITECTURES[90]), override(tma_products=0, mlp_block=Block(64, 32, 128, 8, 2)):
        assert_as_accurate_as_torch(op(sizes), inputs, sum(sizes), torch.float16, frozen=tuple(inputs))
    assert len(described) == (2 if f % 32 == 0 else 0)


def test_reads_what_is_not_contiguous():
    sizes = GROUPS["primes"]
    at = torch.stack((offsets(sizes), offsets(sizes) + 1), 1).to(DEVICE)[:, 0]

    def call(**inputs):
        return grouped_mlp(**{name: v.mT.contiguous().mT for name, v in inputs.items()}, group_offsets=at)

    with override(**SMALL):
        assert_as_accurate_as_torch(call, make_inputs(sizes, 0, 29, 37), sum(sizes), torch.float32)


@pytest.mark.parametrize("learning", ["x", "fc1_bias"])
def test_gradients_one_by_one(learning):
    sizes = GROUPS["primes"]
    inputs = make_inputs(sizes, 0, 29, 37)
    with override(**SMALL):
        frozen = tuple(name for name in inputs if name != learning)
        assert_as_accurate_as_torch(op(sizes), inputs, sum(sizes), torch.float32, frozen)


def test_refuses_types_it_cannot_compute_in():
    inputs = {name: value for name, value in make_inputs((2, 2), 0, 3, 5).items()}
    with use_backend("triton"), raises("grouped_mlp", "float64"):
        op((2, 2))(**inputs)
