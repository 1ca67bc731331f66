"""Imported first of all in a process of its own: Triton compiles for an H200 that is not there, and instead of starting
a kernel, what was to be started is noted: hash, programs, the arguments.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
started: list[tuple[str, int, tuple[Any, ...]]] = []


class NoGpu:
    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend() -> None:
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    driver.set_active(NoGpu())
    CompiledKernel.run = property(lambda kernel: lambda *args: started.append((kernel.hash, args[0], args[9:])))
    CompiledKernel.function = None
    CompiledKernel._init_handles = lambda kernel: None


def printed_by(script: str) -> str:
    """What a script prints that begins with `pretend()`; Triton's interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"from tests.mowe_kernels.triton.no_gpu import pretend, started\npretend()\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()
