"""Compiled `pack_plan`."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    indices: Tensor, lengths: Tensor, rank: Tensor, level_bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = (tensor.contiguous() for tensor in (indices.long(), lengths, rank, level_bounds))
    return torch.ops.mowe.pack_plan.csrc(*layout)
