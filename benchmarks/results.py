"""One schema for every result, and where and on what it was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT
from mowe_kernels.tune import driver

SCHEMA = 3
_PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "numpy")


@dataclass(frozen=True)
class Result:
    """One provider on one workload, or one op.

    subject: the workload, or the op and its sizes. mode: of a workload "features" of the pool, "whole" way to the
    language model, training "step" of the pool, "frozen step" of the whole way with a frozen base encoder; of an op
    "forward" or "backward". dtype: of the weights, "nf4" among them. rounds: how often it was timed. seconds, speedup:
    median, p20, p80 over the rounds; speedup: seconds of the baseline by seconds of this provider, in the same round.
    floor: the least seconds this machine could take, None where nobody counted. memory: bytes resident before the run
    and at its peak, None where not read. about: encoders, slots and lengths in seconds of a workload. sweep: what is
    varied in a series of workloads, and its value.
    """

    subject: str
    provider: str
    baseline: str
    mode: str
    dtype: str
    rounds: int
    seconds: dict[str, float]
    speedup: dict[str, float]
    floor: float | None = None
    memory: dict[str, int] | None = None
    about: dict[str, Any] | None = None
    sweep: dict[str, Any] | None = None


def machine(threads: int, gpu: bool) -> dict[str, Any]:
    """The machine, the versions and the state of the sources."""
    return {
        "device": torch.cuda.get_device_name() if gpu else _cpu_model(),
        **({"driver": driver()} if gpu else {}),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES if find_spec(name)},
        "blas": torch.__config__.show().partition("BLAS_INFO=")[2].partition(",")[0],
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def save(path: Path, command: str, threads: int, results: list[Result], gpu: bool = False, **more: Any) -> None:
    """Write a results file, whole or not at all. more: entries beside those of the machine."""
    entries = [asdict(result) for result in results]
    report = {"schema": SCHEMA, "command": command, **machine(threads, gpu), **more, "results": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(report, indent=1) + "\n")
    draft.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a results file. Raises ValueError for a file that is none, or one of another schema."""
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path}: expected a results file, JSON") from None
    found = report.get("schema") if isinstance(report, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path}: expected results of schema {SCHEMA}, got {found}")
    return report


def on_gpus(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured on GPUs, by the names of their folders. Raises ValueError as `load` does."""
    return {path.parent.name: load(path) for path in sorted(folder.glob("*/gpu.json"))}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n") if info.exists() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return " ".join((names[0] if names else platform.processor() or platform.machine()).split())


def _git(*arguments: str) -> str | None:
    """What git says about the sources; None outside a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
