"""Side by side: outputs compared, then timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.catalogue import ALL
from benchmarks.clock import host_seconds
from benchmarks.providers import Outputs, Run
from benchmarks.workloads import Workload
from mowe.families import Context

ROOT = Path(__file__).parents[1]
# Largest relative error (Frobenius norm) between this library's features and others': in float32 as promised, in 16
# bits what a few layers of rounding come to.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# A turn lasts at least so many seconds, or so many runs: who is short runs again in it, and the median counts.
_TURN, _RUNS = 1.5, 5
_ENOUGH = 10.0  # seconds after which a provider with two turns gets no more of them

Track = Callable[[Iterable[int]], Iterable[int]]
LeftOut = Callable[[str, Exception], None]


class OutputsDifferError(ValueError):
    """Providers that do not compute the same thing: nothing is timed."""


def prepare(workload: Workload, providers: Sequence[str], left_out: LeftOut | None = None) -> dict[str, Run]:
    """The timed functions, each having run once.

    left_out: is told of a provider that fails or differs, which is then not among them; but not of the baseline, nor of
    what others are compared with. Raises OutputsDifferError where one differs from the library's own in the same
    context.
    """
    # The library in its own context is not only compared with: it is what the others must equal there.
    own = [name for name in providers if ALL[name].same_as == name]
    runs: dict[str, Run] = {}
    expected: dict[tuple[str, Context], Outputs] = {}
    for name in dict.fromkeys((*own, *providers)):
        try:
            runs[name] = _prepared(workload, name, expected)
        except Exception as error:
            if left_out is None or name in (*own, providers[0]):
                raise
            left_out(name, error)
    return {name: runs[name] for name in providers if name in runs}


def _prepared(workload: Workload, name: str, expected: dict[tuple[str, Context], Outputs]) -> Run:
    """expected: what the library gives, by provider and context; added to."""
    provider = ALL[name]
    run = provider.prepare(workload)
    outputs = run()
    if provider.same_as is not None:
        like = provider.same_as, provider.context or workload.context
        if like not in expected:
            expected[like] = outputs if provider.same_as == name else ALL[like[0]].prepare(workload, like[1])()
        tolerance = provider.tolerance or TOLERANCES[workload.torch_dtype]
        outputs_agree(f"{workload.name}: {name}", outputs, expected[like], tolerance)
    return run


def outputs_agree(name: str, outputs: Outputs, expected: Outputs, tolerance: float = TOLERANCES[torch.float32]) -> None:
    """Raise OutputsDifferError unless they do, to a relative error."""
    if not (error := relative_error(outputs, expected)) <= tolerance:
        raise OutputsDifferError(
            f"{name} differs from this library's outputs in the same context by {error:.1e} relative, "
            f"{tolerance:.0e} is allowed"
        )


def relative_error(outputs: Outputs, expected: Outputs) -> float:
    """The largest over all pairs; infinite where shapes differ."""
    pairs = [(a, b) for ours, theirs in zip(outputs, expected, strict=True) for a, b in zip(ours, theirs, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max(_error(a.double(), b.double()) for a, b in pairs)


def _error(ours: Tensor, theirs: Tensor) -> float:
    size = theirs.norm().item()
    return (ours - theirs).norm().item() / size if size else ours.norm().item()


def take_turns(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    track: Track = iter,
    clock: Callable[[Callable[[], Any]], float] = host_seconds,
) -> dict[str, list[float]]:
    """Seconds of each function in each round, those that take long in the first rounds alone.

    Who goes first moves on by one every round. clock: runs a function and says what it took.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in track(range(rounds)):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            if round_ < 2 or sum(seconds[name]) < _ENOUGH:
                turn = [clock(runs[name])]
                while sum(turn) < _TURN and len(turn) < _RUNS:
                    turn.append(clock(runs[name]))
                seconds[name].append(statistics.median(turn))
    return seconds


def speedups(baseline: Sequence[float], own: Sequence[float]) -> list[float]:
    """Of every round that both were in."""
    return [b / s for b, s in zip(baseline, own, strict=False)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentiles."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[-1]}
