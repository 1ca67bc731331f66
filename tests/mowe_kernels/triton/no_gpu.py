"""Imported first of all in a process of its own: Triton compiles for an H200 that is not there, and a driver that is
not there notes what it is asked to start.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
DRIVER = "libcuda.so.1"
_COMPILER = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
_BYTES = {"u64": 8, "u32": 4, "f32": 4, "b8": 1}  # of a parameter in PTX, or of its elements
needs_compiler = pytest.mark.skipif(_COMPILER is None, reason="needs a C compiler")


class Started(NamedTuple):
    """What the driver was asked for. parameters: integers; of a descriptor (TMA), what it was made of."""

    function: int
    programs: int
    threads: int
    shared: int
    stream: int
    parameters: tuple[Any, ...]


class _Note(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_uint64), ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32), ("num_attributes", ctypes.c_uint32), ("num_bytes", ctypes.c_uint32),
        ("bytes", ctypes.c_uint8 * 1024),
    ]  # fmt: skip


class NoGpu:
    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


_sizes: dict[int, list[int]] = {}


def pretend() -> None:
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    load = CompiledKernel._init_handles

    def load_and_tell_sizes(kernel: Any) -> None:
        if kernel.module is None:
            load(kernel)
            # Of the parameters, as the machine code wants them.
            found = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)[^,()]*?_param_\d+(?:\[(\d+)])?", kernel.asm["ptx"])
            sizes = _sizes[kernel.function] = [_BYTES[kind] * int(count or 1) for kind, count in found]
            fake().fake_parameters(ctypes.c_uint64(kernel.function), len(sizes), (ctypes.c_size_t * 64)(*sizes))

    CompiledKernel._init_handles = load_and_tell_sizes
    NoGpu.utils, NoGpu.launcher_cls = CudaUtils(), CudaLauncher
    if not hasattr(NoGpu.utils, "launch"):  # a Triton before 3.7, which leaves what older drivers set wrongly
        fake().fake_version(13020)
    driver.set_active(NoGpu())


def fake() -> ctypes.CDLL:
    """The driver."""
    return ctypes.CDLL(DRIVER)


def started() -> list[Started]:
    """What was started since this was asked last."""
    first = ctypes.POINTER(_Note)()
    count = fake().fake_notes(ctypes.byref(first))
    return [_read(note) for note in first[:count]]


def _read(note: _Note) -> Started:
    assert note.num_attributes == 0 and [*note.grid[1:], *note.block[1:]] == [1] * 4
    left, parameters = bytes(note.bytes[: note.num_bytes]), []
    for size in _sizes[note.function]:
        own, left = left[:size], left[size:]
        numbers = [int.from_bytes(own[at : at + 8], "little") for at in range(0, size, 8)]
        parameters.append(numbers[0] if size <= 8 else tuple(numbers))
    assert not left
    return Started(note.function, note.grid[0], note.block[0], note.shared, note.stream, tuple(parameters))


def printed_by(script: str) -> str:
    """What a script prints that begins with `pretend()`; Triton's interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"from tests.mowe_kernels.triton.no_gpu import fake, pretend, started\npretend()\n{script}"
    with tempfile.TemporaryDirectory() as folder:
        # Loaded before anything else, so that whoever asks for a driver by its name gets this one.
        environment |= {"TRITON_LIBCUDA_PATH": folder, "LD_PRELOAD": f"{folder}/{DRIVER}"}
        source = ROOT / "tests/mowe_kernels/triton/fake_cuda.c"
        command = [str(_COMPILER), "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o", f"{folder}/{DRIVER}", source]
        subprocess.run(command, check=True)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()
