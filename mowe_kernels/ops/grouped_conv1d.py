"""`mowe::grouped_conv1d`: every encoder's convolution over its own sequences, zero padding at each one's own ends."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mowe_kernels.ops._op import (
    DifferentiableOp,
    Op,
    check,
    check_dtype,
    check_offsets,
    check_shape,
    empty,
    needs_grad,
    optional,
)
from mowe_kernels.ops.grouped_linear import ACTIVATIONS


def _fake(
    x, weight, bias, starts, lengths, encoder, cu_seqlens, positions, residual,
    num_rows, stride, padding, groups, activation, save_pre,
):  # fmt: skip
    out = x.new_empty(num_rows, weight.shape[1])
    return out, out.new_empty(out.shape) if save_pre else empty(x)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, starts, lengths, encoder, cu_seqlens, positions, *_ = inputs
    ctx.stride, ctx.padding, ctx.groups, ctx.activation = inputs[10:14]
    ctx.save_for_backward(x, weight, starts, lengths, encoder, cu_seqlens, positions, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else that output gets a gradient of zeros, written for nobody


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_positions, need_residual = ctx.needs_input_grad[7:9]
    needs = need_x, need_weight, need_bias, need_positions
    grads = (None,) * 4
    if grad is not None and any(needs):
        grads = _backward_op(grad, *ctx.saved_tensors, ctx.stride, ctx.padding, ctx.groups, ctx.activation, *needs)
    *grads, grad_positions = map(optional, grads)
    return *grads, *(None,) * 4, grad_positions, grad if need_residual else None, *(None,) * 6


def _fake_backward(
    grad, x, weight, starts, lengths, encoder, cu_seqlens, positions, pre,
    stride, padding, groups, activation, need_x, need_weight, need_bias, need_positions,
):  # fmt: skip
    return (
        x.new_empty(x.shape) if need_x else empty(x),
        weight.new_empty(weight.shape) if need_weight else empty(x),
        weight.new_empty(weight.shape[:2]) if need_bias else empty(x),
        positions.new_empty(positions.shape) if need_positions else empty(x),
    )


_backward_op = Op(
    "grouped_conv1d_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor starts, Tensor lengths, Tensor encoder, Tensor cu_seqlens,"
    " Tensor? positions, Tensor pre, int stride, int padding, int groups, str activation, bool need_x,"
    " bool need_weight, bool need_bias, bool need_positions) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    module="grouped_conv1d",
    function="backward",
)
_op = DifferentiableOp(
    "grouped_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor starts, Tensor lengths, Tensor encoder, Tensor cu_seqlens,"
    " Tensor? positions, Tensor? residual, SymInt num_rows, int stride, int padding, int groups, str activation,"
    " bool save_pre) -> (Tensor, Tensor)",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def grouped_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    starts: Tensor,
    lengths: Tensor,
    encoder: Tensor,
    cu_seqlens: Tensor,
    num_rows: int,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    activation: str = "",
    positions: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(conv(x) + bias[e]) + positions[e, t] + residual, for each sequence p with encoder e = encoder[p].

    Output frame t of sequence p sees input frames starts[p] + t * stride + j - padding for j in 0..taps-1; frames
    outside the sequence's lengths[p] are zero. Sequences may share input frames (several encoders, one clip).

    x: [S, C] input frames. weight: [E, N, taps, C / groups] (nn.Conv1d's weight with its last two axes swapped).
    bias: [E, N]. starts, lengths, encoder: int32 [P]. cu_seqlens: int32 [P+1] from 0 on, first output row of each
    sequence; its differences decide how many frames a sequence gives. num_rows: host bound of cu_seqlens[-1].
    positions: [E, Tmax, N]. residual: [num_rows, N]. activation: "" or "gelu" (erf).
    Returns [num_rows, N]; rows past cu_seqlens[-1] are unspecified.
    Floor: 2 R N taps C / groups FLOPs for R output rows; S C + R N elements moved.
    Raises ValueError for shapes or types that do not fit.
    """
    op = "grouped_conv1d"
    check_shape(op, "x", x, (None, None), "input frames [S, C]")
    check(stride > 0, op, f"stride must be positive, got {stride}")
    check(padding >= 0, op, f"padding must not be negative, got {padding}")
    check(groups > 0 and x.shape[1] % groups == 0, op, f"{groups} groups do not divide {x.shape[1]} channels")
    check_shape(
        op, "weight", weight, (None, None, None, x.shape[1] // groups), "stacked weights [E, N, taps, C/groups]"
    )
    encoders, n = weight.shape[:2]
    check(n % groups == 0, op, f"{groups} groups do not divide {n} channels")
    check_shape(op, "starts", starts, (None,), "first frame of each sequence [P]")
    pairs = starts.shape[0]
    for name, tensor, shape, meaning in (
        ("bias", bias, (encoders, n), "stacked biases [E, N]"),
        ("lengths", lengths, (pairs,), "frames of each sequence [P]"),
        ("encoder", encoder, (pairs,), "encoder of each sequence [P]"),
        ("positions", positions, (encoders, None, n), "position embeddings [E, Tmax, N]"),
        ("residual", residual, (num_rows, n), "rows to add [R, N]"),
    ):
        if tensor is not None:
            check_shape(op, name, tensor, shape, meaning)
    check_offsets(op, "cu_seqlens", cu_seqlens, pairs + 1, "[P+1]")
    check(activation in ACTIVATIONS, op, f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    check_dtype(op, x, weight=weight, bias=bias, positions=positions, residual=residual)
    save_pre = activation != "" and needs_grad(x, weight, bias)
    return _op(
        x, weight, bias, starts, lengths, encoder, cu_seqlens, positions, residual,
        num_rows, stride, padding, groups, activation, save_pre,
    )[0]  # fmt: skip
