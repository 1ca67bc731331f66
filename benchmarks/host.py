"""What a layer takes the host that launches it: with few rows, the GPU is done before the host is."""

from __future__ import annotations

import statistics
import time
from contextlib import suppress

import torch
from torch import Tensor, nn

from benchmarks.clock import now
from benchmarks.providers import shared_pool
from benchmarks.workloads import Workload
from mowe import EncoderPool
from mowe.families.stacked import through
from mowe_kernels import Level

_FEW = "tiny8/1s/1"
_FRAME = 320  # samples
_BATCHES, _ROUNDS = 20, 9


@torch.no_grad()
def seconds_a_layer(device: str, dtype: str, workload: str = _FEW) -> float:
    """Seconds that all layers of a pool's encoders take, by their number, the median of several rounds; nothing is
    waited for. Every batch is a little longer than the one before, as no batch of speech is as long as another.
    """
    given = Workload.named(workload, device, dtype)
    pool = shared_pool(given)
    layers = pool.families[0].layers
    rounds = []
    for first in range(1, _ROUNDS * _BATCHES, _BATCHES):
        batches = [_given_to_layers(pool, given, longer) for longer in range(first, first + _BATCHES)]
        start = now()
        for h, rows in batches:
            through(layers, h, rows)
        rounds.append((time.perf_counter() - start) / (_BATCHES * len(layers)))
    return statistics.median(rounds)


class _Seen(Exception):
    pass


def _given_to_layers(pool: EncoderPool, given: Workload, longer: int) -> tuple[Tensor, Level]:
    """What the first layer would be given if every clip were so many frames longer."""
    seen = []

    def see(_: nn.Module, args: tuple[Tensor, Level]) -> None:
        seen.append(args)
        raise _Seen

    waves = [torch.nn.functional.pad(wave, (0, longer * _FRAME)) for wave in given.waveforms()]
    hook = pool.families[0].layers[0].register_forward_pre_hook(see)
    with suppress(_Seen):
        pool.encode(waves, given.indices, given.context)
    hook.remove()
    return seen[0]
