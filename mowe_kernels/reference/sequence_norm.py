"""Plain torch `sequence_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.reference._rows import clear_tail, groups, sums
from mowe_kernels.reference.grouped_layer_norm import normalise, through_norm
from mowe_kernels.reference.grouped_linear import activate_into


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, encoder: Tensor, cu_seqlens: Tensor, eps: float, activation: str
) -> Tensor:
    out = x.new_empty(x.shape)
    encoders = encoder.tolist()
    for p, seq in groups(cu_seqlens):
        normed, _ = normalise(x[seq], eps, dim=0)
        y = torch.addcmul(bias[encoders[p]], normed, weight[encoders[p]]).to(x.dtype)
        activate_into(out[seq], y, activation)
    return clear_tail(out, cu_seqlens)


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
    for p, seq in groups(cu_seqlens):
        e, g = encoders[p], grad[seq]
        normed, rstd = normalise(x[seq], eps, dim=0)
        if activation == "gelu":
            g = torch.ops.aten.gelu_backward(g, (normed * weight[e] + bias[e]).to(g.dtype))
        if need_x:
            grad_x[seq] = through_norm(g * weight[e], normed, rstd, dim=0)
        if need_parameters:
            grad_weight[e] += (g * normed).sum(0)
            grad_bias[e] += g.sum(0, dtype=grad_bias.dtype)
    if need_x:
        clear_tail(grad_x, cu_seqlens)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
