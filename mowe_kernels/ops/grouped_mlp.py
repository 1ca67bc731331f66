"""`mowe::grouped_mlp`: the feed-forward half of a transformer layer, its hidden values never kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mowe_kernels.ops._op import DifferentiableOp, Op, check, check_dtype, check_offsets, check_shape, empty, optional


def _fake(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, group_offsets, eps):
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    need_x, *need_parameters = ctx.needs_input_grad[:7]
    grads = BACKWARD(grad, *ctx.saved_tensors, ctx.eps, need_x, any(need_parameters))
    return *map(optional, grads), None, None


def _fake_backward(
    grad,
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    group_offsets,
    eps,
    need_x,
    need_parameters,
):
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return (
        x.new_empty(x.shape) if need_x else empty(x),
        *(p.new_empty(p.shape) if need_parameters and p is not None else empty(x) for p in parameters),
    )


_PARAMETERS = (
    "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight,"
    " Tensor fc2_bias, Tensor group_offsets, float eps"
)
BACKWARD = Op(
    "grouped_mlp_backward",
    f"(Tensor grad, {_PARAMETERS}, bool need_x, bool need_parameters)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    module="grouped_mlp",
    function="backward",
)
OP = DifferentiableOp(
    "grouped_mlp", f"({_PARAMETERS}) -> Tensor", _fake, setup_context=_setup_context, backward=_backward
)


def grouped_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    group_offsets: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """x + fc2(gelu(fc1(LayerNorm(x)))) with each encoder's own parameters; without norm weights, no LayerNorm.

    x: [R, D] packed rows. norm_weight, norm_bias: [E, D]. fc1_weight: [E, F, D], fc1_bias: [E, F],
    fc2_weight: [E, D, F], fc2_bias: [E, D]. group_offsets: int32 [E+1] from 0 on.
    Returns [R, D]; rows past group_offsets[-1] are unspecified. The backward recomputes the hidden values.
    Floor: 4 R D F FLOPs; 2 R D + 2 E D F elements moved. Raises ValueError for shapes or
    types that do not fit.
    """
    op, d = "grouped_mlp", x.shape[-1]
    check_shape(op, "x", x, (None, None), "packed rows [R, D]")
    check_shape(op, "fc1_weight", fc1_weight, (None, None, d), "stacked weights [E, F, D]")
    encoders, hidden, _ = fc1_weight.shape
    check((norm_weight is None) == (norm_bias is None), op, "norm_weight and norm_bias go together")
    for name, tensor, shape, meaning in (
        ("norm_weight", norm_weight, (encoders, d), "stacked weights [E, D]"),
        ("norm_bias", norm_bias, (encoders, d), "stacked biases [E, D]"),
        ("fc1_bias", fc1_bias, (encoders, hidden), "stacked biases [E, F]"),
        ("fc2_weight", fc2_weight, (encoders, d, hidden), "stacked weights [E, D, F]"),
        ("fc2_bias", fc2_bias, (encoders, d), "stacked biases [E, D]"),
    ):
        if tensor is not None:
            check_shape(op, name, tensor, shape, meaning)
    check_offsets(op, "group_offsets", group_offsets, encoders + 1, "[E+1]")
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_dtype(op, x, **norm, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
    return OP(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, group_offsets, eps)
