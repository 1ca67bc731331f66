"""Triton `grouped_mlp`: one kernel for narrow encoders, the kernels of its parts for wide ones and for the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mowe_kernels.triton import _mlp, grouped_layer_norm
from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._descriptors import operands, worth_describing
from mowe_kernels.triton._launch import (
    Hardware,
    Launch,
    Programs,
    Tuning,
    alike,
    check_dtypes,
    contiguous,
    hardware,
    next_power_of_2,
    recorded,
    remembered,
    setting,
)
from mowe_kernels.triton.grouped_linear import gemm, newest, wgrad


class Block(NamedTuple):
    """Rows, hidden values and columns a program handles at a time, its warps and its stages of prefetching."""

    rows: int
    hidden: int
    cols: int
    warps: int
    stages: int


# By bits of the type and capability, the blocks of the fused kernel for encoders up to a width: as many rows as
# registers hold the sums of, since every program reads all the weights. Float32, which has no matrix instructions to
# keep busy, and what is wider than the table says go through memory.
FUSED = {
    (32, 80): {},
    (16, 80): {384: Block(64, 32, 128, 8, 2), 512: Block(64, 16, 128, 8, 2)},
    (16, 86): {384: Block(64, 16, 128, 8, 2), 512: Block(32, 16, 128, 8, 2)},
    (16, 90): {256: Block(128, 64, 128, 8, 2), 384: Block(128, 32, 128, 8, 2), 512: Block(64, 32, 128, 8, 2)},
    (16, 100): {384: Block(128, 32, 128, 8, 2)},
}


def forward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    group_offsets: Tensor,
    eps: float,
) -> Tensor:
    check_dtypes("grouped_mlp", x, norm_weight, fc1_weight, fc2_weight)
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, group_offsets = contiguous(
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, group_offsets
    )
    (rows, d), (experts, f, _) = x.shape, fc1_weight.shape
    out = torch.empty_like(x)
    block, described = _choice(x.device, x.dtype, alike(rows), d, f)
    if block is None:
        h = _normed(x, norm_weight, norm_bias, group_offsets, eps)
        hidden = x.new_empty(rows, f)
        gemm(h, fc1_weight, group_offsets, hidden, bias=fc1_bias, gelu=True)
        gemm(hidden, fc2_weight, group_offsets, out, bias=fc2_bias, residual=x)
        return out
    (fc1, fc2), tma = (fc1_weight, fc2_weight), False
    if described:
        blocks = (block.hidden, block.cols), (block.cols, block.hidden)
        (fc1, fc2), tma = operands((fc1_weight, blocks[0]), (fc2_weight, blocks[1]))
    start = _fused_launch(block, tma, x.itemsize, experts, d, f)
    programs = Programs(rows, block.rows, experts) if rows else 0
    start(programs, x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias, group_offsets, out, eps)
    return out


@remembered
def _choice(device: torch.device, dtype: torch.dtype, rows: int, d: int, f: int) -> tuple[Block | None, bool]:
    """The block of the fused kernel, None for its parts, and whether weights are fetched through descriptors."""
    found = hardware(device)
    block = fused_block(found, dtype, d)
    whole = block is not None and f % block.hidden == 0  # else a descriptor reads on into the next encoder's weights
    return block, whole and worth_describing(found, 2 * rows * d * f)


@remembered
def _fused_launch(block: Block, tma: bool, itemsize: int, experts: int, d: int, f: int) -> Launch:
    return Launch(
        _mlp.grouped_mlp_fwd_kernel, E=experts, BE=next_power_of_2(experts), D=d, F=f,
        BM=block.rows, BF=block.hidden, BD=block.cols, TMA=tma,
        num_warps=block.warps, num_stages=block.stages, matmul=itemsize == 2,
    )  # fmt: skip


def backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    group_offsets: Tensor,
    eps: float,
    need_x: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    check_dtypes("grouped_mlp", grad, x, norm_weight, fc1_weight, fc2_weight)
    grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, group_offsets = contiguous(
        grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, group_offsets
    )
    nothing = x.new_empty(0)
    h = _normed(x, norm_weight, norm_bias, group_offsets, eps)
    pre = x.new_empty(x.shape[0], fc1_weight.shape[1])
    grads_fc1 = grads_fc2 = grads_norm = (nothing, nothing)
    if need_parameters:
        hidden = torch.empty_like(pre)
        gemm(h, fc1_weight, group_offsets, hidden, bias=fc1_bias, gelu=True, pre=pre)
        grads_fc2 = wgrad(grad, hidden, fc2_weight, group_offsets, True, True)
        del hidden
    else:
        gemm(h, fc1_weight, group_offsets, pre, bias=fc1_bias)
    grad_pre = pre  # every value is read by the program that replaces it
    gemm(grad, fc2_weight, group_offsets, grad_pre, transposed=True, through=pre)
    if need_parameters:
        grads_fc1 = wgrad(grad_pre, h, fc1_weight, group_offsets, True, True)
    grad_x = nothing
    if norm_weight is None:
        if need_x:
            grad_x = torch.empty_like(x)
            gemm(grad_pre, fc1_weight, group_offsets, grad_x, transposed=True, residual=grad)
    else:
        grad_h = torch.empty_like(x)
        gemm(grad_pre, fc1_weight, group_offsets, grad_h, transposed=True)
        grad_x, *grads_norm = grouped_layer_norm.backward(
            grad_h, x, norm_weight, norm_bias, group_offsets, eps, "", need_x, need_parameters, residual=grad
        )
    return grad_x, *grads_norm, *grads_fc1, *grads_fc2


def fused_block(device: Hardware, dtype: torch.dtype, width: int) -> Block | None:
    """The block of the fused kernel for rows [R, width], None where the parts are launched one by one."""
    blocks = newest(FUSED, device, dtype)
    up_to = min((w for w in blocks if w >= width), default=None)
    return setting("mlp_block", blocks.get(up_to), device, f"{8 * dtype.itemsize} bits, width {width}", Block)


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, group_offsets: Tensor, eps: float) -> Tensor:
    return x if weight is None else grouped_layer_norm.forward(x, weight, bias, group_offsets, eps, "")


def tunings(device: torch.device, rows: int) -> Iterator[Tuning]:
    """The feed-forward halves of small encoders, fused in several ways, and in parts (None)."""
    candidates = tuple(
        Block(block_rows, hidden, 128, warps, stages)
        for block_rows, hidden, warps, stages in (
            (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 3)
        )
    )  # fmt: skip
    offsets = torch.arange(9, dtype=torch.int32, device=device) * (rows // 8)
    for d in (384, 512):
        x = torch.randn(rows // 8 * 8, d, dtype=torch.bfloat16, device=device)
        up, down = (torch.randn(8, *s, dtype=x.dtype, device=device) / 20 for s in ((4 * d, d), (d, 4 * d)))
        norm, hidden = down[:, :, 0].contiguous(), up[:, :, 0].contiguous()
        call = partial(forward, x, norm, norm, up, hidden, down, norm, offsets, 1e-5)
        yield Tuning("mlp_block", f"16 bits, width {d}", (*candidates, None), call)


def compilations(capability: int) -> Iterator[Compilation]:
    """The blocks of small encoders, fused where they are, and their gradients."""
    calls = {}
    for d in (256, 384, 512):
        x = torch.empty(48000, d, dtype=torch.bfloat16, device="meta")
        norm, hidden = x.new_empty(8, d), x.new_empty(8, 4 * d)
        up, down, offsets = x.new_empty(8, 4 * d, d), x.new_empty(8, d, 4 * d), x.new_empty(9, dtype=torch.int32)
        block = (norm, norm, up, hidden, down, norm, offsets, 1e-5)
        calls[f"width {d}"] = partial(forward, x, *block)
    calls[f"gradients of width {d}"] = partial(backward, x, x, *block, True, True)
    yield from recorded(capability, calls)
