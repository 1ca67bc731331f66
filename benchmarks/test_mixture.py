"""The floors that the packed mixture must keep: `python -m pytest benchmarks --benchmark-only`.

The baseline runs once before every timed run, outside the clock, so that both see the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.measure import peak_memory, prepare
from benchmarks.workloads import WORKLOADS

THREADS = 2
ROUNDS = 5


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("workload", "baseline", "least"),
    [("tiny4-spread", "per_clip", 5.0), ("tiny4-full", "padded_loop", 0.95), ("hubert-8s", "per_clip", 1.0)],
)
def test_packed_keeps_its_speedup(benchmark: BenchmarkFixture, workload: str, baseline: str, least: float) -> None:
    runs = prepare(WORKLOADS[workload], (baseline, "packed"))
    seconds = []

    def run_baseline() -> None:
        start = time.perf_counter()
        runs[baseline]()
        seconds.append(time.perf_counter() - start)

    benchmark.pedantic(runs["packed"], setup=run_baseline, rounds=ROUNDS)
    packed = benchmark.stats.stats.data
    speedups = [alone / together for alone, together in zip(seconds, packed, strict=True)]
    benchmark.extra_info |= {"baseline": baseline, "speedups": speedups}
    assert statistics.median(speedups) >= least


@pytest.mark.parametrize("workload", ["tiny4-spread", "tiny4-full"])
def test_packed_takes_no_more_memory(benchmark: BenchmarkFixture, workload: str) -> None:
    """Timed only because `--benchmark-only` leaves out what is not."""
    loop = peak_memory(workload, "padded_loop", THREADS)
    packed = benchmark.pedantic(peak_memory, args=(workload, "packed", THREADS), rounds=1)
    if loop is None:
        pytest.skip("this system does not tell the peak memory of a process")
    benchmark.extra_info |= {"padded_loop": loop, "packed": packed}
    assert packed["peak"] <= loop["peak"]
