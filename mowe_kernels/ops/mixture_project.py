"""`mowe::mixture_project`: the projector's first layer over base and weak features, their concatenation never built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class FrameClock:
    """When the frames of an encoder happen: frame t is centred on sample offset + t * hop of the 16 kHz waveform."""

    hop: int
    offset: int

    def align(self, other: FrameClock) -> tuple[int, int, int]:
        """(a, c, d) such that (a * t + c) // d is the frame of `other` nearest in time to frame t of this clock."""
        return 2 * self.hop, 2 * (self.offset - other.offset) + other.hop, 2 * other.hop


def _fake(
    base, base_starts, base_lengths, rows, row_offsets, position, weights, base_weight, row_weights, bias,
    alignment, cu_seqlens, num_rows, stride, padding, activation, save_pre,
):  # fmt: skip
    out = base.new_empty(num_rows, base_weight.shape[0])
    return out, out.new_empty(out.shape) if save_pre else empty(base)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    (
        base, base_starts, base_lengths, rows, row_offsets, position, weights, base_weight, row_weights, _,
        ctx.alignment, cu_seqlens, _, ctx.stride, ctx.padding, ctx.activation, _,
    ) = inputs  # fmt: skip
    ctx.families = len(rows)
    ctx.save_for_backward(
        base, base_starts, base_lengths, position, weights, base_weight, cu_seqlens, output[1],
        *rows, *row_offsets, *row_weights,
    )  # fmt: skip
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else that output gets a gradient of zeros, written for nobody


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    base, base_starts, base_lengths, position, weights, base_weight, cu_seqlens, pre, *lists = ctx.saved_tensors
    n = ctx.families
    rows, row_offsets, row_weights = lists[:n], lists[n : 2 * n], lists[2 * n :]
    needs = ctx.needs_input_grad
    need_base, need_weights, need_bias = needs[0], needs[6], needs[9]
    need_rows, need_parameters = any(needs[3]), needs[7] or any(needs[8])
    grads = None, [None] * n, None, None, [None] * n, None
    if grad is not None:
        grads = _backward_op(
            grad.contiguous(), base, base_starts, base_lengths, rows, row_offsets, position, weights, base_weight,
            row_weights, ctx.alignment, cu_seqlens, pre, ctx.stride, ctx.padding, ctx.activation,
            need_base, need_rows, need_weights, need_parameters, need_bias,
        )  # fmt: skip
    grad_base, grad_rows, grad_weights, grad_base_weight, grad_row_weights, grad_bias = grads
    return (
        optional(grad_base), None, None, [optional(g) for g in grad_rows], [None] * n, None, optional(grad_weights),
        optional(grad_base_weight), [optional(g) for g in grad_row_weights], optional(grad_bias),
        None if ctx.alignment else [],  # torch.library takes an empty list for one of tensors
        *(None,) * 6,
    )  # fmt: skip


def _fake_backward(
    grad, base, base_starts, base_lengths, rows, row_offsets, position, weights, base_weight, row_weights,
    alignment, cu_seqlens, pre, stride, padding, activation,
    need_base, need_rows, need_weights, need_parameters, need_bias,
):  # fmt: skip
    def like(tensor: Tensor, needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape) if needed else empty(base)

    return (
        like(base, need_base),
        [like(r, need_rows) for r in rows],
        like(weights, need_weights),
        like(base_weight, need_parameters),
        [like(w, need_parameters) for w in row_weights],
        base_weight.new_empty(base_weight.shape[0]) if need_bias else empty(base),
    )


