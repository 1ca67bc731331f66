"""Dequantising on the CPU is faster than bitsandbytes': matrices of Whisper-tiny, -base and -large, and a larger one.

Both as they are called by a layer. bitsandbytes runs once before every timed run, outside the clock, so that both see
the same machine; before each of them other memory is written, as it is between two layers. The floor is the bytes read
and written at the bandwidth that was measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import bitsandbytes.functional as bnb
import pytest
import torch

from benchmarks.floors import Roofs
from mowe_kernels import csrc, nf4_dequantize_grouped, nf4_quantize

SHAPES = [(2, 384, 384), (2, 2048, 512), (1, 5120, 1280), (1, 5120, 5120)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDS = 21
OTHER = 1 << 26  # bytes: more than the caches hold


@pytest.fixture(scope="module")
def roofs() -> Roofs:
    return Roofs.measure()


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(not csrc.available(), reason="the compiled library was not built")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_dequantizes_faster_than_bitsandbytes(benchmark, roofs, threads, shape, dtype, double_quant):
    benchmark.group = f"dequantize {'x'.join(map(str, shape))}"
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    states = [bnb.quantize_4bit(w, compress_statistics=double_quant, quant_type="nf4") for w in weight]
    quantized = nf4_quantize(weight, double_quant=double_quant)
    everyone = torch.arange(shape[0] + 1, dtype=torch.int32)
    seconds, other = [], torch.empty(OTHER, dtype=torch.uint8)

    def theirs() -> list[torch.Tensor]:
        return [bnb.dequantize_4bit(*state) for state in states]

    def ours() -> list[torch.Tensor]:
        return nf4_dequantize_grouped([quantized.matrix], everyone, weight.dtype)

    def run_theirs() -> None:
        other.zero_()
        start = time.perf_counter()
        theirs()
        seconds.append(time.perf_counter() - start)
        other.zero_()

    assert torch.equal(torch.stack(theirs()), ours()[0])
    benchmark.pedantic(ours, setup=run_theirs, rounds=ROUNDS)
    mine = benchmark.stats.stats.data
    speedup = statistics.median(other / own for other, own in zip(seconds, mine, strict=True))
    floor = (quantized.nbytes() + weight.nbytes) / roofs.bandwidth
    benchmark.extra_info |= {"bitsandbytes": statistics.median(seconds), "speedup": speedup, "floor": floor}
    assert speedup > 1
