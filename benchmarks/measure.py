"""Side by side: outputs compared, then timed in turns; peak memory of each provider in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.providers import PROVIDERS, Outputs, Run, packed
from benchmarks.workloads import WORKLOADS, Workload

ROOT = Path(__file__).parents[1]
# Largest relative error (Frobenius norm) between packed and transformers features, as promised for float32.
TOLERANCE = 1e-4


class OutputsDifferError(ValueError):
    """Providers that do not compute the same thing: nothing is timed."""


def prepare(workload: Workload, providers: Sequence[str]) -> dict[str, Run]:
    """The timed functions, each having run once.

    Raises OutputsDifferError where one differs from the packed pool in the same context.
    """
    runs = {name: PROVIDERS[name].prepare(workload) for name in providers}
    expected: dict[str, Outputs] = {}
    for name, run in runs.items():
        context = PROVIDERS[name].context or workload.context
        if context not in expected:
            expected[context] = packed(workload, context)()
        if (error := relative_error(run(), expected[context])) > TOLERANCE:
            raise OutputsDifferError(
                f"{workload.name}: {name} differs from the packed pool in the {context!r} context by {error:.1e} "
                f"relative, {TOLERANCE:.0e} is allowed"
            )
    return runs


def relative_error(outputs: Outputs, expected: Outputs) -> float:
    """The largest over all pairs; infinite where shapes differ."""
    pairs = [(a, b) for ours, theirs in zip(outputs, expected, strict=True) for a, b in zip(ours, theirs, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def take_turns(
    runs: dict[str, Run], rounds: int, track: Callable[[Iterable[int]], Iterable[int]] = iter
) -> dict[str, list[float]]:
    """Seconds of each function in each round. Who goes first moves on by one every round."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in track(range(rounds)):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentiles."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[-1]}


def peak_memory(workload: str, provider: str, threads: int) -> dict[str, int] | None:
    """Bytes resident in a fresh process before the timed function first runs, and at most while it does; None where
    the system does not tell (Linux alone does).
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "benchmarks.measure", workload, provider, str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


@torch.no_grad()
def _own_peak(workload: Workload, provider: str) -> dict[str, int]:
    run = PROVIDERS[provider].prepare(workload)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, which making the encoders raised, is forgotten
    before = _resident("VmRSS")
    run()
    return {"before": before, "peak": _resident("VmHWM")}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(_own_peak(WORKLOADS[sys.argv[1]], sys.argv[2])))
