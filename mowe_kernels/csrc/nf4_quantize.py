"""Compiled `nf4_quantize`, for float32 and bfloat16 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.csrc import DTYPES
from mowe_kernels.reference import nf4_quantize as reference


def forward(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return reference.forward(weight, blocksize)
    return torch.ops.mowe.nf4_quantize.csrc(weight, blocksize)