_backward_op = Op(
    "mixture_project_backward",
    "(Tensor grad, Tensor base, Tensor base_starts, Tensor base_lengths, Tensor[] rows, Tensor[] row_offsets,"
    " Tensor position, Tensor weights, Tensor base_weight, Tensor[] row_weights, int[] alignment, Tensor cu_seqlens,"
    " Tensor pre, int stride, int padding, str activation, bool need_base, bool need_rows, bool need_weights,"
    " bool need_parameters, bool need_bias) -> (Tensor, Tensor[], Tensor, Tensor, Tensor[], Tensor)",
    _fake_backward,
    module="mixture_project",
    function="backward",
)
_op = DifferentiableOp(
    "mixture_project",
    "(Tensor base, Tensor base_starts, Tensor base_lengths, Tensor[] rows, Tensor[] row_offsets, Tensor position,"
    " Tensor weights, Tensor base_weight, Tensor[] row_weights, Tensor? bias, int[] alignment, Tensor cu_seqlens,"
    " SymInt num_rows, int stride, int padding, str activation, bool save_pre) -> (Tensor, Tensor)",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def mixture_project(
    base: Tensor,
    rows: Sequence[Tensor],
    weights: Tensor,
    *,
    base_starts: Tensor,
    base_lengths: Tensor,
    row_offsets: Sequence[Tensor],
    position: Tensor,
    base_weight: Tensor,
    row_weights: Sequence[Tensor],
    bias: Tensor | None,
    base_clock: FrameClock,
    row_clocks: Sequence[FrameClock],
    cu_seqlens: Tensor,
    num_rows: int,
    stride: int,
    padding: int = 0,
    activation: str = "",
) -> Tensor:
    """A strided convolution over [base features ; slot 1 ; ... ; slot k], each slot scaled by its weight.

    Output frame u of clip b is act(bias + sum over taps j of base_weight[:, j] @ base[t] + sum over slots s of
    weights[b, s] * row_weights[f][s, :, j] @ weak[s, t]) with t = u * stride + j - padding. weak[s, t] is the frame of
    the slot's encoder (of family f) nearest in time to base frame t, the later of two; frames outside a clip are zero,
    but for one just past either end of the encoder's frames, which the last one before it stands in for: clocks of
    equal rate end within a frame of each other. Stacking s frames before a linear layer is the case taps = stride = s.
    Which columns a slot of a family meets is our choice: the paper concatenates, and encoders of different widths
    cannot share columns.

    base: [Rb, Db] packed frames; clip b's are base_starts[b] .. + base_lengths[b] (int32 [B]). rows: per family
    [R_f, D_f]. row_offsets: per family int32 [P+1]. position: int32 [B, k], sorted pair serving each slot.
    weights: [B, k] float32, multiplied in the accumulator. base_weight: [N, taps, Db]. row_weights: per family
    [k, N, taps, D_f]. bias: [N]. cu_seqlens: int32 [B+1] from 0 on, first output row of each clip. num_rows: host
    bound of cu_seqlens[-1]. activation: "" or "gelu" (erf).
    Returns [num_rows, N]; rows past cu_seqlens[-1] are unspecified.
    Floor: 2 R N taps (Db + sum of the slots' widths) FLOPs; every feature read once.
    Raises ValueError for shapes or types that do not fit.
    """
    op = "mixture_project"
    check_shape(op, "base", base, (None, None), "packed base frames [Rb, Db]")
    check_shape(
        op, "base_weight", base_weight, (None, None, base.shape[1]), "weights of the base features [N, taps, Db]"
    )
    n, taps, _ = base_weight.shape
    check_shape(op, "base_starts", base_starts, (None,), "first frame of each clip [B]")
    batch = base_starts.shape[0]
    check_shape(op, "base_lengths", base_lengths, (batch,), "frames of each clip [B]")
    check_shape(op, "weights", weights, (batch, None), "slot weights [B, k]")
    check_shape(op, "position", position, tuple(weights.shape), "sorted pair of each slot [B, k]")
    count = len(rows)
    for name, given in (("row_offsets", row_offsets), ("row_weights", row_weights), ("row_clocks", row_clocks)):
        check(len(given) == count, op, f"{name} must have one entry per family ({count}), got {len(given)}")
    for f, (r, o, w) in enumerate(zip(rows, row_offsets, row_weights, strict=True)):
        check_shape(op, f"rows[{f}]", r, (None, None), "packed rows [R, D]")
        check_shape(op, f"row_offsets[{f}]", o, (position.numel() + 1,), "first row of each pair [P+1]")
        sizes = weights.shape[1], n, taps, r.shape[1]
        check_shape(op, f"row_weights[{f}]", w, sizes, "weights of the slots [k, N, taps, D]")
    if bias is not None:
        check_shape(op, "bias", bias, (n,), "biases [N]")
    check_offsets(op, "cu_seqlens", cu_seqlens, batch + 1, "[B+1]")
    check(stride > 0, op, f"stride must be positive, got {stride}")
    check(padding >= 0, op, f"padding must not be negative, got {padding}")
    check(activation in ACTIVATIONS, op, f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    named = {f"{name}[{f}]": t for name, ts in (("rows", rows), ("row_weights", row_weights)) for f, t in enumerate(ts)}
    check_dtype(op, base, base_weight=base_weight, bias=bias, **named)
    alignment = [number for clock in row_clocks for number in base_clock.align(clock)]
    save_pre = activation != "" and needs_grad(base, *rows, weights, base_weight, *row_weights, bias)
    return _op(
        base, base_starts, base_lengths, list(rows), list(row_offsets), position, weights, base_weight,
        list(row_weights), bias, alignment, cu_seqlens, num_rows, stride, padding, activation, save_pre,
    )[0]  # fmt: skip
