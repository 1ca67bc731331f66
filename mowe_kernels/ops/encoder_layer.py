"""A transformer layer of every encoder over its own rows: what the ops of its parts do, asked for at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mowe_kernels.backend import implementation
from mowe_kernels.ops import grouped_layer_norm, grouped_linear, grouped_mlp, varlen_attention
from mowe_kernels.ops._op import check, check_dtype, check_offsets, check_shape, launched_again, needs_grad, traced
from mowe_kernels.reference import encoder_layer as reference


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


_PARTS = grouped_layer_norm, grouped_linear, varlen_attention, grouped_mlp
_OPS, _BACKWARD_OPS = tuple(part.OP for part in _PARTS), tuple(part.BACKWARD for part in _PARTS)
# Called straight, without each asking anew whether autograd or torch.compile wants to know: a layer of few rows is
# launched in less time than that takes.
FORWARD, BACKWARD = (tuple(op.compute for op in ops) for ops in (_OPS, _BACKWARD_OPS))


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
    key_bias: bool = True,
    equal_lengths: bool = False,
) -> Tensor:
    """x + attention(x), then x + fc2(gelu(fc1(x))), each sequence attending to itself alone.

    x: [R, D] packed rows. parameters: of the E layers. group_offsets: int32 [E+1] from 0 on. cu_seqlens: int32 [S+1]
    from 0 on, first row of each sequence. max_seqlen: host upper bound of their lengths. heads: of the attention, of
    D / heads columns.
    pre_norm: LayerNorm before each half, of what goes into it, or after it, of the sum. eps: of the norms.
    key_bias: False where the part of `qkv_bias` that is the keys' gets a gradient of zero. equal_lengths: as for
    `varlen_attention`.
    Returns [R, D] in the type of x; rows past group_offsets[-1] are unspecified.
    Floor: 2 R (4 D^2 + 2 D F) FLOPs and those of `varlen_attention`.
    Raises ValueError for shapes or types that do not fit.
    """
    how = max_seqlen, heads, pre_norm, eps, equal_lengths
    if traced(x, *parameters):
        _check(x, parameters, group_offsets, cu_seqlens, heads)
        if not key_bias:
            query, key, value = parameters.qkv_bias.chunk(3, dim=1)
            parameters = parameters._replace(qkv_bias=torch.cat((query, key.detach(), value), dim=1))
        saves = needs_grad(x, *parameters)
        return reference.forward(_OPS, saves, x, parameters, group_offsets, cu_seqlens, *how)[0]
    if needs_grad(x, *parameters):
        return _Layer.apply(key_bias, how, x, group_offsets, cu_seqlens, *parameters)
    return _forward(False, x, parameters, group_offsets, cu_seqlens, how)[0]


def _forward(
    saves: bool, x: Tensor, parameters: Sequence[Tensor], group_offsets: Tensor, cu_seqlens: Tensor, how: tuple
) -> Sequence[Tensor]:
    if results := launched_again("encoder_layer", x, saves, (parameters,), group_offsets, cu_seqlens, *how):
        return results
    _check(x, LayerParameters(*parameters), group_offsets, cu_seqlens, how[1])
    module = implementation("encoder_layer", (x,))
    return module.forward(FORWARD, saves, x, parameters, group_offsets, cu_seqlens, *how)


def again(
    x: Tensor, layers: Sequence[Sequence[Tensor]], group_offsets: Tensor, cu_seqlens: Tensor, how: tuple
) -> Sequence[Tensor]:
    """What one layer after the other gives where their launches are known and nobody wants a gradient; else nothing."""
    tensors = [x, *chain.from_iterable(layers)]
    if traced(*tensors) or needs_grad(*tensors):
        return ()
    return launched_again("encoder_layer", x, False, layers, group_offsets, cu_seqlens, *how)


class _Layer(torch.autograd.Function):
    """The whole layer as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        key_bias: bool,
        how: tuple,
        x: Tensor,
        group_offsets: Tensor,
        cu_seqlens: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        out, *saved = _forward(True, x, parameters, group_offsets, cu_seqlens, how)
        ctx.key_bias, ctx.how = key_bias, how
        ctx.save_for_backward(x, group_offsets, cu_seqlens, *parameters, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, group_offsets, cu_seqlens, *tensors = ctx.saved_tensors
        count = len(LayerParameters._fields)
        parameters, saved = tensors[:count], tensors[count:]
        needs = ctx.needs_input_grad[2], *ctx.needs_input_grad[5:]
        about = needs, grad, x, parameters, group_offsets, cu_seqlens, saved, *ctx.how
        # Where compiled autograd looks in, the ops are nodes of its graph; a second derivative they refuse.
        if traced(grad, x, *parameters) or needs_grad(grad, x, *parameters):
            grads = reference.backward(_BACKWARD_OPS, *about)
        else:
            grads = implementation("encoder_layer", (x,)).backward(BACKWARD, *about)
        of_x, *of_parameters = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        of_qkv_bias = of_parameters[LayerParameters._fields.index("qkv_bias")]
        if of_qkv_bias is not None and not ctx.key_bias:
            of_qkv_bias.unflatten(1, (3, -1))[:, 1].zero_()
        return None, None, of_x, None, None, *of_parameters


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
    kinds = {(tensor.dtype, tensor.device) for tensor in p}
    if [tensor.shape for tensor in p] != shapes or kinds != {(x.dtype, x.device)}:
        for name, tensor, shape in zip(p._fields, p, shapes, strict=True):
            check_shape(op, name, tensor, shape, "stacked parameters")
        check_dtype(op, x, **p._asdict())
    check_offsets(op, "group_offsets", group_offsets, e + 1, "[E+1]")
    check_offsets(op, "cu_seqlens", cu_seqlens, None, "[S+1]")
