"""Guards against becoming slower: `make bench`, or `python -m pytest benchmarks --benchmark-only`.

The floors are ratios to a baseline of the same run, somewhat under what the committed results hold, so that they fail
for a change of the code and not for a busy machine. The baseline runs once before every timed run, outside the clock,
so that both see the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.measure import peak_memory, prepare
from benchmarks.workloads import Workload

THREADS = 2
ROUNDS = 3
FLOORS = [
    ("tiny4/spread/8", "per_clip", "packed", 4.5),
    ("tiny8/short/8", "per_clip", "packed", 9.0),
    ("tiny8/full/8", "padded_loop", "packed", 0.95),
    ("hubert1/8s/4", "per_clip", "packed", 1.0),
    ("tiny8/speech/8", "naive", "mixture", 3.5),
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("workload", "baseline", "provider", "least"), FLOORS)
def test_keeps_its_speedup(
    benchmark: BenchmarkFixture, workload: str, baseline: str, provider: str, least: float
) -> None:
    runs = prepare(Workload.named(workload), (baseline, provider))
    seconds = []

    def run_baseline() -> None:
        start = time.perf_counter()
        runs[baseline]()
        seconds.append(time.perf_counter() - start)

    benchmark.pedantic(runs[provider], setup=run_baseline, rounds=ROUNDS)
    ours = benchmark.stats.stats.data
    speedups = [theirs / own for theirs, own in zip(seconds, ours, strict=True)]
    benchmark.extra_info |= {"baseline": baseline, "speedups": speedups}
    assert statistics.median(speedups) >= least


@pytest.mark.parametrize("workload", ["tiny4/spread/8", "tiny4/full/8"])
def test_takes_no_more_memory(benchmark: BenchmarkFixture, workload: str) -> None:
    """Timed only because `--benchmark-only` leaves out what is not."""
    loop = peak_memory(Workload.named(workload), "padded_loop", THREADS)
    packed = benchmark.pedantic(peak_memory, args=(Workload.named(workload), "packed", THREADS), rounds=1)
    if loop is None:
        pytest.skip("this system does not tell the peak memory of a process")
    benchmark.extra_info |= {"padded_loop": loop, "packed": packed}
    assert packed["peak"] <= loop["peak"]
