"""What follows a product, and the way of a gradient back through it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mowe_kernels.triton._device import gelu, gelu_grad
from mowe_kernels.triton._launch import cdiv, launch, next_power_of_2

ROWS = 8  # of a program that only passes over them


@triton.jit
def write(
    b_y, p_bias, p_residual, p_pre, p_out, rows, column, columns, N: tl.constexpr, GELU: tl.constexpr,
    p_scale=None, p_through=None, p_positions=None, positions=0,
):  # fmt: skip
    """out = act(y + bias) * scale * gelu'(through) + positions + residual; pre is kept before the activation.

    Block b_y begins at `column`; the pointers, but that to the bias, at its first row, in matrices [., N] or of one
    number a row. rows, positions: how many of its rows there are, and how many of them there is a position for.
    """
    NARROW: tl.constexpr = p_out.dtype.element_ty != tl.float32
    b_row, b_n = tl.arange(0, b_y.shape[0]), column + tl.arange(0, b_y.shape[1])
    b_there = (b_row < rows)[:, None] & (b_n < columns)[None, :]
    b_at = b_row[:, None] * N + b_n[None, :]
    if p_bias is not None:
        b_y += tl.load(p_bias + b_n, mask=b_n < columns, other=0.0).to(tl.float32)[None, :]
    if p_pre is not None:
        tl.store(p_pre + b_at, b_y.to(p_pre.dtype.element_ty), mask=b_there)
    if GELU:
        b_y = gelu(b_y, NARROW)
    if p_scale is not None:
        b_y *= tl.load(p_scale + b_row, mask=b_row < rows, other=0.0).to(tl.float32)[:, None]
    if p_through is not None:
        b_y *= gelu_grad(tl.load(p_through + b_at, mask=b_there, other=0.0).to(tl.float32), NARROW)
    if p_positions is not None:
        b_placed = b_there & (b_row < positions)[:, None]
        b_y += tl.load(p_positions + b_at, mask=b_placed, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_y += tl.load(p_residual + b_at, mask=b_there, other=0.0).to(tl.float32)
    tl.store(p_out + b_at, b_y.to(p_out.dtype.element_ty), mask=b_there)


# p_grad, p_pre: [R, N]. p_scale: float32 [SCALES, R]. p_count: int32, how many of the R rows there are.
# p_out: [1 + SCALES, R, N].
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["p_scale", "p_count"])
def activation_bwd_kernel(
    p_grad,
    p_pre,
    p_scale,
    p_count,
    p_out,
    rows,
    N: tl.constexpr,
    SCALES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """grad * gelu'(pre), then the same times each scale of the row; zero in rows that are not there."""
    b_row, b_n = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    b_there = b_row < tl.load(p_count)
    for column in range(0, N, BN):
        b_within = (column + b_n < N)[None, :]
        b_at = b_row.to(tl.int64)[:, None] * N + (column + b_n)[None, :]
        b_grad = tl.load(p_grad + b_at, mask=b_there[:, None] & b_within, other=0.0).to(tl.float32)
        if p_pre is not None:
            b_pre = tl.load(p_pre + b_at, mask=b_there[:, None] & b_within, other=0.0).to(tl.float32)
            b_grad *= gelu_grad(b_pre, p_out.dtype.element_ty != tl.float32)
        b_within &= (b_row < rows)[:, None]
        tl.store(p_out + b_at, b_grad.to(p_out.dtype.element_ty), mask=b_within)
        for s in tl.static_range(SCALES):
            b_scaled = b_grad * tl.load(p_scale + s * rows + b_row, mask=b_there, other=0.0)[:, None]
            p_copy = p_out + (s + 1) * N * rows.to(tl.int64)
            tl.store(p_copy + b_at, b_scaled.to(p_out.dtype.element_ty), mask=b_within)


def activation_backward(grad: Tensor, pre: Tensor | None, count: Tensor, scale: Tensor | None = None) -> Tensor:
    """[1 + scales, R, N]: grad [R, N] before the activation, and times each row of scale (float32 [scales, R]).

    pre: what went into the activation, gelu; None without one. count: int32 tensor of one element.
    """
    rows, n = grad.shape
    scales = 0 if scale is None else scale.shape[0]
    out = grad.new_empty(1 + scales, rows, n)
    launch(
        activation_bwd_kernel, cdiv(rows, ROWS), grad, pre, scale, count, out, rows,
        N=n, SCALES=scales, BM=ROWS, BN=min(256, next_power_of_2(n)), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
