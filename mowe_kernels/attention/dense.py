"""`varlen_attention` where every sequence that has rows has as many: torch's attention over a batch, nothing packed.

The rows of absent sequences, which lie at the end, pass for further sequences; nobody reads what comes of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.attention import torch_varlen


def supports(qkv: Tensor, max_seqlen: int, scale: float, equal_lengths: bool) -> bool:
    rows = qkv.shape[0]
    fits = qkv.device.type == "cpu" or torch_varlen.supports(qkv, max_seqlen, scale, equal_lengths)
    return fits and equal_lengths and rows > 0 and max_seqlen > 0 and rows % max_seqlen == 0


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, save_lse: bool, equal_lengths: bool = False
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.view(-1, max_seqlen, *qkv.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)  # [S, H, T, Dh] each
    lse = qkv.new_empty(0)
    if not save_lse:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    elif qkv.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    if save_lse:
        lse = lse.transpose(0, 1).reshape(qkv.shape[2], -1)
    return out.transpose(1, 2).reshape(qkv.shape[0], *qkv.shape[2:]), lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    equal_lengths: bool = False,
) -> Tensor:
    if qkv.device.type != "cpu":  # the same kernel, with or without packing
        return torch_varlen.backward(grad, qkv, out, lse, cu_seqlens, max_seqlen, scale)
    q, k, v = qkv.view(-1, max_seqlen, *qkv.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)
    grad, out = (x.view(-1, max_seqlen, *x.shape[1:]).transpose(1, 2) for x in (grad, out))
    lse = lse.view(lse.shape[0], -1, max_seqlen).transpose(0, 1)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, scale=scale
    )
    return torch.stack(grads).permute(1, 3, 0, 2, 4).reshape(qkv.shape)
