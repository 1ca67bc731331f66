"""Plain torch `grouped_layer_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.dtypes import accumulation_dtype
from mowe_kernels.reference._rows import chunks, clear_tail, sums
from mowe_kernels.reference.grouped_linear import activate_into


def forward(x: Tensor, weight: Tensor, bias: Tensor, group_offsets: Tensor, eps: float, activation: str) -> Tensor:
    out = x.new_empty(x.shape)
    for e, rows in chunks(group_offsets):
        normed = torch.nn.functional.layer_norm(x[rows], x.shape[1:], weight[e], bias[e], eps)
        activate_into(out[rows], normed, activation)
    return clear_tail(out, group_offsets)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    group_offsets: Tensor,
    eps: float,
    activation: str,
    need_x: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_weight, grad_bias = sums(weight, need_parameters), sums(bias, need_parameters)
    for e, rows in chunks(group_offsets):
        g, normed, rstd = grad[rows], *normalise(x[rows], eps)
        if activation == "gelu":
            g = torch.ops.aten.gelu_backward(g, (normed * weight[e] + bias[e]).to(g.dtype))
        if need_x:
            grad_x[rows] = through_norm(g * weight[e], normed, rstd)
        if need_parameters:
            grad_weight[e] += (g * normed).sum(0)
            grad_bias[e] += g.sum(0, dtype=grad_bias.dtype)
    if need_x:
        clear_tail(grad_x, group_offsets)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def normalise(x: Tensor, eps: float, dim: int = -1) -> tuple[Tensor, Tensor]:
    """(x - mean) / std along a dimension and 1 / std, in the accumulation type."""
    x = x.to(accumulation_dtype(x.dtype))
    variance, mean = torch.var_mean(x, dim, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    return (x - mean) * rstd, rstd


def through_norm(grad: Tensor, normed: Tensor, rstd: Tensor, dim: int = -1) -> Tensor:
    """Gradient of the input of `normalise` from the gradient of its result."""
    along = (grad * normed).mean(dim, keepdim=True)
    return (grad - grad.mean(dim, keepdim=True) - normed * along) * rstd
