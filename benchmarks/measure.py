"""Side by side: outputs compared, then timed in turns; peak memory of each provider in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.clock import now
from benchmarks.providers import Outputs, Run
from benchmarks.whole import ALL
from benchmarks.workloads import Workload

ROOT = Path(__file__).parents[1]
# Largest relative error (Frobenius norm) between this library's features and others': in float32 as promised, in 16
# bits what a few layers of rounding come to.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class OutputsDifferError(ValueError):
    """Providers that do not compute the same thing: nothing is timed."""


def prepare(workload: Workload, providers: Sequence[str]) -> dict[str, Run]:
    """The timed functions, each having run once.

    Raises OutputsDifferError where one differs from the library's own in the same context.
    """
    runs = {name: ALL[name].prepare(workload) for name in providers}
    outputs = {name: run() for name, run in runs.items()}
    # The library in its own context is not only compared with: it is what the others must equal there.
    expected = {(name, workload.context): outputs[name] for name in outputs if ALL[name].same_as == name}
    for name in providers:
        same_as, context = ALL[name].same_as, ALL[name].context or workload.context
        if same_as is None:
            continue
        if (same_as, context) not in expected:
            expected[same_as, context] = ALL[same_as].prepare(workload, context)()
        outputs_agree(
            f"{workload.name}: {name}", outputs[name], expected[same_as, context], TOLERANCES[workload.torch_dtype]
        )
    return runs


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
    return max(((a.double() - b).norm() / b.double().norm()).item() for a, b in pairs)


def take_turns(
    runs: dict[str, Run], rounds: int, track: Callable[[Iterable[int]], Iterable[int]] = iter
) -> dict[str, list[float]]:
    """Seconds of each function in each round. Who goes first moves on by one every round."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in track(range(rounds)):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            start = now()
            runs[name]()
            seconds[name].append(now() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentiles."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[-1]}


def peak_memory(workload: Workload, provider: str, threads: int) -> dict[str, int] | None:
    """Bytes resident in a fresh process (or held on its GPU) before the timed function first runs, and at most while it
    does; None where the system does not tell (Linux alone does).
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    where = [workload.name, workload.device, workload.dtype]
    command = [sys.executable, "-m", "benchmarks.measure", *where, provider, str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


@torch.no_grad()
def _own_peak(workload: Workload, provider: str) -> dict[str, int]:
    run = ALL[provider].prepare(workload)
    if workload.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return {"before": before, "peak": torch.cuda.max_memory_allocated()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, which making the encoders raised, is forgotten
    before = _resident("VmRSS")
    run()
    return {"before": before, "peak": _resident("VmHWM")}


if __name__ == "__main__":
    *where, name, number = sys.argv[1:]
    torch.set_num_threads(int(number))
    print(json.dumps(_own_peak(Workload.named(*where), name)))
