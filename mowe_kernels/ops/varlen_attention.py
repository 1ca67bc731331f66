"""`mowe::varlen_attention`: bidirectional self-attention within each packed sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mowe_kernels.dtypes import accumulation_dtype
from mowe_kernels.ops._op import DifferentiableOp, Op, check_offsets, check_shape, empty, needs_grad


def _fake(qkv, cu_seqlens, max_seqlen, scale, save_lse, equal_lengths=False):
    rows, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty(heads, rows, dtype=accumulation_dtype(qkv.dtype)) if save_lse else empty(qkv)
    return qkv.new_empty(rows, heads, head_dim), lse


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, _, ctx.equal_lengths = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else that output gets a gradient of zeros, written for nobody


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    if grad is None:
        return (None,) * 6
    settings = ctx.max_seqlen, ctx.scale, ctx.equal_lengths
    return BACKWARD(grad.contiguous(), *ctx.saved_tensors, *settings), None, None, None, None, None


def _fake_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen, scale, equal_lengths=False):
    return qkv.new_empty(qkv.shape)


BACKWARD = Op(
    "varlen_attention_backward",
    "(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, float scale,"
    " bool equal_lengths=False) -> Tensor",
    _fake_backward,
    module="varlen_attention",
    function="backward",
)
OP = DifferentiableOp(
    "varlen_attention",
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale, bool save_lse,"
    " bool equal_lengths=False) -> (Tensor, Tensor)",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def varlen_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None = None, equal_lengths: bool = False
) -> Tensor:
    """softmax(scale * q @ k.T) @ v within each sequence and head, every row seeing every row of its sequence.

    qkv: [R, 3, H, Dh], queries, keys and values of the packed rows. cu_seqlens: int32 [S+1] from 0 on, first row of
    each sequence (lengths may be zero). max_seqlen: host upper bound of the lengths. scale: 1 / sqrt(Dh) by default.
    equal_lengths: a promise that every sequence has max_seqlen rows or none.
    Returns [R, H, Dh] in the type of qkv, softmax in float32; rows past cu_seqlens[-1] are unspecified.
    Floor: 4 H Dh sum(T^2) FLOPs over the sequence lengths T; 4 R H Dh elements moved.
    Raises ValueError for shapes that do not fit.
    """
    check_shape("varlen_attention", "qkv", qkv, (None, 3, None, None), "queries, keys and values [R, 3, H, Dh]")
    check_offsets("varlen_attention", "cu_seqlens", cu_seqlens, None, "[S+1]")
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return OP(qkv, cu_seqlens, max_seqlen, scale, needs_grad(qkv), equal_lengths)[0]
