"""`mowe::grouped_linear`: every encoder's linear layer over its own rows, with its epilogue."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mowe_kernels.ops._op import DifferentiableOp, Op, check, check_dtype, check_offsets, check_shape, empty, needs_grad

ACTIVATIONS = ("", "gelu")


def _fake(x, weight, bias, group_offsets, residual, row_scale, activation, save_pre):
    out = x.new_empty(x.shape[0], weight.shape[1])
    return out, out.new_empty(out.shape) if save_pre else empty(x)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, group_offsets, _, row_scale, ctx.activation, _ = inputs
    ctx.save_for_backward(x, weight, group_offsets, row_scale, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else that output gets a gradient of zeros, written for nobody


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    need_x, need_weight, need_bias, _, need_residual, need_scale, *_ = ctx.needs_input_grad
    x, weight, group_offsets, row_scale, pre = ctx.saved_tensors
    needs = need_x, need_weight, need_bias, need_scale
    grads = (None,) * 4
    if grad is not None and any(needs):
        grads = BACKWARD(grad, x, weight, group_offsets, row_scale, pre, ctx.activation, *needs, None)
    *grads, grad_scale = (g if needed else None for g, needed in zip(grads, needs, strict=True))
    return *grads, None, grad if need_residual else None, grad_scale, None, None


def _fake_backward(
    grad, x, weight, group_offsets, row_scale, pre, activation, need_x, need_weight, need_bias, need_scale, residual
):
    return (
        x.new_empty(x.shape) if need_x else empty(x),
        weight.new_empty(weight.shape) if need_weight else empty(x),
        weight.new_empty(weight.shape[:2]) if need_bias else empty(x),
        row_scale.new_empty(row_scale.shape) if need_scale else empty(x),
    )


BACKWARD = Op(
    "grouped_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor group_offsets, Tensor? row_scale, Tensor pre, str activation,"
    " bool need_x, bool need_weight, bool need_bias, bool need_scale, Tensor? residual)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    module="grouped_linear",
    function="backward",
)
OP = DifferentiableOp(
    "grouped_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor group_offsets, Tensor? residual, Tensor? row_scale,"
    " str activation, bool save_pre) -> (Tensor, Tensor)",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group_offsets: Tensor,
    *,
    activation: str = "",
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """row_scale * act(x @ weight[e].T + bias[e]) + residual, e being the encoder whose group a row lies in.

    x: [R, K] packed rows. weight: [E, N, K]. bias: [E, N]. group_offsets: int32 [E+1] from 0 on, first row of each
    encoder. activation: "" or "gelu" (erf). residual: [R, N]. row_scale: [R].
    Returns [R, N] in the type of x, accumulated in float32; rows past group_offsets[-1] are unspecified.
    Floor: 2 R N K FLOPs; R (K + N) + E N K elements moved.
    Raises ValueError for shapes or types that do not fit or an unknown activation.
    """
    check_shape("grouped_linear", "x", x, (None, None), "packed rows [R, K]")
    rows, k = x.shape
    check_shape("grouped_linear", "weight", weight, (None, None, k), "stacked weights [E, N, K]")
    encoders, n, _ = weight.shape
    check_offsets("grouped_linear", "group_offsets", group_offsets, encoders + 1, "[E+1]")
    for name, tensor, shape, meaning in (
        ("bias", bias, (encoders, n), "stacked biases [E, N]"),
        ("residual", residual, (rows, n), "rows to add [R, N]"),
        ("row_scale", row_scale, (rows,), "a factor per row [R]"),
    ):
        if tensor is not None:
            check_shape("grouped_linear", name, tensor, shape, meaning)
    check(activation in ACTIVATIONS, "grouped_linear", f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    check_dtype("grouped_linear", x, weight=weight, bias=bias, residual=residual)
    scale_learns = row_scale is not None and needs_grad(row_scale)
    save_pre = scale_learns or (activation != "" and needs_grad(x, weight, bias))
    return OP(x, weight, bias, group_offsets, residual, row_scale, activation, save_pre)[0]
