from __future__ import annotations

import pytest
import torch

from mowe_kernels import grouped_layer_norm, use_backend
from mowe_kernels.triton._launch import override
from tests.mowe_kernels.checks import GROUPS, Inputs, normal, offsets, raises, rows_with_tail, table
from tests.mowe_kernels.triton.accuracy import DEVICE, DTYPES, assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poisoned")


def make_inputs(sizes: tuple[int, ...], tail: int, d: int) -> Inputs:
    x = rows_with_tail(sum(sizes), tail, d)
    return {"x": 3 * x + 1, "weight": normal(len(sizes), d), "bias": normal(len(sizes), d)}


def op(sizes: tuple[int, ...], activation: str = ""):
    def call(x, weight, bias):
        return grouped_layer_norm(x, weight, bias, offsets(sizes).to(DEVICE), eps=0.1, activation=activation)

    return call


@table(GROUPS, "sizes")
@pytest.mark.parametrize("d", [19, 32])
@pytest.mark.parametrize("activation", ["", "gelu"])
def test_is_as_accurate_as_torch(sizes, d, activation):
    with override(layer_norm_block=4 * 32, layer_norm_chunk=6):
        assert_as_accurate_as_torch(op(sizes, activation), make_inputs(sizes, 3, d), sum(sizes), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [384, 1280])
def test_widths_of_real_encoders(dtype, d):
    sizes = (5, 0, 30)
    assert_as_accurate_as_torch(op(sizes), make_inputs(sizes, 5, d), sum(sizes), dtype)


def test_sums_more_parts_than_it_reads_at_a_time():
    sizes = (40, 0, 3)
    with override(layer_norm_block=16, layer_norm_chunk=1):
        assert_as_accurate_as_torch(op(sizes), make_inputs(sizes, 0, 16), sum(sizes), torch.float32)


@pytest.mark.parametrize("learning", ["x", "weight"])
def test_gradients_one_by_one(learning):
    sizes = GROUPS["primes"]
    frozen = tuple({"x", "weight", "bias"} - {learning})
    assert_as_accurate_as_torch(op(sizes), make_inputs(sizes, 0, 19), sum(sizes), torch.float32, frozen)


def test_reads_what_is_not_contiguous():
    sizes = GROUPS["primes"]
    at = torch.stack((offsets(sizes), offsets(sizes) + 1), 1).to(DEVICE)[:, 0]

    def call(**inputs):
        return grouped_layer_norm(**{name: v.mT.contiguous().mT for name, v in inputs.items()}, group_offsets=at)

    assert_as_accurate_as_torch(call, make_inputs(sizes, 0, 19), sum(sizes), torch.float32)


def test_refuses_types_it_cannot_compute_in():
    x, weight = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    with use_backend("triton"), raises("grouped_layer_norm", "float64"):
        grouped_layer_norm(x, weight, weight, offsets((2, 2)))
