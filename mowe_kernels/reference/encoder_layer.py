"""Plain `encoder_layer`: what it is made of, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Parts = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Callable[..., Any]]


def forward(
    parts: Parts,
    save_lse: bool,
    x: Tensor,
    parameters: Sequence[Tensor],
    group_offsets: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: int,
    pre_norm: bool,
    eps: float,
    equal_lengths: bool,
) -> Tensor:
    """parts: the ops `grouped_layer_norm`, `grouped_linear`, `varlen_attention` and `grouped_mlp`.

    parameters: weight and bias of the attention's norm, of qkv, of out, of the other norm, of fc1 and of fc2.
    """
    norm, linear, attend, mlp = parts
    attention_norm, qkv_layer, out_layer, mlp_norm = (parameters[i : i + 2] for i in range(0, 8, 2))
    rows, d = x.shape
    h = norm(x, *attention_norm, group_offsets, eps, "") if pre_norm else x
    qkv, _ = linear(h, *qkv_layer, group_offsets, None, None, "", False)
    qkv = qkv.view(rows, 3, heads, d // heads)
    attended, _ = attend(qkv, cu_seqlens, max_seqlen, (d // heads) ** -0.5, save_lse, equal_lengths)
    del h, qkv  # as large as four times the rows, and the feed-forward half needs as much again
    x, _ = linear(attended.view(rows, d), *out_layer, group_offsets, x, None, "", False)
    del attended
    feed_forward = *parameters[8:], group_offsets, eps
    if pre_norm:
        return mlp(x, *mlp_norm, *feed_forward)
    x = norm(x, *attention_norm, group_offsets, eps, "")
    return norm(mlp(x, None, None, *feed_forward), *mlp_norm, group_offsets, eps, "")
