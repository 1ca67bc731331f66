"""Compiled `nf4_dequantize_grouped`."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.csrc import DTYPES
from mowe_kernels.reference import nf4_dequantize_grouped as reference


def forward(
    codes: list[Tensor],
    absmax: list[Tensor],
    nested_absmax: list[Tensor],
    nested_offset: list[Tensor],
    nested_code: list[Tensor],
    sizes: list[int],
    group_offsets: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    stacks = codes, absmax, nested_absmax, nested_offset, nested_code
    if dtype not in DTYPES:
        return reference.forward(*stacks, sizes, group_offsets, dtype)
    contiguous = ([tensor.contiguous() for tensor in stack] for stack in stacks)
    return torch.ops.mowe.nf4_dequantize_grouped.csrc(*contiguous, sizes, group_offsets.int().contiguous(), dtype)
