"""Triton `sequence_mean`: one pass over the rows of each sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._launch import cdiv, check_dtypes, contiguous, launch, recorded, setting


# p_x: [R, D]. p_starts, p_lengths: int32 [S]. p_out: float32 [S, D]. Programs: a sequence times a block of columns.
@triton.jit(do_not_specialize_on_alignment=["p_starts", "p_lengths"])
def sequence_mean_fwd_kernel(
    p_x, p_starts, p_lengths, p_out, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    sequence = tl.program_id(0) // BLOCKS
    b_r = tl.arange(0, BLOCK_R)
    b_d = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    length = tl.load(p_lengths + sequence)
    p_x += tl.load(p_starts + sequence).to(tl.int64) * D
    b_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(0, length, BLOCK_R):
        there = (b_r < length - first)[:, None] & (b_d < D)[None, :]
        b_sum += tl.load(p_x + b_r[:, None] * D + b_d[None, :], mask=there, other=0.0).to(tl.float32)
        p_x += BLOCK_R * D
    b_mean = tl.sum(b_sum, 0) / tl.maximum(length, 1)
    tl.store(p_out + sequence.to(tl.int64) * D + b_d, b_mean, mask=b_d < D)


# p_grad: float32 [S, D]. p_starts, p_lengths: int32 [S]. p_grad_x: [R, D], zero where there is no sequence.
# Programs: a sequence times SPLITS times a block of columns.
@triton.jit(do_not_specialize_on_alignment=["p_starts", "p_lengths"])
def sequence_mean_bwd_kernel(
    p_grad, p_starts, p_lengths, p_grad_x,
    D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    sequence, split = tl.program_id(0) // (BLOCKS * SPLITS), tl.program_id(0) // BLOCKS % SPLITS
    b_r = split * BLOCK_R + tl.arange(0, BLOCK_R)
    b_d = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    length = tl.load(p_lengths + sequence)
    p_grad_x += tl.load(p_starts + sequence).to(tl.int64) * D
    b_grad = tl.load(p_grad + sequence.to(tl.int64) * D + b_d, mask=b_d < D, other=0.0) / tl.maximum(length, 1)
    b_grad = tl.broadcast_to(b_grad.to(p_grad_x.dtype.element_ty)[None, :], [BLOCK_R, BLOCK_D])
    for first in range(0, length, SPLITS * BLOCK_R):
        there = (b_r < length - first)[:, None] & (b_d < D)[None, :]
        tl.store(p_grad_x + b_r[:, None] * D + b_d[None, :], b_grad, mask=there)
        p_grad_x += SPLITS * BLOCK_R * D


def forward(x: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    check_dtypes("sequence_mean", x)
    out = torch.empty(starts.shape[0], x.shape[1], dtype=torch.float32, device=x.device)
    _launch(sequence_mean_fwd_kernel, out, 1, *contiguous(x, starts, lengths), out)
    return out


def backward(grad: Tensor, x: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    grad_x = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    splits = setting("mean_splits", 8)
    _launch(sequence_mean_bwd_kernel, grad, splits, *contiguous(grad, starts, lengths), grad_x, SPLITS=splits)
    return grad_x


def _launch(kernel: Any, means: Tensor, splits: int, *args: Any, **constexprs: int) -> None:
    sequences, d = means.shape
    block_r, block_d = setting("mean_block", (64, 64))
    launch(
        kernel, sequences * splits * cdiv(d, block_d), *args,
        D=d, BLOCK_R=block_r, BLOCK_D=block_d, **constexprs, num_warps=4, num_stages=1,
    )  # fmt: skip


def compilations(capability: int) -> Iterator[Compilation]:
    def mean(d: int, dtype: torch.dtype) -> None:
        x = torch.empty(4096, d, dtype=dtype, device="meta")
        starts = torch.empty(8, dtype=torch.int32, device="meta")
        backward(forward(x, starts, starts), x, starts, starts)

    yield from recorded(
        capability,
        {
            f"{d} columns, {name}": lambda d=d, dtype=dtype: mean(d, dtype)
            for d in (384, 1280)
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        },
    )
