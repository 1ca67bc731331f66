"""Plain torch `sequence_mean`."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.dtypes import accumulation_dtype


def forward(x: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    out = x.new_zeros(starts.numel(), x.shape[1], dtype=accumulation_dtype(x.dtype))
    for s, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if length:
            torch.mean(x[start : start + length], 0, dtype=out.dtype, out=out[s])
    return out


def backward(grad: Tensor, x: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    grad_x = x.new_zeros(x.shape)
    for s, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if length:
            grad_x[start : start + length] = grad[s] / length
    return grad_x
