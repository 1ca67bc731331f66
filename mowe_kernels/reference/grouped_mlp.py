"""Plain torch `grouped_mlp`: a slice of rows passes through the whole block while it is in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.reference._linear import linear
from mowe_kernels.reference._rows import add_product, assemble, chunks, clear_tail, sums
from mowe_kernels.reference.grouped_layer_norm import WideNorm


def forward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    group_offsets: Tensor,
    eps: float,
) -> Tensor:
    def block(e: int, rows: slice) -> Tensor:
        h = x[rows]
        if norm_weight is not None:
            h = torch.nn.functional.layer_norm(h, h.shape[1:], norm_weight[e], norm_bias[e], eps)
        h = linear(h, fc1_weight[e], fc1_bias[e], "gelu")
        return linear(h, fc2_weight[e], fc2_bias[e], residual=x[rows])

    return assemble(x.shape, x, ((rows, block(e, rows)) for e, rows in chunks(group_offsets, len(x))))


def backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    group_offsets: Tensor,
    eps: float,
    need_x: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    grad_x = x.new_empty(x.shape if need_x else 0)
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    grads = [x.new_empty(0) if p is None else sums(p, need_parameters) for p in parameters]
    grad_norm_weight, grad_norm_bias, grad_fc1_weight, grad_fc1_bias, grad_fc2_weight, grad_fc2_bias = grads
    for e, rows in chunks(group_offsets, len(x)):
        g = grad[rows]
        if norm_weight is None:
            h = x[rows]
        else:
            norm = WideNorm(x[rows], norm_weight[e], norm_bias[e], eps)
            h = norm.out.to(x.dtype)
        pre = torch.addmm(fc1_bias[e], h, fc1_weight[e].T)
        grad_pre = torch.ops.aten.gelu_backward(g @ fc2_weight[e], pre)
        if need_parameters:
            add_product(grad_fc2_weight[e], g.T, torch.nn.functional.gelu(pre))
            grad_fc2_bias[e] += g.sum(0, dtype=grad_fc2_bias.dtype)
            add_product(grad_fc1_weight[e], grad_pre.T, h)
            grad_fc1_bias[e] += grad_pre.sum(0, dtype=grad_fc1_bias.dtype)
        if norm_weight is None and not need_x:
            continue
        grad_h = grad_pre @ fc1_weight[e]
        if norm_weight is not None:
            grad_h, *grad_norm = norm.backward(grad_h.to(norm.out.dtype), need_x, need_parameters)
            if need_parameters:
                grad_norm_weight[e] += grad_norm[0]
                grad_norm_bias[e] += grad_norm[1]
        if need_x:
            grad_x[rows] = grad_h + g
    if need_x:
        clear_tail(grad_x, group_offsets)
    return grad_x, *(g if p is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True))
