"""Which providers meet on which workload, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.floors import Roofs, pool_flops
from benchmarks.measure import TOLERANCES, outputs_agree, peak_memory, prepare, spread, take_turns
from benchmarks.ops import cases
from benchmarks.results import Result
from benchmarks.whole import ALL
from benchmarks.workloads import Workload

_REMEMBERED = ("per_clip", "padded_loop", "packed")
Track = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Comparison:
    """A workload and the providers that compute it, the first being the baseline. mode: see Result.

    memory: whether the peaks of _REMEMBERED are read. sweep: what this is one point of, and where.
    """

    workload: str
    providers: tuple[str, ...]
    mode: str = "features"
    memory: bool = False
    sweep: tuple[str, float] | None = None
    device: str = "cpu"
    dtype: str = "float32"


def _sweep(axis: str, points: dict[float, str], *providers: str) -> tuple[Comparison, ...]:
    return tuple(Comparison(name, providers, sweep=(axis, value)) for value, name in points.items())


def _on_gpu(workload: str, *providers: str, mode: str = "features") -> Comparison:
    return Comparison(workload, providers, mode, mode == "features", device="cuda", dtype="bfloat16")


SUITES: dict[str, tuple[Comparison, ...]] = {
    "cpu": (
        Comparison(
            "tiny8/speech/8", ("per_clip", "padded_loop", "padded_loop_compiled", "trimmed", "packed"), memory=True
        ),
        Comparison("tiny8/short/8", ("per_clip", "padded_loop", "trimmed", "packed")),
        Comparison("tiny8/full/8", ("padded_loop", "packed"), memory=True),
        Comparison("tiny4/spread/8", ("per_clip", "padded_loop", "all_encoders", "trimmed", "packed"), memory=True),
        Comparison("base16/speech/8", ("padded_loop", "packed")),
        Comparison("paper/speech/4", ("per_clip", "packed")),
        Comparison("hubert1/8s/4", ("per_clip", "packed")),
        Comparison("tiny8/speech/8", ("naive", "mixture"), "whole"),
        Comparison("tiny2/8s/1", ("base_alone", "mixture"), "whole"),
        Comparison("tiny8/speech/8", ("padded_loop_step", "packed_step"), "step"),
    ),
    "gpu": (
        _on_gpu("tiny8/speech/64", "per_clip", "padded_loop", "padded_loop_compiled", "packed_by_blas", "packed"),
        _on_gpu("tiny8/short/64", "per_clip", "padded_loop", "packed"),
        _on_gpu("tiny8/full/16", "padded_loop", "packed"),
        _on_gpu("base16/speech/64", "padded_loop", "packed_by_blas", "packed"),
        _on_gpu("paper/speech/16", "per_clip", "packed"),
        _on_gpu("tiny8/speech/16", "naive", "mixture", mode="whole"),
        _on_gpu("tiny2/8s/8", "base_alone", "mixture", mode="whole"),
        _on_gpu("tiny8/speech/16", "padded_loop_step", "packed_step", mode="step"),
    ),
    "sweeps": (
        *_sweep(
            "encoders in the pool", {n: f"tiny{n}/speech/8" for n in (2, 4, 8, 16, 32, 64)}, "padded_loop", "packed"
        ),
        *_sweep("encoders a clip", {k: f"tiny8/speech/8/k{k}" for k in (1, 2, 3, 4)}, "padded_loop", "packed"),
        *_sweep("clips in the batch", {b: f"tiny8/speech/{b}" for b in (1, 2, 4, 8, 16)}, "padded_loop", "packed"),
        *_sweep("seconds in a clip", {s: f"tiny8/{s}s/8" for s in (1, 2, 4, 8, 15, 29)}, "padded_loop", "packed"),
    ),
}


def select(suite: str, workloads: Sequence[str], providers: Sequence[str]) -> list[Comparison]:
    """The comparisons of a suite with some of its workloads and providers; its baselines always stay.

    Raises ValueError for names that mean nothing and where nothing is left.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; expected one of {', '.join(SUITES)}")
    known = dict.fromkeys(comparison.workload for comparison in SUITES[suite])
    for kind, given, names in (("workload", workloads, known), ("provider", providers, ALL)):
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"unknown {kind} {', '.join(unknown)}; suite {suite} has {', '.join(names)}")
    chosen = []
    for c in SUITES[suite]:
        names = tuple(p for i, p in enumerate(c.providers) if not i or not providers or p in providers)
        if (not workloads or c.workload in workloads) and (not providers or set(names) & set(providers)):
            chosen.append(replace(c, providers=names))
    if not chosen:
        raise ValueError(f"nothing of suite {suite} is left by these workloads and providers")
    return chosen


def compare(comparison: Comparison, rounds: int, threads: int, roofs: Roofs, track: Track = iter) -> list[Result]:
    """Time every provider that can run here `rounds` times in turns on `threads` threads, then read its peak memory.

    track: wraps the rounds, for a progress bar. Raises OutputsDifferError before anything is timed.
    """
    torch.set_num_threads(threads)
    workload = Workload.named(comparison.workload, comparison.device, comparison.dtype)
    names = [name for name in comparison.providers if ALL[name].missing() is None]
    floor = roofs.floor(pool_flops(workload)) if comparison.mode == "features" else None
    with torch.no_grad() if comparison.mode != "step" else nullcontext():
        seconds = take_turns(prepare(workload, names), rounds, track)
    baseline = seconds[names[0]]
    return [
        Result(
            subject=workload.name,
            provider=name,
            baseline=names[0],
            mode=comparison.mode,
            dtype=workload.dtype,
            rounds=rounds,
            seconds=spread(seconds[name]),
            speedup=spread([b / s for b, s in zip(baseline, seconds[name], strict=True)]),
            floor=floor,
            memory=peak_memory(workload, name, threads) if comparison.memory and name in _REMEMBERED else None,
            about={"encoders": workload.num_encoders, "slots": workload.top_k, "seconds": workload.seconds},
            sweep=None if comparison.sweep is None else dict(zip(("axis", "value"), comparison.sweep, strict=True)),
        )
        for name in names
    ]


@torch.no_grad()
def compare_ops(workload: Workload, rounds: int, threads: int, roofs: Roofs) -> list[Result]:
    """Every op of a Whisper-tiny layer against its rivals. Raises OutputsDifferError before an op is timed."""
    torch.set_num_threads(threads)
    results = []
    for case in cases(workload):
        baseline, *_ = case.runs
        expected = case.runs["packed"]()
        for name, run in case.runs.items():
            outputs_agree(f"{case.subject}: {name}", [[run()]], [[expected]], TOLERANCES[workload.torch_dtype])
        seconds = take_turns(case.runs, rounds)
        results += [
            Result(
                subject=case.subject,
                provider=name,
                baseline=baseline,
                mode="op",
                dtype=workload.dtype,
                rounds=rounds,
                seconds=spread(seconds[name]),
                speedup=spread([b / s for b, s in zip(seconds[baseline], seconds[name], strict=True)]),
                floor=roofs.floor(case.flops, case.moved),
            )
            for name in case.runs
        ]
    return results


def missing(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """Why a provider of these comparisons cannot run here, by its name."""
    reasons = {name: ALL[name].missing() for comparison in comparisons for name in comparison.providers}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def overhead(report: dict[str, Any]) -> float | None:
    """Share of its time that the mixture adds to a large base encoder, median; None where not measured."""
    for result in report["results"]:
        if result["baseline"] == "base_alone" and result["provider"] == "mixture":
            return 1 / result["speedup"]["median"] - 1
    return None
