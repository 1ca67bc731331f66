"""Triton `encoder_layer`: the kernels of its parts. What one layer launched, the next ones launch again.

A batch has lengths of its own, so its first layer goes through the ops; from then on the host only picks addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mowe_kernels import attention
from mowe_kernels.reference.encoder_layer import Parts
from mowe_kernels.reference.encoder_layer import forward as composed
from mowe_kernels.triton._launch import forget_by, hooked
from mowe_kernels.triton._repeat import Repeat, noted
from mowe_kernels.triton.varlen_attention import MOST_COLUMNS

MOST_KEPT = 256
_NEW: Any = object()
_kept: dict[tuple, Repeat | None] = {}  # None: to be computed part by part
forget_by(_kept.clear)


def forward(
    parts: Parts,
    save_lse: bool,
    x: Tensor,
    parameters: Sequence[Tensor],
    group_offsets: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: int,
    pre_norm: bool,
    eps: float,
    equal_lengths: bool,
) -> Tensor:
    """As the reference, and no gradient is asked for."""
    how = max_seqlen, heads, pre_norm, eps, equal_lengths
    compute = partial(composed, parts, save_lse, x, parameters, group_offsets, cu_seqlens, *how)
    inputs = x, *parameters, group_offsets, cu_seqlens
    if not _repeatable(inputs):
        return compute()
    device = x.get_device()
    addresses = [tensor.data_ptr() for tensor in inputs]
    sizes = x.shape, parameters[8].shape, cu_seqlens.shape
    types = x.dtype, group_offsets.dtype, cu_seqlens.dtype
    key = device, *how, *sizes, *types, *[address % 16 == 0 for address in addresses]
    repeat = _kept.get(key, _NEW)
    if repeat is None:
        return compute()
    if repeat is not _NEW:
        return repeat(device, addresses, x)
    if len(_kept) >= MOST_KEPT:
        _kept.clear()
    head_dim = x.shape[1] // heads
    attends = attention.fastest("forward", x, head_dim, max_seqlen, equal_lengths) == attention.KERNEL
    if not attends or head_dim > MOST_COLUMNS:  # others than our kernels are at work
        _kept[key] = None
        return compute()
    out, _kept[key] = noted(inputs, compute)
    return out


def _repeatable(inputs: Sequence[Tensor]) -> bool:
    """Whether all lie on the current GPU, rows one after the other, so that nothing is copied before it is read, and
    nobody wants to hear of every launch.
    """
    device = inputs[0].get_device()
    return (
        device >= 0
        and {tensor.get_device() for tensor in inputs} == {device}
        and device == torch.cuda.current_device()
        and all([tensor.is_contiguous() for tensor in inputs])
        and not hooked()
    )
