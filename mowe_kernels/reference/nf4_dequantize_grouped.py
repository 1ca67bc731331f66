"""Plain torch `nf4_dequantize_grouped`."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.reference._rows import groups
from mowe_kernels.reference.nf4_nested import dequantize_absmax
from mowe_kernels.reference.nf4_quantize import NF4_CODE


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
    in_use = [e for e, _ in groups(group_offsets)]
    code = NF4_CODE.to(group_offsets.device)
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)  # the two values of every byte
    out = []
    for m, stack in enumerate(codes):
        rows, columns, blocksize = sizes[3 * m : 3 * m + 3]
        count = rows * columns
        weight = stack.new_empty((stack.shape[0], rows, columns), dtype=dtype)
        for e in in_use:
            scale = absmax[m][e]
            if nested_absmax[m].numel():
                scale = dequantize_absmax(scale, nested_absmax[m][e], nested_offset[m][e], nested_code[m][e])
            values = pairs[stack[e].int()].flatten()[:count]
            weight[e] = (values * scale.repeat_interleave(blocksize)[:count]).view(rows, columns)
        out.append(weight)
    return out
