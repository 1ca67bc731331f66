"""Triton `grouped_layer_norm`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._device import find_tile, gelu, gelu_grad
from mowe_kernels.triton._launch import (
    Launch,
    Programs,
    alike,
    cdiv,
    check_dtypes,
    contiguous,
    hardware,
    launch,
    next_power_of_2,
    recorded,
    remembered,
    setting,
)

BLOCK = 4096  # elements a program holds at a time
FORWARD_WARPS, BACKWARD_WARPS = 4, 8
BACKWARD_PROGRAMS_PER_SM = 4
REDUCE_PARTS, REDUCE_COLS = 32, 64


@triton.jit
def normalise(x, there, eps, D: tl.constexpr):
    """(x - mean) / std of every row of a block [BM, BD] with D columns and zeros past them, and 1 / std [BM, 1]."""
    centred = tl.where(there, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * rstd[:, None], rstd[:, None]


# p_x, p_out: [R, D]. p_weight, p_bias: [E, D]. p_offsets: int32 [E+1].
@triton.jit(do_not_specialize_on_alignment=["p_offsets"])
def grouped_layer_norm_fwd_kernel(
    p_x,
    p_weight,
    p_bias,
    p_offsets,
    p_out,
    eps,
    E: tl.constexpr,
    BE: tl.constexpr,
    D: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    group, row, stop = find_tile(p_offsets, tl.program_id(0), BM, E, BE)
    if row >= stop:
        return
    rows, cols = row + tl.arange(0, BM), tl.arange(0, BD)
    there = (rows < stop)[:, None] & (cols < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + cols[None, :]
    normed, _ = normalise(tl.load(p_x + at, mask=there, other=0.0).to(tl.float32), there, eps, D)
    b_weight = tl.load(p_weight + group * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + group * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    y = normed * b_weight[None, :] + b_bias[None, :]
    if GELU:
        y = gelu(y)
    tl.store(p_out + at, y.to(p_out.dtype.element_ty), mask=there)


# p_grad, p_x, p_residual, p_grad_x: [R, D]. p_weight, p_bias: [E, D]. p_offsets: int32 [E+1].
# p_parts: fp32, at least [R // chunk + E, 2, D].
@triton.jit(do_not_specialize=["chunk"], do_not_specialize_on_alignment=["p_offsets"])
def grouped_layer_norm_bwd_kernel(
    p_grad,
    p_x,
    p_weight,
    p_bias,
    p_offsets,
    p_residual,
    p_grad_x,
    p_parts,
    eps,
    chunk,
    E: tl.constexpr,
    BE: tl.constexpr,
    D: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """grad_x = the gradient of x + residual; parts = each chunk's share of the gradients of weight and bias.

    A program owns a chunk of one group's rows.
    """
    group, start, stop = find_tile(p_offsets, tl.program_id(0), chunk, E, BE)
    if start >= stop:
        return
    stop = tl.minimum(start + chunk, stop)
    cols = tl.arange(0, BD)
    b_weight = tl.load(p_weight + group * D + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(p_bias + group * D + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros((BM, BD), dtype=tl.float32)
    grad_bias = tl.zeros((BM, BD), dtype=tl.float32)
    for row in tl.range(start, stop, BM, num_stages=2):
        rows = row + tl.arange(0, BM)
        there = (rows < stop)[:, None] & (cols < D)[None, :]
        at = rows.to(tl.int64)[:, None] * D + cols[None, :]
        normed, rstd = normalise(tl.load(p_x + at, mask=there, other=0.0).to(tl.float32), there, eps, D)
        g = tl.load(p_grad + at, mask=there, other=0.0).to(tl.float32)
        if GELU:
            g *= gelu_grad(normed * b_weight + b_bias)
        if p_parts is not None:
            grad_weight += g * normed
            grad_bias += g
        if p_grad_x is not None:
            g *= b_weight
            along = tl.sum(g * normed, 1) / D
            grad_x = (g - (tl.sum(g, 1) / D)[:, None] - normed * along[:, None]) * rstd
            if p_residual is not None:
                grad_x += tl.load(p_residual + at, mask=there, other=0.0).to(tl.float32)
            tl.store(p_grad_x + at, grad_x.to(p_grad_x.dtype.element_ty), mask=there)
    if p_parts is not None:
        part = p_parts + tl.program_id(0) * 2 * D + cols
        tl.store(part, tl.sum(grad_weight, 0), mask=cols < D)
        tl.store(part + D, tl.sum(grad_bias, 0), mask=cols < D)


# p_parts: fp32, at least [R // chunk + E, 2, D]. p_offsets: int32 [E+1]. p_grad_weight, p_grad_bias: [E, D].
@triton.jit(do_not_specialize=["chunk"], do_not_specialize_on_alignment=["p_offsets"])
def grouped_layer_norm_bwd_reduce_kernel(
    p_parts,
    p_offsets,
    p_grad_weight,
    p_grad_bias,
    chunk,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The sums over each group's parts, where `find_tile` put them."""
    blocks: tl.constexpr = (D + COLS - 1) // COLS
    group = tl.program_id(0) // blocks
    start, stop = tl.load(p_offsets + group), tl.load(p_offsets + group + 1)
    first = start // chunk + group
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    grad_weight = tl.zeros((PARTS, COLS), dtype=tl.float32)
    grad_bias = tl.zeros((PARTS, COLS), dtype=tl.float32)
    last = first + (stop - start + chunk - 1) // chunk
    for part in range(first, last, PARTS):
        parts = part + tl.arange(0, PARTS)
        there = (parts < last)[:, None] & (cols < D)[None, :]
        at = parts[:, None] * 2 * D + cols[None, :]
        grad_weight += tl.load(p_parts + at, mask=there, other=0.0)
        grad_bias += tl.load(p_parts + D + at, mask=there, other=0.0)
    at = group * D + cols
    tl.store(p_grad_weight + at, tl.sum(grad_weight, 0).to(p_grad_weight.dtype.element_ty), mask=cols < D)
    tl.store(p_grad_bias + at, tl.sum(grad_bias, 0).to(p_grad_bias.dtype.element_ty), mask=cols < D)


