"""Which implementation computes an op: plain torch (`reference`) or the Triton kernels (`triton`)."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mowe_kernels import csrc, tables

BACKENDS = ("reference", "triton")
# Where several libraries can compute an op, a module of its own picks one.
_CHOOSERS = {"varlen_attention": "mowe_kernels.attention"}
# Ops without kernels of their own: they are right where those of their parts are.
MADE_OF = {
    "encoder_layer": ("grouped_layer_norm", "grouped_linear", "varlen_attention", "grouped_mlp"),
    "encoder_layer_nf4": ("grouped_layer_norm", "grouped_linear_nf4", "varlen_attention"),
}
_WITHOUT_TRITON = ("nf4_quantize", "nf4_dequantize_grouped")

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


def implementation(op: str, args: Sequence[Any] = ()) -> ModuleType:
    """The module that computes `op` on these arguments: `mowe_kernels.<backend>.<op>`.

    What `use_backend` says; without, the compiled libraries for what they compute, the Triton kernels for CUDA tensors
    on a device where they were found right (see `mowe_kernels.tables`), plain torch otherwise. What has no Triton
    kernel is plain torch where that backend is forced.
    """
    tensor = args[0] if args and isinstance(args[0], Tensor) else next(_tensors(args), None)
    where, dtype = (None, None) if tensor is None else (tensor.device, tensor.dtype)
    name = module_name(op, _forced, where, dtype in (torch.float64, torch.complex128))
    return sys.modules.get(name) or importlib.import_module(name)


@cache
def module_name(op: str, forced: str | None, device: torch.device | None, double: bool) -> str:
    """Of the module that computes `op` where a backend is forced or none is; double: in float64."""
    if forced is None and csrc.computes(op, device):
        backend = "csrc"
    elif op in _WITHOUT_TRITON:
        backend = "reference"
    elif forced is None and not double and _measured(op, device):
        return _CHOOSERS.get(op, f"mowe_kernels.triton.{op}")
    else:
        backend = forced or "reference"
    return f"mowe_kernels.{backend}.{op}"


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list):
            yield from _tensors(arg)


def _measured(op: str, device: torch.device | None) -> bool:
    """Whether the kernels of the op were found right on the device."""
    if device is None or device.type != "cuda":
        return False
    name, table = torch.cuda.get_device_name(device.index), tables.of_device(device.index)
    if table is None:
        _tell(f"runs in plain torch on {name}, where its kernels were not tried yet")
        return False
    missing = [part for part in MADE_OF.get(op, (op,)) if part not in table.ops]
    for part in missing:
        _tell(f"computes {part} in plain torch on {name}, where its kernels were not tried yet or not found right")
    return not missing and _has_triton()


@cache
def _tell(what: str) -> None:
    warnings.warn(f"mowe_kernels {what}: `python -m mowe_kernels.tune` tries them", stacklevel=2)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
