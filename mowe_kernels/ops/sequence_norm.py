"""`mowe::sequence_norm`: group norm with one channel a group, over each packed sequence's own frames."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mowe_kernels.ops._op import DifferentiableOp, Op, check, check_dtype, check_offsets, check_shape, empty, optional
from mowe_kernels.ops.grouped_linear import ACTIVATIONS


def _fake(x, weight, bias, encoder, cu_seqlens, eps, activation):
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    need_x, *need_parameters = ctx.needs_input_grad[:3]
    grads = _backward_op(grad, *ctx.saved_tensors, ctx.eps, ctx.activation, need_x, any(need_parameters))
    return *map(optional, grads), None, None, None, None


def _fake_backward(grad, x, weight, bias, encoder, cu_seqlens, eps, activation, need_x, need_parameters):
    return (
        x.new_empty(x.shape) if need_x else empty(x),
        *(p.new_empty(p.shape) if need_parameters else empty(p) for p in (weight, bias)),
    )


_backward_op = Op(
    "sequence_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor encoder, Tensor cu_seqlens, float eps, str activation,"
    " bool need_x, bool need_parameters) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    module="sequence_norm",
    function="backward",
)
_op = DifferentiableOp(
    "sequence_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor encoder, Tensor cu_seqlens, float eps, str activation) -> Tensor",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def sequence_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    encoder: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-5,
    activation: str = "",
) -> Tensor:
    """act((x - mean) / std * weight[e] + bias[e]), mean and std of each channel over the frames of its sequence.

    x: [R, N] packed rows. weight, bias: [E, N]. encoder: int32 [P]. cu_seqlens: int32 [P+1] from 0 on. activation: ""
    or "gelu".
    Returns [R, N]; rows past cu_seqlens[-1] are unspecified. It is `nn.GroupNorm(N, N)` of HuBERT's and wav2vec 2.0's
    first convolution, which padding would change. Floor: 3 R N elements moved (two reads, one write).
    Raises ValueError for shapes or types that do not fit.
    """
    check_shape("sequence_norm", "x", x, (None, None), "packed rows [R, N]")
    check_shape("sequence_norm", "weight", weight, (None, x.shape[1]), "stacked weights [E, N]")
    check_shape("sequence_norm", "bias", bias, tuple(weight.shape), "stacked biases [E, N]")
    check_shape("sequence_norm", "encoder", encoder, (None,), "encoder of each sequence [P]")
    check_offsets("sequence_norm", "cu_seqlens", cu_seqlens, encoder.shape[0] + 1, "[P+1]")
    check(activation in ACTIVATIONS, "sequence_norm", f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    check_dtype("sequence_norm", x, weight=weight, bias=bias)
    return _op(x, weight, bias, encoder, cu_seqlens, eps, activation)
