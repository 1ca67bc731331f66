"""Which implementation computes an op: plain torch (`reference`) or the Triton kernels (`triton`)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

BACKENDS = ("reference", "triton")

# One for the whole process: autograd runs the backward of CUDA tensors in threads of its own.
_forced: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op called inside the `with` block, in any thread.

    name: "reference" or "triton". With "triton", CPU tensors run through Triton's interpreter, which needs
    `TRITON_INTERPRET=1` in the environment before the first import of triton.
    Raises ValueError for another name.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def implementation(op: str, device: torch.device, dtypes: Collection[torch.dtype] = ()) -> ModuleType:
    """The module that computes `op` on `device`: `mowe_kernels.<backend>.<op>`.

    dtypes: those of its tensors. Without `use_backend`, CUDA tensors go to the Triton kernels where these can run, all
    but float64, which has none; the rest goes to plain torch.
    """
    backend = _forced
    if backend is None:
        suits = device.type == "cuda" and torch.float64 not in dtypes and _triton_runs(device)
        backend = "triton" if suits else "reference"
    return importlib.import_module(f"mowe_kernels.{backend}.{op}")


@cache
def _triton_runs(device: torch.device) -> bool:
    """Whether Triton can build and run kernels for a CUDA device; a warning says why not, the first time."""
    if importlib.util.find_spec("triton") is None:
        obstacle = "triton is not installed"
    elif not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        obstacle = "triton finds no C compiler (gcc or clang)"
    elif torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        obstacle = "the kernels need an NVIDIA GPU of compute capability 8.0 or newer"
    else:
        return True
    warnings.warn(f"computing with plain torch, which is slower: {obstacle}", RuntimeWarning, stacklevel=2)
    return False
