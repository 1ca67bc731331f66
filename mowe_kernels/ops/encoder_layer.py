"""A transformer layer of every encoder over its own rows: what the ops of its parts do, asked for at once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mowe_kernels.backend import implementation
from mowe_kernels.ops import grouped_layer_norm, grouped_linear, grouped_mlp, varlen_attention
from mowe_kernels.ops._op import check, check_shape, needs_grad, traced
from mowe_kernels.reference.encoder_layer import forward as composed


class LayerParameters(NamedTuple):
    """Of E layers of width D with F hidden values, each stacked along the first axis.

    Weights of the linear layers [E, N, K]: qkv [E, 3 D, D], out [E, D, D], fc1 [E, F, D], fc2 [E, D, F]; their biases
    [E, N]. The norms' weights and biases: [E, D].
    """

    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    mlp_norm_weight: Tensor
    mlp_norm_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


_PARTS = grouped_layer_norm.OP, grouped_linear.OP, varlen_attention.OP, grouped_mlp.OP
# Called straight, without each asking anew whether autograd or torch.compile wants to know: a layer of few rows is
# launched in less time than that takes.
_STRAIGHT = tuple(op.compute for op in _PARTS)


def encoder_layer(
    x: Tensor,
    parameters: LayerParameters,
    group_offsets: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    heads: int,
    pre_norm: bool = True,
    eps: float = 1e-5,
    equal_lengths: bool = False,
) -> Tensor:
    """x + attention(x), then x + fc2(gelu(fc1(x))), each sequence attending to itself alone.

    x: [R, D] packed rows. parameters: of the E layers. group_offsets: int32 [E+1]. cu_seqlens: int32 [S+1], first row
    of each sequence. max_seqlen: host upper bound of their lengths. heads: of the attention, of D / heads columns.
    pre_norm: LayerNorm before each half, of what goes into it, or after it, of the sum. eps: of the norms.
    equal_lengths: as for `varlen_attention`.
    Returns [R, D] in the type of x; rows past group_offsets[-1] are unspecified.
    Floor: 2 R (4 D^2 + 2 D F) FLOPs and those of `varlen_attention`.
    Raises ValueError for shapes or types that do not fit.
    """
    _check(x, parameters, group_offsets, cu_seqlens, heads)
    arguments = x, parameters, group_offsets, cu_seqlens, max_seqlen, heads, pre_norm, eps, equal_lengths
    differentiable = needs_grad(x, *parameters)
    if differentiable or traced(x, *parameters):
        return composed(_PARTS, differentiable, *arguments)
    return implementation("encoder_layer", arguments).forward(_STRAIGHT, False, *arguments)


def _check(x: Tensor, parameters: LayerParameters, group_offsets: Tensor, cu_seqlens: Tensor, heads: int) -> None:
    op, p = "encoder_layer", parameters
    check_shape(op, "x", x, (None, None), "packed rows [R, D]")
    d = x.shape[1]
    check(heads > 0 and d % heads == 0, op, f"{heads} heads do not divide {d} columns")
    check_shape(op, "fc1_weight", p.fc1_weight, (None, None, d), "stacked weights [E, F, D]")
    e, f, _ = p.fc1_weight.shape
    narrow = e, d
    attention = narrow, narrow, (e, 3 * d, d), (e, 3 * d), (e, d, d), narrow
    shapes = [*attention, narrow, narrow, (e, f, d), (e, f), (e, d, f), narrow]
    if [tensor.shape for tensor in p] != shapes or {tensor.dtype for tensor in p} != {x.dtype}:
        for name, tensor, shape in zip(p._fields, p, shapes, strict=True):
            check_shape(op, name, tensor, shape, "stacked parameters")
            check(tensor.dtype == x.dtype, op, f"{name} must be {x.dtype} as the rows are, got {tensor.dtype}")
    check_shape(op, "group_offsets", group_offsets, (e + 1,), "row offsets [E+1]")
    check_shape(op, "cu_seqlens", cu_seqlens, (None,), "row offsets [S+1]")