def forward(x: Tensor, weight: Tensor, bias: Tensor, group_offsets: Tensor, eps: float, activation: str) -> Tensor:
    check_dtypes("grouped_layer_norm", x, weight, bias)
    x, weight, bias, group_offsets = contiguous(x, weight, bias, group_offsets)
    out = torch.empty_like(x)
    (rows, d), experts = x.shape, weight.shape[0]
    start, block_rows = _forward_launch(experts, d, activation == "gelu")
    start(Programs(rows, block_rows, experts) if rows else 0, x, weight, bias, group_offsets, out, eps)
    return out


@remembered
def _forward_launch(experts: int, d: int, gelu: bool) -> tuple[Launch, int]:
    """The launch, and how many rows a program takes."""
    block_rows, block_cols = _block(d)
    start = Launch(
        grouped_layer_norm_fwd_kernel, E=experts, BE=next_power_of_2(experts), D=d, GELU=gelu,
        BM=block_rows, BD=block_cols, num_warps=FORWARD_WARPS, num_stages=1,
    )  # fmt: skip
    return start, block_rows


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    group_offsets: Tensor,
    eps: float,
    activation: str,
    need_x: bool,
    need_parameters: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's gradients."""
    check_dtypes("grouped_layer_norm", grad, x, weight, bias)
    grad, x, weight, bias, group_offsets, residual = contiguous(grad, x, weight, bias, group_offsets, residual)
    (rows, d), experts = x.shape, weight.shape[0]
    nothing = x.new_empty(0)
    grad_x = torch.empty_like(x) if need_x else nothing
    grad_weight, grad_bias = (torch.empty_like(p) if need_parameters else nothing for p in (weight, bias))
    block_rows, block_cols = _block(d)
    programs = BACKWARD_PROGRAMS_PER_SM * hardware(x.device).num_sms
    most_rows = alike(rows)
    chunk = setting("layer_norm_chunk", max(1, cdiv(most_rows, programs * block_rows)) * block_rows)
    parts = x.new_empty(most_rows // chunk + experts, 2, d, dtype=torch.float32) if need_parameters else None
    launch(
        grouped_layer_norm_bwd_kernel, Programs(rows, chunk, experts) if rows else 0,
        grad, x, weight, bias, group_offsets, residual, grad_x if need_x else None, parts, eps, chunk,
        E=experts, BE=next_power_of_2(experts), D=d, GELU=activation == "gelu",
        BM=block_rows, BD=block_cols, num_warps=BACKWARD_WARPS, num_stages=1,
    )  # fmt: skip
    if need_parameters:
        launch(
            grouped_layer_norm_bwd_reduce_kernel, experts * cdiv(d, REDUCE_COLS),
            parts, group_offsets, grad_weight, grad_bias, chunk,
            D=d, PARTS=REDUCE_PARTS, COLS=REDUCE_COLS, num_warps=4, num_stages=2,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def _block(d: int) -> tuple[int, int]:
    """Rows and columns a program holds at a time."""
    cols = next_power_of_2(d)
    return max(1, setting("layer_norm_block", BLOCK) // cols), cols


def compilations(capability: int) -> Iterator[Compilation]:
    """Norms of Whisper and HuBERT encoders, forward and backward."""
    calls = {}
    for case, d, dtype in (
        ("tiny", 384, torch.bfloat16),
        ("large", 1280, torch.bfloat16),
        ("large, float32", 1280, torch.float32),
    ):
        x = torch.empty(48000, d, dtype=dtype, device="meta")
        weight, offsets = x.new_empty(8, d), x.new_empty(9, dtype=torch.int32)
        calls |= {
            f"{case}": partial(forward, x, weight, weight, offsets, 1e-5, ""),
            f"gradients of {case}": partial(backward, x, x, weight, weight, offsets, 1e-5, "", True, True, x),
            f"gradients of {case} with gelu": partial(
                backward, x, x, weight, weight, offsets, 1e-5, "gelu", True, True
            ),
        }
    yield from recorded(capability, calls)
