"""A linear layer in 4 bits is the linear layer of its dequantised weights."""

from __future__ import annotations

import pytest
import torch

from mowe_kernels import grouped_linear, grouped_linear_nf4, nf4_quantize
from tests.mowe_kernels.checks import GROUPS, int32, normal, offsets, raises, table


@table(GROUPS, "sizes")
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_equals_its_two_steps(sizes, double_quant):
    weight = nf4_quantize(normal(len(sizes), 10, 33).float(), double_quant=double_quant)
    x, bias = normal(sum(sizes), 33).float(), normal(len(sizes), 10).float()
    residual = normal(sum(sizes), 10).float()
    options = {"activation": "gelu", "residual": residual}
    expected = grouped_linear(x, weight.dequantize(), bias, offsets(sizes), **options)
    assert torch.equal(grouped_linear_nf4(x, weight.matrix, bias, offsets(sizes), **options), expected)


def test_op_is_registered_well():
    weight = nf4_quantize(normal(2, 6, 32).float(), double_quant=True).matrix
    args = (normal(5, 32).float(), *weight[:5], [*weight[5:]], normal(2, 6).float(), int32(0, 2, 5), None, "gelu")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mowe.grouped_linear_nf4.default, args, test_utils=checks)


def test_bad_input():
    weight = nf4_quantize(normal(2, 6, 32).float()).matrix
    with raises("stacked weights", "got [2, 6, 32]"):
        grouped_linear_nf4(torch.ones(5, 31), weight, None, int32(0, 2, 5))
    with raises("activation must be one of", "got 'relu'"):
        grouped_linear_nf4(torch.ones(5, 32), weight, None, int32(0, 2, 5), activation="relu")
