"""One schema for every result, and where and on what it was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT

SCHEMA = 1
_PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Result:
    """One provider on one workload.

    seconds, speedup: median, p20, p80 over the rounds. speedup: seconds of the baseline by seconds of this provider,
    in the same round. memory: bytes resident before the run and at its peak, None where they cannot be read.
    lengths: seconds of audio in each clip.
    """

    workload: str
    provider: str
    baseline: str
    mode: str
    dtype: str
    context: str
    num_encoders: int
    top_k: int
    lengths: tuple[float, ...]
    rounds: int
    seconds: dict[str, float]
    speedup: dict[str, float]
    memory: dict[str, int] | None


def machine(threads: int) -> dict[str, Any]:
    """The machine, the versions and the state of the sources."""
    return {
        "device": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "blas": torch.__config__.show().partition("BLAS_INFO=")[2].partition(",")[0],
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def save(path: Path, command: str, threads: int, results: list[Result]) -> None:
    """Write a results file, whole or not at all."""
    report = {"schema": SCHEMA, "command": command, **machine(threads), "results": [asdict(r) for r in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(report, indent=1) + "\n")
    draft.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a results file. Raises ValueError for one of another schema."""
    report = json.loads(path.read_text())
    if report.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected results of schema {SCHEMA}, got {report.get('schema')}")
    return report


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2] for line in info.read_text().split("\n") if line.startswith("model name")]
    return " ".join((names[0] if names else platform.processor() or platform.machine()).split())


def _git(*arguments: str) -> str | None:
    """What git says about the sources; None outside a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
