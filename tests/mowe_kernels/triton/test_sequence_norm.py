from __future__ import annotations

import pytest
import torch

from mowe_kernels import sequence_norm, use_backend
from mowe_kernels.triton._launch import override
from tests.mowe_kernels.checks import LENGTHS, Inputs, normal, offsets, raises, rows_with_tail, table
from tests.mowe_kernels.test_sequence_norm import ENCODERS, encoder
from tests.mowe_kernels.triton.accuracy import DEVICE, DTYPES, assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poisoned")

# Tiles and blocks so small that sequences have several, and more tiles than are summed up at a time.
SMALL = {"norm_tile": 8, "norm_block": (4, 16)}
TILE_EDGES = {"tile edges": (7, 9, 8, 1, 16), "many tiles": (70, 0, 2)}


def make_inputs(lengths: tuple[int, ...], tail: int, n: int) -> Inputs:
    x = 3 * rows_with_tail(sum(lengths), tail, n) + 1
    return {"x": x, "weight": normal(ENCODERS, n), "bias": normal(ENCODERS, n)}


def op(lengths: tuple[int, ...], activation: str = "", eps: float = 0.1):
    layout = {"encoder": encoder(lengths).to(DEVICE), "cu_seqlens": offsets(lengths).to(DEVICE)}
    return lambda x, weight, bias: sequence_norm(x, weight, bias, **layout, eps=eps, activation=activation)


@table(LENGTHS | TILE_EDGES, "lengths")
@pytest.mark.parametrize("activation", ["", "gelu"])
def test_is_as_accurate_as_torch(lengths, activation):
    with override(**SMALL):
        inputs = make_inputs(lengths, 3, 19)
        assert_as_accurate_as_torch(op(lengths, activation), inputs, sum(lengths), torch.float32)


def test_more_sequences_than_a_search_looks_at_at_once():
    lengths = (0,) * 129 + (3, 0, 2)
    assert_as_accurate_as_torch(op(lengths), make_inputs(lengths, 0, 5), sum(lengths), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_width_of_a_real_encoder(dtype):
    lengths = (40, 0, 33)
    assert_as_accurate_as_torch(op(lengths, "gelu", 1e-5), make_inputs(lengths, 5, 512), sum(lengths), dtype)


@pytest.mark.parametrize("learning", ["x", "weight"])
def test_gradients_one_by_one(learning):
    lengths = LENGTHS["primes"]
    frozen = tuple({"x", "weight", "bias"} - {learning})
    with override(**SMALL):
        assert_as_accurate_as_torch(
            op(lengths, "gelu"), make_inputs(lengths, 0, 5), sum(lengths), torch.float32, frozen
        )


def test_a_mean_far_from_zero():
    lengths = (37, 60)
    inputs = make_inputs(lengths, 0, 5)
    inputs["x"] += 300
    with override(**SMALL):
        assert_as_accurate_as_torch(op(lengths), inputs, sum(lengths), torch.float32)


def test_a_sequence_does_not_see_its_neighbours():
    lengths = (21, 34, 8)
    x, weight, bias = (value.to(DEVICE, torch.float32) for value in make_inputs(lengths, 0, 5).values())
    with use_backend("triton"), override(**SMALL):
        together = op(lengths)(x, weight, bias)
        alone = op((8,))(x[55:], weight, bias)
    assert torch.equal(together[55:], alone)


def test_refuses_types_it_cannot_compute_in():
    with use_backend("triton"), raises("sequence_norm", "float64"):
        op((2, 2))(**make_inputs((2, 2), 0, 3))
