"""Plain torch `sequence_norm`: statistics of each sequence, then its frames a slice at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mowe_kernels.dtypes import accumulation_dtype
from mowe_kernels.reference._linear import activate
from mowe_kernels.reference._rows import assemble, blocks, clear_tail, groups, sums


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, encoder: Tensor, cu_seqlens: Tensor, eps: float, activation: str
) -> Tensor:
    encoders = encoder.tolist()

    def pieces() -> Iterator[tuple[slice, Tensor]]:
        for p, seq in groups(cu_seqlens, len(x)):
            mean, rstd = _statistics(x, seq, eps)
            scale = weight[encoders[p]] * rstd
            shift = bias[encoders[p]] - mean * scale
            for rows in blocks(seq):
                yield rows, activate(torch.addcmul(shift, x[rows], scale).to(x.dtype), activation)

    return assemble(x.shape, x, pieces())


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    encoder: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    activation: str,
    need_x: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_weight, grad_bias = sums(weight, need_parameters), sums(bias, need_parameters)
    encoders = encoder.tolist()

    def parts(seq: slice, w: Tensor, b: Tensor, mean: Tensor, rstd: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their normalised values, the gradient of weight * those + bias)"""
        for rows in blocks(seq):
            normed = torch.addcmul(-mean * rstd, x[rows], rstd)
            g = grad[rows].to(normed.dtype)
            yield rows, normed, torch.ops.aten.gelu_backward(g, b.addcmul(normed, w)) if activation == "gelu" else g

    for p, seq in groups(cu_seqlens, len(x)):
        mean, rstd = _statistics(x, seq, eps)
        w, b = (parameter[encoders[p]].to(mean.dtype) for parameter in (weight, bias))
        along, total = torch.zeros_like(mean), torch.zeros_like(mean)
        for _, normed, g in parts(seq, w, b, mean, rstd):
            along += (g * normed).sum(0)
            total += g.sum(0)
        if need_parameters:
            grad_weight[encoders[p]] += along
            grad_bias[encoders[p]] += total
        if need_x:
            scale = w * rstd
            of_mean, of_variance = (-scale * part / (seq.stop - seq.start) for part in (total, along))
            for rows, normed, g in parts(seq, w, b, mean, rstd):
                grad_x[rows] = of_mean.addcmul(normed, of_variance).addcmul_(g, scale)
    if need_x:
        clear_tail(grad_x, cu_seqlens)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _statistics(x: Tensor, seq: slice, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / std of each channel over the frames of a sequence, in the accumulation type."""
    frames = seq.stop - seq.start
    mean = x[seq].sum(0, dtype=accumulation_dtype(x.dtype)) / frames
    squares = torch.zeros_like(mean)
    for rows in blocks(seq):
        squares += (x[rows] - mean).square_().sum(0)
    return mean, (squares / frames + eps).rsqrt()
