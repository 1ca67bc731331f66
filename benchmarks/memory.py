"""Peak memory of providers, each in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.catalogue import ALL
from benchmarks.measure import ROOT
from benchmarks.workloads import Workload


def peak_memory(wanted: Sequence[tuple[Workload, str]], threads: int) -> list[dict[str, int] | None]:
    """Of each provider on its workload: bytes resident in a fresh process (or held on its GPU) before the timed
    function first runs, and at most while it does; None where the system does not tell (Linux alone does).
    """
    if not wanted or not Path("/proc/self/clear_refs").exists():
        return [None] * len(wanted)
    named = [(workload.name, workload.device, workload.dtype, provider) for workload, provider in wanted]
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(named), str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in reversed(done.stdout.split("\n")) if line.startswith("[")))


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def _own_peak(name: str, device: str, dtype: str, provider: str, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    with torch.set_grad_enabled(ALL[provider].learns):
        run = ALL[provider].prepare(Workload.named(name, device, dtype))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return {"before": before, "peak": torch.cuda.max_memory_allocated()}
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far, which making the encoders raised, is forgotten
        before = _resident("VmRSS")
        run()
        return {"before": before, "peak": _resident("VmHWM")}


if __name__ == "__main__":
    # This process has imported everything and run nothing, so its children start equal and at once.
    *_, given, number = sys.argv
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as children:
        print(json.dumps(children.starmap(_own_peak, [(*entry, int(number)) for entry in json.loads(given)], 1)))
