"""`varlen_attention` on a device that was measured: forward and backward by whoever is fastest there.

All keep the same for the backward pass, the natural logarithm of the sum of exponentials, so that one's backward goes
with another's forward. What a table names and this machine lacks, or cannot compute, our own kernel does; and what
that cannot, plain torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from mowe_kernels import tables

KERNEL = "kernel"
BACKENDS = {
    KERNEL: "mowe_kernels.triton.varlen_attention",
    "flash-attn": "mowe_kernels.attention.flash_attn",
    "torch": "mowe_kernels.attention.torch_varlen",
    "dense": "mowe_kernels.attention.dense",
}


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, save_lse: bool, equal_lengths: bool = False
) -> tuple[Tensor, Tensor]:
    qkv = qkv.contiguous()
    backend = choose("forward", qkv, max_seqlen, scale, equal_lengths)
    return backend.forward(qkv, _as_taken(cu_seqlens, backend), max_seqlen, scale, save_lse, equal_lengths)


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    equal_lengths: bool = False,
) -> Tensor:
    qkv = qkv.contiguous()
    backend = choose("backward", qkv, max_seqlen, scale, equal_lengths)
    lengths = _as_taken(cu_seqlens, backend)
    return backend.backward(grad, qkv, out, lse, lengths, max_seqlen, scale, equal_lengths)


def _as_taken(cu_seqlens: Tensor, backend: ModuleType) -> Tensor:
    """In int32, as FlashAttention wants them. Our own kernel takes them as they are: it may be launched again for other
    lengths, which a copy of these would not follow.
    """
    return cu_seqlens if backend.__name__ == BACKENDS[KERNEL] else cu_seqlens.to(torch.int32)


def choose(direction: str, qkv: Tensor, max_seqlen: int, scale: float, equal_lengths: bool) -> ModuleType:
    """Who computes the "forward" or the "backward" pass."""
    table = tables.of_device(qkv.device.index) if qkv.itemsize == 2 else None
    choice = table and table.attention_of(qkv.shape[-1], max_seqlen, equal_lengths)
    for name in (getattr(choice, direction, KERNEL), KERNEL):
        module = importlib.import_module(BACKENDS[name]) if name in BACKENDS else None
        if module and module.supports(qkv, max_seqlen, scale, equal_lengths):
            return module
    return importlib.import_module("mowe_kernels.reference.varlen_attention")
