"""Which providers meet on which workload, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.catalogue import ALL
from benchmarks.clock import DeviceClock, host_seconds
from benchmarks.floors import Roofs, pool_flops
from benchmarks.measure import TOLERANCES, LeftOut, Track, outputs_agree, prepare, speedups, spread, take_turns
from benchmarks.memory import peak_memory
from benchmarks.ops import NUM_OPS, cases
from benchmarks.providers import Outputs
from benchmarks.results import Result
from benchmarks.workloads import Workload

_REMEMBERED = ("per_clip", "padded_loop", "nf4_loop", "packed_nf4", "packed")


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


def _on_gpu(workload: str, *providers: str, mode: str = "features", memory: bool = True) -> Comparison:
    memory &= mode == "features"
    return Comparison(workload, providers, mode, memory, device="cuda", dtype="bfloat16")


SUITES: dict[str, tuple[Comparison, ...]] = {
    "cpu": (
        Comparison(
            "tiny8/speech/8",
            ("per_clip", "padded_loop", "trimmed", "packed_by_torch", "packed", "padded_loop_compiled"),
            memory=True,
        ),
        Comparison("tiny8/short/8", ("per_clip", "padded_loop", "trimmed", "packed")),
        Comparison("tiny8/full/8", ("padded_loop", "packed"), memory=True),
        Comparison("tiny4/spread/4", ("per_clip", "padded_loop", "trimmed", "packed", "all_encoders")),
        Comparison("base16/speech/4", ("padded_loop", "packed")),
        Comparison("paper/speech/4", ("per_clip", "packed")),
        Comparison("hubert1/8s/2", ("per_clip", "packed")),
        Comparison("tiny8/speech/4", ("nf4_loop", "nf4_loop_bf16", "packed", "packed_nf4"), memory=True),
        Comparison("tiny8/speech/4", ("naive", "mixture"), "whole"),
        Comparison("tiny2/8s/1", ("base_alone", "mixture"), "whole"),
        Comparison("tiny8/speech/4", ("padded_loop_step", "packed_step"), "step"),
        Comparison("tiny8/speech/2", ("padded_mixture_step", "mixture_step"), "frozen step"),
    ),
    "gpu": (
        _on_gpu("tiny8/speech/64", "per_clip", "padded_loop", "packed"),
        _on_gpu("tiny8/speech/16", "naive", "mixture", "captured", mode="whole"),
        _on_gpu("tiny8/speech/64", "nf4_loop", "packed", "packed_nf4"),
        _on_gpu("tiny8/speech/16", "padded_loop_step", "packed_step", mode="step"),
        _on_gpu("tiny8/speech/16", "padded_mixture_step", "mixture_step", mode="frozen step"),
        _on_gpu("base16/speech/64", "padded_loop", "packed"),
        _on_gpu("paper/speech/16", "per_clip", "packed", memory=False),
        _on_gpu("tiny8/full/16", "padded_loop", "packed", memory=False),
        _on_gpu("tiny8/short/64", "per_clip", "padded_loop", "packed", memory=False),
        # Last, as torch.compile takes long.
        *(
            _on_gpu(name, "padded_loop", "padded_loop_compiled", "packed_by_torch", "packed", memory=False)
            for name in ("tiny8/speech/64", "base16/speech/64")
        ),
        _on_gpu("tiny2/8s/8", "base_alone", "mixture", mode="whole"),
        _on_gpu("tiny4/speech/16", "padded_loop", "all_encoders", "packed_by_blas", "packed", memory=False),
    ),
    "sweeps": (
        *_sweep(
            "encoders in the pool", {n: f"tiny{n}/speech/4" for n in (2, 4, 8, 16, 32, 64)}, "padded_loop", "packed"
        ),
        *_sweep("encoders a clip", {k: f"tiny8/speech/4/k{k}" for k in (1, 2, 3, 4)}, "padded_loop", "packed"),
        *_sweep("clips in the batch", {b: f"tiny8/speech/{b}" for b in (1, 2, 4, 8, 16)}, "padded_loop", "packed"),
        *_sweep("clips in the batch", {b: f"tiny8/speech/{b}" for b in (32, 64, 128)}, "packed"),
        *_sweep("seconds in a clip", {s: f"tiny8/{s}s/4" for s in (1, 2, 4, 8, 15, 30)}, "padded_loop", "packed"),
        *_sweep(
            "% of padding around 60 s of audio",
            {100 - n: f"tiny8/{0.3 * n:g}s/{200 // n}" for n in (100, 50, 25, 10)},
            "padded_loop",
            "packed",
        ),
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
            raise ValueError(f"unknown {kind} {', '.join(map(repr, unknown))}; suite {suite} has {', '.join(names)}")
    chosen = []
    for c in SUITES[suite]:
        names = tuple(p for i, p in enumerate(c.providers) if not i or not providers or p in providers)
        if (not workloads or c.workload in workloads) and (not providers or set(names) & set(providers)):
            chosen.append(replace(c, providers=names))
    if not chosen:
        raise ValueError(f"nothing of suite {suite} is left by these workloads and providers")
    return chosen


def compare(
    comparison: Comparison,
    rounds: int,
    threads: int,
    roofs: Roofs,
    track: Track = iter,
    left_out: LeftOut | None = None,
) -> list[Result]:
    """Time every provider that can run here `rounds` times in turns on `threads` threads.

    track: wraps the rounds, for a progress bar. left_out: see `prepare`. Raises OutputsDifferError before anything is
    timed.
    """
    torch.set_num_threads(threads)
    workload = Workload.named(comparison.workload, comparison.device, comparison.dtype)
    names = [name for name in comparison.providers if ALL[name].missing() is None]
    floor = roofs.floor(pool_flops(workload)) if comparison.mode == "features" else None
    with torch.set_grad_enabled(ALL[names[0]].learns):
        seconds = take_turns(prepare(workload, names, left_out), rounds, track)
    baseline = seconds[names[0]]
    return [
        Result(
            subject=workload.name,
            provider=name,
            baseline=names[0],
            mode=comparison.mode,
            dtype=ALL[name].dtype or workload.dtype,
            rounds=len(seconds[name]),
            seconds=spread(seconds[name]),
            speedup=spread(speedups(baseline, seconds[name])),
            floor=floor,
            about={"encoders": workload.num_encoders, "slots": workload.top_k, "seconds": workload.seconds},
            sweep=None if comparison.sweep is None else dict(zip(("axis", "value"), comparison.sweep, strict=True)),
        )
        for name in seconds
    ]


def remember(comparisons: Sequence[Comparison], results: Sequence[Result], threads: int) -> list[Result]:
    """The results of those comparisons, with the peak memory of providers where it is asked for."""
    asked = {(c.workload, c.mode): c for c in comparisons if c.memory}
    of = {}
    for i, result in enumerate(results):
        comparison = asked.get((result.subject, result.mode))
        if comparison is not None and result.provider in _REMEMBERED:
            of[i] = (Workload.named(comparison.workload, comparison.device, comparison.dtype), result.provider)
    wanted = list(dict.fromkeys(of.values()))  # a provider may be in several comparisons
    peaks = dict(zip(wanted, peak_memory(wanted, threads), strict=True))
    return [replace(result, memory=peaks.get(of.get(i))) for i, result in enumerate(results)]


@torch.no_grad()
def compare_ops(
    workload: Workload, rounds: int, threads: int, roofs: Roofs, track: Track = iter, only: int | None = None
) -> list[Result]:
    """Every op of a Whisper-tiny layer, or only one by its number, against its rivals, forward, then backward.

    On a GPU a rival that fails, or gives something else, is left out, but not the baseline. Raises OutputsDifferError
    before an op is timed.
    """
    torch.set_num_threads(threads)
    clock = DeviceClock() if workload.device == "cuda" else host_seconds
    results = []
    for number, case in zip(track(range(NUM_OPS)), cases(workload), strict=True):
        if only not in (None, number):
            continue
        baseline = next(iter(case.runs))
        for mode, make, times in (("forward", case.runs.__getitem__, 1.0), ("backward", case.backward, case.times)):
            ours = make("packed")
            expected, runs = _as_outputs(ours()), {}
            for name in case.runs:
                title = f"{case.subject}, {mode}: {name}"
                try:
                    run = ours if name == "packed" else make(name)
                    outputs_agree(title, _as_outputs(run()), expected, TOLERANCES[workload.torch_dtype])
                    runs[name] = run
                except Exception as error:
                    if workload.device != "cuda" or name in ("packed", baseline):
                        raise
                    print(f"{title} left out, {type(error).__name__}: {error}")
            del expected
            runs |= case.beside if mode == "forward" else {}
            seconds = take_turns(runs, rounds, clock=clock)
            results += [
                Result(
                    subject=case.subject,
                    provider=name,
                    baseline=baseline,
                    mode=mode,
                    dtype=workload.dtype,
                    rounds=rounds,
                    seconds=spread(seconds[name]),
                    speedup=spread(speedups(seconds[baseline], seconds[name])),
                    floor=roofs.floor(times * case.flops, times * case.moved),
                )
                for name in runs
            ]
    return results


def _as_outputs(result: Tensor | Sequence[Tensor]) -> Outputs:
    return [[result] if isinstance(result, Tensor) else [*result]]


def missing(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """Why a provider of these comparisons cannot run here, by its name."""
    reasons = {name: ALL[name].missing() for comparison in comparisons for name in comparison.providers}
    return {name: reason for name, reason in reasons.items() if reason is not None}
