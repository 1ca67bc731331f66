"""`mowe::sequence_mean`: the mean frame of each packed sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mowe_kernels.dtypes import accumulation_dtype
from mowe_kernels.ops._op import DifferentiableOp, Op, check_shape


def _fake(x, starts, lengths):
    return x.new_empty(starts.shape[0], x.shape[1], dtype=accumulation_dtype(x.dtype))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, starts, lengths = inputs
    ctx.save_for_backward(x, starts, lengths)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    return _backward_op(grad, *ctx.saved_tensors), None, None


def _fake_backward(grad, x, starts, lengths):
    return x.new_empty(x.shape)


_backward_op = Op(
    "sequence_mean_backward",
    "(Tensor grad, Tensor x, Tensor starts, Tensor lengths) -> Tensor",
    _fake_backward,
    module="sequence_mean",
    function="backward",
)
_op = DifferentiableOp(
    "sequence_mean",
    "(Tensor x, Tensor starts, Tensor lengths) -> Tensor",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def sequence_mean(x: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Mean of rows starts[s] .. starts[s] + lengths[s] - 1 for each sequence s; zero for an empty one.

    x: [R, D]. starts, lengths: int32 [S]; sequences must not overlap. Returns [S, D] in float32
    (float64 for float64).
    Floor: R D elements moved. Raises ValueError for shapes that do not fit.
    """
    check_shape("sequence_mean", "x", x, (None, None), "packed rows [R, D]")
    check_shape("sequence_mean", "starts", starts, (None,), "first row of each sequence [S]")
    check_shape("sequence_mean", "lengths", lengths, (starts.shape[0],), "rows of each sequence [S]")
    return _op(x, starts, lengths)
