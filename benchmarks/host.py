"""What a layer takes the host that launches it: with few rows, the GPU is done before the host is."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from benchmarks.clock import now
from benchmarks.providers import shared_pool
from benchmarks.workloads import Workload

_FEW = "tiny8/1s/1"
_BATCHES, _ROUNDS = 20, 9


@torch.no_grad()
def seconds_a_layer(device: str, dtype: str, workload: str = _FEW) -> float:
    """Seconds that all layers of a pool's encoders take, by their number, the median of several rounds; nothing is
    waited for. Every batch has a number of rows that none before it had, as batches of speech do.
    """
    given = Workload.named(workload, device, dtype)
    pool, seen = shared_pool(given), []
    layers = pool.families[0].layers
    hook = layers[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    pool.encode(given.waveforms(), given.indices, given.context)
    hook.remove()
    (x, rows), *_ = seen
    rounds = []
    for first in range(1, _ROUNDS * _BATCHES, _BATCHES):
        batches = [_with_more_rows(x, first + i) for i in range(_BATCHES)]
        start = now()
        for h in batches:
            for layer in layers:
                h = layer(h, rows)
        rounds.append((time.perf_counter() - start) / (_BATCHES * len(layers)))
    return statistics.median(rounds)


def _with_more_rows(x: Tensor, count: int) -> Tensor:
    """x, then rows of nobody."""
    return torch.cat((x, x.new_zeros(count, x.shape[1])))
