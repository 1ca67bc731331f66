"""Where the time goes: of the packed pool by kind of work, of a whole mixture by part, beside the part's arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.clock import now
from benchmarks.floors import base_flops, pool_flops, projector_flops
from benchmarks.providers import packed
from benchmarks.whole import assembled, mixture_of
from benchmarks.workloads import Workload

# By torch's names of what runs; the first that fits. Convolutions of the stem are matrix products too.
_KINDS = (
    ("matrix products", ("mkldnn::_linear", "aten::addmm", "aten::mm", "aten::bmm", "convolution")),
    ("attention", ("scaled_dot_product",)),
    ("norms", ("_norm",)),
    ("activations", ("gelu",)),
    ("spectrograms", ("_fft", "log10")),
)
OTHER, PYTHON = "copies and the rest of torch", "Python, and the profiler itself"
REST = "the rest"


@torch.no_grad()
def kinds(workload: Workload, rounds: int = 5) -> dict[str, float]:
    """Share of the seconds of a run in each kind of work; they add up to 1.

    Taken from the same runs under the profiler: Python is what is left of their time when all of torch's own is taken
    away, so that what the profiler costs counts there.
    """
    run = packed(workload)
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        for _ in range(rounds):
            run()
        wall = time.perf_counter() - start
    seconds = dict.fromkeys([*(kind for kind, _ in _KINDS), OTHER], 0.0)
    for event in profiled.key_averages():
        kind = next((kind for kind, names in _KINDS if any(name in event.key for name in names)), OTHER)
        seconds[kind] += event.self_cpu_time_total / 1e6
    seconds[PYTHON] = max(wall - sum(seconds.values()), 0.0)
    total = sum(seconds.values())
    return {kind: value / total for kind, value in seconds.items()}


@torch.no_grad()
def parts(workload: Workload, rounds: int = 7) -> dict[str, dict[str, float]]:
    """Median seconds and FLOPs of each part of a mixture on its way from waveforms to the language model.

    Log-mel features count where they are computed. Raises ValueError for a workload without a base encoder.
    """
    model = assembled(workload, workload.context)
    run = mixture_of(workload, model)
    modules = {
        "base encoder": (model.audio_tower, base_flops(workload)),
        "routers": (model.mixture.router, 0.0),
        "pool": (model.mixture.pool, pool_flops(workload)),
        "projector": (model.multi_modal_projector, projector_flops(model, workload)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*modules, REST)}
    for name, (module, _) in modules.items():
        _time(module, seconds[name].append)
    for round_ in range(rounds + 1):
        start = now()
        run()
        took = now() - start
        seconds[REST].append(took - sum(seconds[name][-1] for name in modules))
        if not round_:
            for values in seconds.values():
                values.clear()
    flops = {name: count for name, (_, count) in modules.items()} | {REST: 0.0}
    return {name: {"seconds": statistics.median(values), "flops": flops[name]} for name, values in seconds.items()}


def added(of: dict[str, dict[str, float]], *names: str) -> dict[str, float]:
    """What those parts add to the base encoder, relative to it: in "seconds" and in "flops"."""
    base = of["base encoder"]
    return {measure: sum(of[name][measure] for name in names) / base[measure] for measure in ("seconds", "flops")}


def _time(module: nn.Module, note: Callable[[float], Any]) -> None:
    starts: list[float] = []
    module.register_forward_pre_hook(lambda *_: starts.append(now()))
    module.register_forward_hook(lambda *_: note(now() - starts.pop()))
