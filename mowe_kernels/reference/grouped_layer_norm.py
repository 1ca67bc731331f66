"""Plain torch `grouped_layer_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.dtypes import accumulation_dtype
from mowe_kernels.reference._linear import activate
from mowe_kernels.reference._rows import assemble, chunks, clear_tail, sums


def forward(x: Tensor, weight: Tensor, bias: Tensor, group_offsets: Tensor, eps: float, activation: str) -> Tensor:
    def norm(e: int, rows: slice) -> Tensor:
        return activate(torch.nn.functional.layer_norm(x[rows], x.shape[1:], weight[e], bias[e], eps), activation)

    return assemble(x.shape, x, ((rows, norm(e, rows)) for e, rows in chunks(group_offsets, len(x))))


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
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """residual: [R, D], added to the gradient of x."""
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_weight, grad_bias = sums(weight, need_parameters), sums(bias, need_parameters)
    for e, rows in chunks(group_offsets, len(x)):
        norm = WideNorm(x[rows], weight[e], bias[e], eps)
        g = grad[rows].to(norm.out.dtype)
        if activation == "gelu":
            g = torch.ops.aten.gelu_backward(g, norm.out)
        grad_rows, *grad_parameters = norm.backward(g, need_x, need_parameters)
        if need_x:
            grad_x[rows] = grad_rows if residual is None else grad_rows + residual[rows]
        if need_parameters:
            grad_weight[e] += grad_parameters[0]
            grad_bias[e] += grad_parameters[1]
    if need_x:
        clear_tail(grad_x, group_offsets)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


class WideNorm:
    """LayerNorm of rows [R, D] in the accumulation type, kept for its backward."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        dtype = accumulation_dtype(x.dtype)
        self._inputs = x.to(dtype), weight.to(dtype), bias.to(dtype)
        x, *parameters = self._inputs
        self.out, *self._statistics = torch.native_layer_norm(x, x.shape[1:], *parameters, eps)

    def backward(self, grad: Tensor, need_x: bool, need_parameters: bool) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias, None where not needed."""
        x, *parameters = self._inputs
        mask = (need_x, need_parameters, need_parameters)
        return torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[1:], *self._statistics, *parameters, mask)
