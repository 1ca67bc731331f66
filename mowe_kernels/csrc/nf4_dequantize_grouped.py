"""Compiled `nf4_dequantize_grouped`, to float32 and bfloat16 on the CPU."""

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
    if group_offsets.device.type != "cpu" or dtype not in DTYPES:
        return reference.forward(*stacks, sizes, group_offsets, dtype)
    offsets = group_offsets.contiguous()
    out = []
    for stack, rows, columns, blocksize in zip(
        zip(*stacks, strict=True), sizes[::3], sizes[1::3], sizes[2::3], strict=True
    ):
        out.append(stack[0].new_empty((stack[0].shape[0], rows, columns), dtype=dtype))
        contiguous = [tensor.contiguous() for tensor in stack]
        torch.ops.mowe.nf4_dequantize_grouped.csrc(*contiguous, blocksize, offsets, out[-1])
    return out
