"""Dequantising on the CPU, beside bitsandbytes' own, for the layers of Whisper-base and Whisper-large."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from mowe_kernels import csrc, nf4_dequantize_grouped, nf4_quantize

SHAPES = {"base fc1": (2, 2048, 512), "large fc1": (1, 5120, 1280)}  # a pool of two; a base encoder
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=SHAPES, scope="module")
def shape(request):
    return SHAPES[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("provider", ["mowe", "bitsandbytes"])
def test_dequantize(benchmark, shape, dtype, double_quant, provider):
    sizes = " x ".join(map(str, shape))
    benchmark.group = f"dequantize {sizes}, {dtype}, {'nested' if double_quant else 'plain'}"
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    if provider == "mowe":
        if not csrc.available():
            pytest.skip("the compiled library was not built")
        matrix = nf4_quantize(weight, double_quant=double_quant).matrix
        everyone = torch.arange(shape[0] + 1, dtype=torch.int32)
        benchmark(nf4_dequantize_grouped, [matrix], everyone, weight.dtype)
    else:
        states = [bnb.quantize_4bit(w, compress_statistics=double_quant, quant_type="nf4") for w in weight]
        benchmark(lambda: [bnb.dequantize_4bit(*state) for state in states])
