"""Compiled `nf4_quantize`."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.csrc import available
from mowe_kernels.reference import nf4_quantize as reference


def forward(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    if not available(weight.device.type):
        return reference.forward(weight, blocksize)
    return torch.ops.mowe.nf4_quantize.csrc(weight, blocksize)
