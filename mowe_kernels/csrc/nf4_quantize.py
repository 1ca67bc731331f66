"""Compiled `nf4_quantize`."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return torch.ops.mowe.nf4_quantize.csrc(weight, blocksize)
