"""Where the time of the packed pool goes."""

from __future__ import annotations

import time

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.providers import packed
from benchmarks.workloads import Workload

# By torch's names of what runs; the first that fits. Convolutions of the stem are matrix products too.
_KINDS = (
    ("matrix products", ("mkldnn::_linear", "aten::addmm", "aten::mm", "aten::bmm", "convolution")),
    ("attention", ("scaled_dot_product",)),
    ("norms", ("_norm",)),
    ("activations", ("gelu",)),
    ("spectrograms", ("_fft", "log10", "aten::stft")),
)
OTHER, PYTHON = "copies and the rest of torch", "Python"


@torch.no_grad()
def shares(workload: Workload, rounds: int = 3) -> dict[str, float]:
    """Share of the seconds of a run in each kind of work; they add up to 1.

    Python: what is left of the time without the profiler when all of torch's own time is taken away.
    """
    run = packed(workload)
    run()
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    wall = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            run()
    seconds = dict.fromkeys([*(kind for kind, _ in _KINDS), OTHER], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in _KINDS if any(name in event.key for name in names)), OTHER)
        seconds[kind] += event.self_cpu_time_total / 1e6
    seconds[PYTHON] = max(wall - sum(seconds.values()), 0.0)
    total = sum(seconds.values())
    return {kind: value / total for kind, value in seconds.items()}
