from __future__ import annotations

import pytest
import torch

from mowe_kernels import nf4_quantize, use_backend
from mowe_kernels.ops.grouped_linear_nf4 import grouped_linear_nf4, multiplies_in_4_bits
from mowe_kernels.triton import grouped_linear_nf4 as module
from mowe_kernels.triton._launch import override
from mowe_kernels.triton.grouped_linear import Tile
from tests.mowe_kernels.checks import GROUPS, normal, offsets, rows_with_tail, table
from tests.mowe_kernels.triton.accuracy import DEVICE, DTYPES, assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = {"odd columns": (30, 19), "two blocks a row": (128, 48), "blocks over rows": (48, 20)}
EPILOGUES = {"plain": ((), ""), "gelu": (("bias",), "gelu"), "residual": (("bias", "residual"), "")}
SMALL = {"nf4_tile": Tile(16, 16, 32, 4, 2)}


def case(sizes, k, n, double_quant=False, epilogue=(), activation=""):
    """The op on a matrix that is quantised once, whatever type it is computed in, and its inputs."""
    rows, encoders = sum(sizes), len(sizes)
    matrix = nf4_quantize(normal(encoders, n, k).float(), double_quant=double_quant).to(DEVICE).matrix
    values = {"bias": normal(encoders, n), "residual": rows_with_tail(rows, 3, n)}
    inputs = {"x": rows_with_tail(rows, 3, k), "bias": None, "residual": None}
    inputs |= {name: values[name] for name in epilogue}

    def op(x, bias, residual):
        return grouped_linear_nf4(x, matrix, bias, offsets(sizes).to(DEVICE), activation=activation, residual=residual)

    return op, inputs, rows


def compare(dtype, *args, **settings):
    op, inputs, rows = case(*args, **settings)
    with override(**SMALL):
        assert_as_accurate_as_torch(op, inputs, rows, dtype, frozen=("x", "bias", "residual"))


@table(GROUPS, "sizes")
def test_layouts(sizes):
    compare(torch.float32, sizes, 48, 20, True, ("bias", "residual"), "gelu")


@table(SHAPES, "shape")
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_formats(shape, double_quant):
    compare(torch.float32, GROUPS["primes"], *shape, double_quant)


@table(EPILOGUES, "epilogue")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogues(epilogue, dtype):
    compare(dtype, GROUPS["primes"], 128, 48, False, *epilogue)


def test_the_rule():
    """In 4 bits for few rows by a kernel that can, otherwise by way of full weights."""
    weight = nf4_quantize(normal(2, 6, 32).float()).to(DEVICE)
    few, many = (torch.ones(2 * module.FEW_ROWS + more, 32, device=DEVICE) for more in (0, 1))
    with use_backend("triton"):
        assert multiplies_in_4_bits(few, weight.matrix, None)
        with override(nf4_few_rows=module.FEW_ROWS - 1):
            assert not multiplies_in_4_bits(few, weight.matrix)
        assert not multiplies_in_4_bits(many, weight.matrix)
        assert not multiplies_in_4_bits(few, nf4_quantize(normal(2, 6, 31).float()).matrix)
        assert not multiplies_in_4_bits(few, weight.matrix, torch.ones(2, 6, requires_grad=True))
    with use_backend("reference"):
        assert not multiplies_in_4_bits(few, weight.matrix)


def test_gradients_go_by_way_of_full_weights():
    op, inputs, rows = case(GROUPS["primes"], 30, 19, True, ("bias", "residual"), "gelu")
    assert_as_accurate_as_torch(op, inputs, rows, torch.float32)
