"""Plain `encoder_layer`: what it is made of, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Part = Callable[..., Any]
Parts = tuple[Part, Part, Part, Part]
"""`grouped_layer_norm`, `grouped_linear`, `varlen_attention` and `grouped_mlp`, or the backward of each."""


def forward(
    parts: Parts,
    saves: bool,
    x: Tensor,
    parameters: Sequence[Tensor],
    group_offsets: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: int,
    pre_norm: bool,
    eps: float,
    equal_lengths: bool,
) -> tuple[Tensor, ...]:
    """The result and, where it `saves`, what `backward` wants of the way to it.

    parameters: weight and bias of the attention's norm, of qkv, of out, of the other norm, of fc1 and of fc2.
    """
    norm, linear, attend, mlp = parts
    attention_norm, qkv_layer, out_layer, mlp_norm = (parameters[i : i + 2] for i in range(0, 8, 2))
    feed_forward = *parameters[8:], group_offsets, eps
    rows, d = x.shape

    h = norm(x, *attention_norm, group_offsets, eps, "") if pre_norm else x
    qkv, _ = linear(h, *qkv_layer, group_offsets, None, None, "", False)
    qkv = qkv.view(rows, 3, heads, d // heads)
    attended, lse = attend(qkv, cu_seqlens, max_seqlen, (d // heads) ** -0.5, saves, equal_lengths)
    y, _ = linear(attended.view(rows, d), *out_layer, group_offsets, x, None, "", False)
    saved = (qkv, attended, lse, y, h) if saves else ()
    del h, qkv, attended  # as large as five times the rows, and the feed-forward half needs as much again
    if pre_norm:
        return mlp(y, *mlp_norm, *feed_forward), *saved
    h = norm(y, *attention_norm, group_offsets, eps, "")
    z = mlp(h, None, None, *feed_forward)
    return norm(z, *mlp_norm, group_offsets, eps, ""), *(saved and (*saved[:4], h, z))


def backward(
    parts: Parts,
    needs: Sequence[bool],
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    group_offsets: Tensor,
    cu_seqlens: Tensor,
    saved: Sequence[Tensor],
    max_seqlen: int,
    heads: int,
    pre_norm: bool,
    eps: float,
    equal_lengths: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x and of every parameter; one that `needs` does not name is of no use, empty or not."""
    norm, linear, attend, mlp = parts
    attention_norm, (qkv_weight, _), (out_weight, _), mlp_norm = (parameters[i : i + 2] for i in range(0, 8, 2))
    feed_forward = *parameters[8:], group_offsets, eps
    need_x, *need = needs
    rows, d = x.shape
    qkv, attended, lse, y, h, *z = saved

    def through_norm(
        grad: Tensor, x: Tensor, layer: Sequence[Tensor], needed: Sequence[bool], needed_x: bool = True,
        residual: Tensor | None = None,
    ) -> Any:  # fmt: skip
        return norm(grad, x, *layer, group_offsets, eps, "", needed_x, any(needed), residual)

    def through_linear(
        grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool], needed_x: bool = True,
        residual: Tensor | None = None,
    ) -> Any:  # fmt: skip
        nothing = grad.new_empty(0)
        return linear(grad, x, weight, group_offsets, None, nothing, "", needed_x, *needed, False, residual)[:3]

    attention_learns = need_x or any(need[:6])
    if pre_norm:
        grad, *of_mlp = mlp(grad, y, *mlp_norm, *feed_forward, attention_learns, any(need[6:]))
    else:
        grad, *of_mlp_norm = through_norm(grad, z[0], mlp_norm, need[6:8])
        # Its own norm's gradients, which it returns first, are not there.
        grad, _, _, *of_feed_forward = mlp(grad, h, None, None, *feed_forward, attention_learns, any(need[8:]))
        of_mlp = *of_mlp_norm, *of_feed_forward
    if not attention_learns:
        return *[grad.new_empty(0)] * 7, *of_mlp
    if not pre_norm:
        grad, *of_norm = through_norm(grad, y, attention_norm, need[:2])
    of_attended, *of_out = through_linear(grad, attended.view(rows, d), out_weight, need[4:6])
    of_attended, scale = of_attended.view(rows, heads, d // heads), (d // heads) ** -0.5
    of_qkv = attend(of_attended, qkv, attended, lse, cu_seqlens, max_seqlen, scale, equal_lengths).view(rows, 3 * d)
    if pre_norm:
        of_h, *of_qkv_layer = through_linear(of_qkv, h, qkv_weight, need[2:4])
        grad, *of_norm = through_norm(of_h, x, attention_norm, need[:2], need_x, grad)
    else:
        grad, *of_qkv_layer = through_linear(of_qkv, x, qkv_weight, need[2:4], need_x, grad)
    return grad, *of_norm, *of_qkv_layer, *of_out, *of_mlp
