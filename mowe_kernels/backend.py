"""Which implementation computes an op: plain torch (`reference`) or the Triton kernels (`triton`)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch

BACKENDS = ("reference", "triton")

_forced: ContextVar[str | None] = ContextVar("mowe_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op called inside the `with` block.

    name: "reference" or "triton". With "triton", CPU tensors run through Triton's interpreter, which needs
    `TRITON_INTERPRET=1` in the environment before the first import of triton.
    Raises ValueError for another name.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def implementation(op: str, device: torch.device) -> ModuleType:
    """The module that computes `op` on `device`: `mowe_kernels.<backend>.<op>`."""
    backend = _forced.get() or "reference"
    return importlib.import_module(f"mowe_kernels.{backend}.{op}")
