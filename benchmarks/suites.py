"""Which providers meet on which workload, and the comparison of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from benchmarks.measure import peak_memory, prepare, spread, take_turns
from benchmarks.providers import PROVIDERS
from benchmarks.results import Result
from benchmarks.workloads import WORKLOADS, Workload


@dataclass(frozen=True)
class Comparison:
    """A workload and the providers that compute it, the first being the baseline."""

    workload: Workload
    providers: tuple[str, ...]


CPU = (
    Comparison(
        WORKLOADS["tiny4-spread"],
        ("per_clip", "per_clip_shared", "per_clip_given", "padded_loop", "trimmed", "packed"),
    ),
    Comparison(WORKLOADS["tiny4-full"], ("padded_loop", "per_clip", "packed")),
    Comparison(WORKLOADS["hubert-8s"], ("per_clip", "padded_loop", "packed")),
)


@torch.no_grad()
def compare(
    comparison: Comparison,
    rounds: int,
    threads: int,
    *,
    memory: bool = True,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[Result]:
    """Time every provider `rounds` times in turns on `threads` threads, then read its peak memory.

    track: wraps the rounds, for a progress bar. Raises OutputsDifferError before anything is timed.
    """
    torch.set_num_threads(threads)
    workload, providers = comparison.workload, comparison.providers
    seconds = take_turns(prepare(workload, providers), rounds, track)
    baseline = seconds[providers[0]]
    return [
        Result(
            workload=workload.name,
            provider=name,
            baseline=providers[0],
            mode="forward",
            dtype="float32",
            context=PROVIDERS[name].context or workload.context,
            num_encoders=workload.num_encoders,
            top_k=workload.top_k,
            lengths=workload.seconds,
            rounds=rounds,
            seconds=spread(seconds[name]),
            speedup=spread([b / s for b, s in zip(baseline, seconds[name], strict=True)]),
            memory=peak_memory(workload.name, name, threads) if memory else None,
        )
        for name in providers
    ]
