"""`mowe::grouped_layer_norm`: LayerNorm with each encoder's own weight and bias."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mowe_kernels.ops._op import DifferentiableOp, Op, check, check_dtype, check_offsets, check_shape, empty, optional
from mowe_kernels.ops.grouped_linear import ACTIVATIONS


def _fake(x, weight, bias, group_offsets, eps, activation):
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, group_offsets, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias, group_offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    need_x, *need_parameters = ctx.needs_input_grad[:3]
    grads = BACKWARD(grad, *ctx.saved_tensors, ctx.eps, ctx.activation, need_x, any(need_parameters), None)
    return *map(optional, grads), None, None, None


def _fake_backward(grad, x, weight, bias, group_offsets, eps, activation, need_x, need_parameters, residual):
    return (
        x.new_empty(x.shape) if need_x else empty(x),
        *(p.new_empty(p.shape) if need_parameters else empty(p) for p in (weight, bias)),
    )


BACKWARD = Op(
    "grouped_layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor group_offsets, float eps, str activation, bool need_x,"
    " bool need_parameters, Tensor? residual) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    module="grouped_layer_norm",
    function="backward",
)
OP = DifferentiableOp(
    "grouped_layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor group_offsets, float eps, str activation) -> Tensor",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def grouped_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, group_offsets: Tensor, *, eps: float = 1e-5, activation: str = ""
) -> Tensor:
    """act(LayerNorm(x) * weight[e] + bias[e]) over the last dimension, e being the encoder of the row's group.

    x: [R, D] packed rows. weight, bias: [E, D]. group_offsets: int32 [E+1] from 0 on. activation: "" or "gelu"
    (erf).
    Returns [R, D] in the type of x, statistics in float32; rows past group_offsets[-1] are unspecified. The residual
    sum before a norm belongs to the epilogue of `grouped_linear`.
    Floor: 2 R D elements moved. Raises ValueError for shapes or types that do not fit or an unknown activation.
    """
    check_shape("grouped_layer_norm", "x", x, (None, None), "packed rows [R, D]")
    check_shape("grouped_layer_norm", "weight", weight, (None, x.shape[1]), "stacked weights [E, D]")
    check_shape("grouped_layer_norm", "bias", bias, tuple(weight.shape), "stacked biases [E, D]")
    check_offsets("grouped_layer_norm", "group_offsets", group_offsets, weight.shape[0] + 1, "[E+1]")
    check(
        activation in ACTIVATIONS, "grouped_layer_norm", f"activation must be one of {ACTIVATIONS}, got {activation!r}"
    )
    check_dtype("grouped_layer_norm", x, weight=weight, bias=bias)
    return OP(x, weight, bias, group_offsets, eps, activation)
