"""Guards against becoming slower: `make guard`, in CI after the tests.

The floors are ratios to a baseline of the same run, a quarter to a third under what this code reaches: a busy machine
passes, a loss of more does not. The baseline runs once before every timed run, outside the clock, so that both
see the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.catalogue import ALL
from benchmarks.measure import prepare
from benchmarks.memory import peak_memory
from benchmarks.ops import cases
from benchmarks.workloads import Workload

THREADS = 2
ROUNDS = 3
FLOORS = [
    ("tiny4/speech/4", "per_clip", "packed", 3.7),
    ("tiny4/short/4", "per_clip", "packed", 9.0),
    ("tiny4/full/2", "padded_loop", "packed", 0.7),
    ("hubert1/8s/1", "per_clip", "packed", 0.75),
    ("tiny4/speech/2", "nf4_loop", "packed_nf4", 3.5),
    ("tiny4/speech/2", "naive", "mixture", 3.4),
    ("tiny4/speech/2", "padded_loop_step", "packed_step", 3.0),
]
OP_FLOORS = {
    "grouped_linear": (0.75, 0.75),
    "grouped_mlp": (0.7, 0.6),
    "grouped_layer_norm": (0.45, 0.7),
    "varlen_attention": (1.6, 1.6),
    "grouped_conv1d": (0.7, 1.2),
}  # forward, backward


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("workload", "baseline", "provider", "least"), FLOORS)
def test_keeps_its_speedup(
    benchmark: BenchmarkFixture, workload: str, baseline: str, provider: str, least: float
) -> None:
    with torch.set_grad_enabled(ALL[provider].learns):
        runs = prepare(Workload.named(workload), (baseline, provider))
        assert _speedup(benchmark, runs[baseline], runs[provider], ROUNDS) >= least


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("op", OP_FLOORS)
def test_op_keeps_its_speedup(benchmark: BenchmarkFixture, op: str, mode: str) -> None:
    case = next(case for case in cases(Workload.named("tiny4/speech/4")) if case.subject.startswith(op))
    baseline = next(iter(case.runs))
    with torch.no_grad():
        runs = [case.runs[name] if mode == "forward" else case.backward(name) for name in (baseline, "packed")]
        for run in runs:
            run()
        assert _speedup(benchmark, *runs, 5 * ROUNDS) >= OP_FLOORS[op][mode == "backward"]


def test_takes_no_more_memory(benchmark: BenchmarkFixture) -> None:
    """Timed only because `--benchmark-only` leaves out what is not."""
    workloads = [Workload.named(name) for name in ("tiny4/speech/4", "tiny4/full/4")]
    wanted = [(workload, provider) for workload in workloads for provider in ("padded_loop", "packed")]
    peaks = benchmark.pedantic(peak_memory, args=(wanted, THREADS), rounds=1)
    if peaks[0] is None:
        pytest.skip("this system does not tell the peak memory of a process")
    benchmark.extra_info["peaks"] = peaks
    for loop, packed in zip(peaks[::2], peaks[1::2], strict=True):
        assert packed["peak"] <= loop["peak"]


def _speedup(benchmark: BenchmarkFixture, baseline: Callable[[], Any], own: Callable[[], Any], rounds: int) -> float:
    """Median over the rounds of the baseline's seconds by those of the function that is benchmarked."""
    theirs: list[float] = []

    def run_baseline() -> None:
        start = time.perf_counter()
        baseline()
        theirs.append(time.perf_counter() - start)

    benchmark.pedantic(own, setup=run_baseline, rounds=rounds)
    speedups = [a / b for a, b in zip(theirs, benchmark.stats.stats.data, strict=True)]
    benchmark.extra_info["speedups"] = speedups
    return statistics.median(speedups)
