"""Plain torch `grouped_linear`: one slice of rows a GEMM, the epilogue while the slice is in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.reference._linear import activate, linear, scale_and_add
from mowe_kernels.reference._rows import add_product, assemble, at, chunks, clear_tail, sums


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group_offsets: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    activation: str,
    save_pre: bool,
) -> tuple[Tensor, Tensor]:
    def layer(activation: str, row_scale: Tensor | None, residual: Tensor | None) -> Tensor:
        pieces = (
            (rows, linear(x[rows], weight[e], at(bias, e), activation, at(row_scale, rows), at(residual, rows)))
            for e, rows in chunks(group_offsets, len(x))
        )
        return assemble((x.shape[0], weight.shape[1]), x, pieces)

    if not save_pre:
        return layer(activation, row_scale, residual), x.new_empty(0)
    pre = layer("", None, None)
    return clear_tail(scale_and_add(activate(pre, activation), row_scale, residual), group_offsets), pre


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    group_offsets: Tensor,
    row_scale: Tensor | None,
    pre: Tensor,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_scale: bool,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """residual: [R, K], added to the gradient of x."""
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_weight = sums(weight, need_weight)
    grad_bias = sums(weight[..., 0], need_bias)
    grad_scale = row_scale.new_empty(row_scale.shape) if need_scale else x.new_empty(0)
    for e, rows in chunks(group_offsets, len(x)):
        g = grad[rows]
        if need_scale:
            grad_scale[rows] = (g * activate(pre[rows], activation)).sum(-1)
        if row_scale is not None:
            g = (g * row_scale[rows, None]).to(g.dtype)
        if activation == "gelu":
            g = torch.ops.aten.gelu_backward(g, pre[rows])
        if need_x:
            linear_into(grad_x[rows], g, weight[e].T, at(residual, rows))
        if need_weight:
            add_product(grad_weight[e], g.T, x[rows])
        if need_bias:
            grad_bias[e] += g.sum(0, dtype=grad_bias.dtype)
    for rows_grad, needed in ((grad_x, need_x), (grad_scale, need_scale)):
        if needed:
            clear_tail(rows_grad, group_offsets)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), grad_scale


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out = x @ weight.T + bias, a bias of every column or of every value."""
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)
