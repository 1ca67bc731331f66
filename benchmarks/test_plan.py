"""The packing plan in C++ is faster than the same in plain torch; both run in turns."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from mowe_kernels import csrc
from mowe_kernels.csrc import pack_plan as compiled
from mowe_kernels.reference import pack_plan as reference

SIZES = [(1, 1, 1, 1), (8, 2, 8, 4), (64, 4, 32, 6)]
ROUNDS = 101


@pytest.mark.skipif(not csrc.available(), reason="the compiled library was not built")
@pytest.mark.parametrize(("batch", "slots", "encoders", "levels"), SIZES)
def test_plans_faster_than_plain_torch(benchmark, batch, slots, encoders, levels):
    torch.manual_seed(0)
    indices = torch.randint(-1, encoders, (batch, slots))
    lengths = torch.randint(0, 1500, (levels, batch), dtype=torch.int32)
    layout = torch.randperm(encoders).int(), torch.tensor([[0, encoders]] * levels, dtype=torch.int32)
    seconds = []

    def run_reference() -> None:
        start = time.perf_counter()
        reference.forward(indices, lengths, *layout)
        seconds.append(time.perf_counter() - start)

    benchmark.pedantic(
        lambda: compiled.forward(indices, lengths, *layout), setup=run_reference, rounds=ROUNDS, warmup_rounds=5
    )
    mine = benchmark.stats.stats.data
    speedup = statistics.median(other / own for other, own in zip(seconds[-ROUNDS:], mine, strict=True))
    benchmark.extra_info |= {"plain torch": statistics.median(seconds), "speedup": speedup}
    assert speedup > 2
