"""NF4 on a GPU: the bits of the CPU, without waiting for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowe_kernels import (
    Nf4LayerParameters,
    csrc,
    encoder_layers,
    nf4_dequantize_grouped,
    nf4_quantize,
    use_backend,
)
from mowe_kernels import attention as attention_of_device
from mowe_kernels.triton import _layers, varlen_attention
from mowe_kernels.triton._launch import override

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


@pytest.mark.skipif(not csrc.available(), reason="the compiled library was not built")
@pytest.mark.parametrize("pre_norm", [True, False], ids=["before", "after"])
def test_a_repeated_layer_gives_what_its_parts_do(monkeypatch, pre_norm):
    """The layers after the first are launched again, without waiting for the device, with other numbers of rows."""
    d, hidden, encoders = 384, 1536, 3

    def layer() -> Nf4LayerParameters:
        widths = d, d, 3 * d, d, d, d, hidden, d
        tensors = [torch.randn(encoders, width, dtype=torch.bfloat16, device="cuda") for width in widths]
        shapes = (3 * d, d), (d, d), (hidden, d), (d, hidden)
        weights = [torch.randn(encoders, n, k, device="cuda") / k**0.5 for n, k in shapes]
        return Nf4LayerParameters(*tensors, *(nf4_quantize(weight, double_quant=True).matrix for weight in weights))

    def results(x: Tensor, parameters: Nf4LayerParameters, offsets: Tensor) -> list[Tensor]:
        given = offsets, offsets.clone(), x.shape[0]
        return [encoder_layers(x, [parameters] * count, *given, heads=6, pre_norm=pre_norm) for count in (1, 3)]

    # Else a table that finds another library's attention faster leaves nothing to repeat.
    monkeypatch.setattr(attention_of_device, "choose", lambda *args: varlen_attention)
    with use_backend("triton"), override():  # which begins and ends with nothing kept
        for number, count in enumerate((150, 160, 131)):
            parameters, x = layer(), torch.randn(count, d, dtype=torch.bfloat16, device="cuda")
            offsets = torch.tensor([0, 70, 70, count], dtype=torch.int32, device="cuda")
            torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first compiles
            try:
                repeated = results(x, parameters, offsets)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            with monkeypatch.context() as patch:
                patch.setattr(_layers, "MOST_BYTES", dict.fromkeys(_layers.MOST_BYTES, 0))
                patch.setattr(_layers, "_kept", {})
                assert all(map(torch.equal, repeated, results(x, parameters, offsets)))
        assert list(map(len, _layers._kept.values())) == [1]
