"""NF4 on a GPU: the bits of the CPU, without waiting for the device."""

from __future__ import annotations

import pytest
import torch

from mowe_kernels import csrc, nf4_dequantize_grouped, nf4_quantize

pytestmark = pytest.mark.gpu
SHAPES = [(1, 1), (3, 5), (64, 64), (130, 67), (300, 260), (1536, 384)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_bits_are_those_of_the_cpu(shape, dtype, double_quant):
    assert csrc.available("cuda")
    torch.manual_seed(0)
    weight = torch.randn(3, *shape).to(dtype)
    expected = nf4_quantize(weight, double_quant=double_quant)
    plain = nf4_quantize(weight.cuda())
    assert torch.equal(plain.codes.cpu(), expected.codes)
    assert torch.equal(plain.absmax.cpu(), nf4_quantize(weight).absmax)
    assert torch.equal(expected.to("cuda").dequantize().cpu(), expected.dequantize())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_as_on_the_cpu(value):
    weight = torch.randn(1, 33, 101)
    weight[0, 3, 5] = weight[0, -1, -1] = value
    mine, expected = nf4_quantize(weight.cuda()), nf4_quantize(weight)
    assert torch.equal(mine.codes.cpu(), expected.codes)
    torch.testing.assert_close(mine.absmax.cpu(), expected.absmax, rtol=0, atol=0, equal_nan=True)


def test_all_matrices_for_the_encoders_in_use_without_a_sync():
    torch.manual_seed(0)
    weights = [nf4_quantize(torch.randn(3, n, 64), double_quant=n > 70).to("cuda") for n in range(64, 74)]
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device="cuda")
    assert csrc.available("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = nf4_dequantize_grouped([w.matrix for w in weights], offsets, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, weight in zip(out, weights, strict=True):
        assert torch.equal(mine[[0, 2]].cpu(), weight.to("cpu").dequantize(torch.bfloat16)[[0, 2]])
