"""What a layer takes the host that launches it: with few rows, the GPU is done before the host is."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.clock import now
from benchmarks.providers import shared_pool
from benchmarks.workloads import Workload

_FEW = "tiny8/1s/1"
_CALLS, _ROUNDS = 50, 9


@torch.no_grad()
def seconds_a_layer(device: str, dtype: str, workload: str = _FEW) -> float:
    """Seconds from the call of one layer of a pool to the next, the median of several rounds; nothing is waited for."""
    given = Workload.named(workload, device, dtype)
    pool, seen = shared_pool(given), []
    layer = pool.families[0].layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args))
    pool.encode(given.waveforms(), given.indices, given.context)
    hook.remove()
    rounds = []
    for _ in range(_ROUNDS):
        start = now()
        for _ in range(_CALLS):
            layer(*seen[0])
        rounds.append((time.perf_counter() - start) / _CALLS)
    return statistics.median(rounds)
