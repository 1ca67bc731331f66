"""Plain `encoder_layer_nf4`: what it is made of, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Parts = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]
"""`grouped_layer_norm`, `grouped_linear_nf4` and `varlen_attention`."""
Matrix = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[int]]
"""codes, absmax, nested_absmax, nested_offset, nested_code and sizes, as `grouped_linear_nf4` takes them."""


def forward(
    parts: Parts,
    x: Tensor,
    parameters: Sequence[Tensor],
    matrices: Sequence[Matrix],
    group_offsets: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: int,
    pre_norm: bool,
    eps: float,
    equal_lengths: bool,
) -> tuple[Tensor]:
    """parameters: weight and bias of the attention's norm, biases of qkv and of out, weight and bias of the other norm,
    biases of fc1 and of fc2. matrices: of qkv, out, fc1 and fc2.
    """
    norm, linear, attend = parts
    attention_norm, mlp_norm = parameters[:2], parameters[4:6]
    (qkv_bias, out_bias), (fc1_bias, fc2_bias) = parameters[2:4], parameters[6:]
    qkv, out, fc1, fc2 = matrices
    rows, d = x.shape

    h = norm(x, *attention_norm, group_offsets, eps, "") if pre_norm else x
    h = linear(h, *qkv, qkv_bias, group_offsets, None, "").view(rows, 3, heads, d // heads)
    h, _ = attend(h, cu_seqlens, max_seqlen, (d // heads) ** -0.5, False, equal_lengths)
    x = linear(h.view(rows, d), *out, out_bias, group_offsets, x, "")
    if not pre_norm:
        x = norm(x, *attention_norm, group_offsets, eps, "")
    h = norm(x, *mlp_norm, group_offsets, eps, "") if pre_norm else x
    h = linear(h, *fc1, fc1_bias, group_offsets, None, "gelu")
    x = linear(h, *fc2, fc2_bias, group_offsets, x, "")
    return (x if pre_norm else norm(x, *mlp_norm, group_offsets, eps, ""),)
