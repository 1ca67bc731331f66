"""Which implementation computes an op: plain torch (`reference`) or the Triton kernels (`triton`)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from mowe_kernels import csrc

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


def implementation(op: str) -> ModuleType:
    """The module that computes `op`: `mowe_kernels.<backend>.<op>`, plain torch unless `use_backend` says otherwise.

    The Triton kernels have been run in Triton's interpreter alone, never on a GPU: until they have, nobody gets them
    without asking. The ops of the compiled library have no Triton kernel; without that library they are plain torch.
    """
    if op in csrc.OPS:
        backend = "csrc" if _forced is None and csrc.available() else "reference"
    else:
        backend = _forced or "reference"
    return importlib.import_module(f"mowe_kernels.{backend}.{op}")
