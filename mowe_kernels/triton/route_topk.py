"""Triton `route_topk`: softmax, top-k and the packing plan in one launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._device import exp
from mowe_kernels.triton._launch import cdiv, check_dtypes, contiguous, launch, next_power_of_2, recorded, setting
from mowe_kernels.triton.pack_plan import empty_plan, meta_layout, pack_pairs, plan_settings


@triton.jit
def _ordered(b_x):
    """int32 that compare as the float32 values do, -0 equal to 0, NaN above everything; its own inverse on the rest."""
    b_bits = tl.where(b_x == 0, 0.0, b_x).to(tl.int32, bitcast=True)
    return tl.where(b_x == b_x, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _choose(
    p_logits, stride, clip, batch, p_weights, p_indices,
    FIRST: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, ENCODERS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Fill the slots FIRST .. FIRST + TOP_K - 1 of these clips from the rows of logits `stride` apart."""
    b_e = tl.arange(0, BLOCK_E)[None, :]
    b_mask = (clip < batch)[:, None] & (b_e < ENCODERS)
    b_x = tl.load(p_logits + clip.to(tl.int64)[:, None] * stride + b_e, mask=b_mask, other=-float("inf")).to(tl.float32)
    # Value above, place from the right below: the largest is the best value and among equals the first.
    b_left = (_ordered(b_x).to(tl.int64) << 32) | (BLOCK_E - 1 - b_e)
    b_left = tl.where(b_e < ENCODERS, b_left, -(1 << 63))
    b_max = tl.max(b_x, 1)
    b_total = tl.sum(exp(b_x - b_max[:, None]), 1)
    for slot in range(FIRST, FIRST + TOP_K):
        b_best = tl.max(b_left, 1)
        b_index = BLOCK_E - 1 - (b_best & 0xFFFFFFFF)
        b_key = (b_best >> 32).to(tl.int32)
        b_value = (b_key ^ ((b_key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(p_weights + clip * SLOTS + slot, tl.div_rn(exp(b_value - b_max), b_total), mask=clip < batch)
        tl.store(p_indices + clip * SLOTS + slot, b_index, mask=clip < batch)
        b_left = tl.where(b_left == b_best[:, None], -(1 << 63), b_left)


# p_weights: float32 [B, SLOTS]. p_indices: int64 [B, SLOTS]. p_logits: float [B, ENCODERS].
# p_learned_logits: float [ENCODERS]. Without logits or without learned logits their pointers are None.
# The rest as in `pack_pairs`. One program.
@triton.jit(do_not_specialize=["batch"])
def route_topk_fwd_kernel(
    p_weights, p_indices, p_logits, p_learned_logits, p_lengths, p_rank, p_level_bounds, p_order, p_position,
    p_encoder, p_cu_seqlens, p_group_offsets, batch,
    TOP_K: tl.constexpr, TOP_K_INDEPENDENT: tl.constexpr, SLOTS: tl.constexpr, ENCODERS: tl.constexpr,
    LEVELS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    for first in range(0, batch, BLOCK_B):
        clip = first + tl.arange(0, BLOCK_B)
        if p_learned_logits is not None:  # the same row for every clip
            _choose(
                p_learned_logits, 0, clip, batch, p_weights, p_indices, 0, TOP_K_INDEPENDENT, SLOTS, ENCODERS, BLOCK_E
            )
        if p_logits is not None:
            _choose(
                p_logits, ENCODERS, clip, batch, p_weights, p_indices, TOP_K_INDEPENDENT, TOP_K, SLOTS, ENCODERS,
                BLOCK_E,
            )  # fmt: skip
    tl.debug_barrier()  # the indices are written
    pack_pairs(
        p_indices, p_lengths, p_rank, p_level_bounds, p_order, p_position, p_encoder, p_cu_seqlens, p_group_offsets,
        batch, SLOTS, ENCODERS, LEVELS, BLOCK_B, BLOCK_E, BLOCK_L, BLOCK_P,
    )  # fmt: skip


@triton.jit
def _through_softmax(b_x, b_grad):
    """Gradient of rows of logits from that of their softmax; columns past the last encoder hold -inf."""
    b_p = exp(b_x - tl.max(b_x, 1)[:, None])
    b_p = tl.div_rn(b_p, tl.sum(b_p, 1)[:, None])
    return b_p * (b_grad - tl.sum(b_p * b_grad, 1)[:, None])


@triton.jit
def _through_learned(
    p_grad_weights, p_indices, p_learned_logits, p_grad_learned, batch,
    TOP_K_INDEPENDENT: tl.constexpr, SLOTS: tl.constexpr, ENCODERS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The gradient of the learned logits. Every clip chose the same, so the softmax is passed once, by the sum."""
    b_e = tl.arange(0, BLOCK_E)[None, :]
    b_grad = tl.zeros([1, BLOCK_E], tl.float32)
    for slot in range(TOP_K_INDEPENDENT):
        b_sum = tl.zeros([BLOCK_B], tl.float32)
        for first in range(0, batch, BLOCK_B):
            clip = first + tl.arange(0, BLOCK_B)
            b_sum += tl.load(p_grad_weights + clip * SLOTS + slot, mask=clip < batch, other=0.0).to(tl.float32)
        index = tl.load(p_indices + slot, mask=batch > 0, other=0)
        b_grad += tl.where(b_e == index, tl.sum(b_sum, 0), 0.0)
    b_x = tl.load(p_learned_logits + b_e, mask=b_e < ENCODERS, other=-float("inf")).to(tl.float32)
    tl.store(p_grad_learned + b_e, _through_softmax(b_x, b_grad), mask=b_e < ENCODERS)


# p_grad_weights: float32 [B, SLOTS]. p_indices: int64 [B, SLOTS]. p_logits, p_grad_logits: float [B, ENCODERS].
# p_learned_logits, p_grad_learned: float [ENCODERS]. Without logits or without learned logits their pointers are None.
# Programs: clip_programs, each for a block of clips, and one for the learned logits.
@triton.jit(do_not_specialize=["batch", "clip_programs"])
def route_topk_bwd_kernel(
    p_grad_weights, p_indices, p_logits, p_learned_logits, p_grad_logits, p_grad_learned, batch, clip_programs,
    TOP_K_INDEPENDENT: tl.constexpr, SLOTS: tl.constexpr, ENCODERS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == clip_programs:
        if p_learned_logits is not None:
            _through_learned(
                p_grad_weights, p_indices, p_learned_logits, p_grad_learned, batch, TOP_K_INDEPENDENT, SLOTS, ENCODERS,
                BLOCK_B, BLOCK_E,
            )  # fmt: skip
    elif p_logits is not None:
        b_e = tl.arange(0, BLOCK_E)[None, :]
        clip = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
        b_grad = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
        for slot in range(TOP_K_INDEPENDENT, SLOTS):
            b_index = tl.load(p_indices + clip * SLOTS + slot, mask=clip < batch, other=-1)
            b_g = tl.load(p_grad_weights + clip * SLOTS + slot, mask=clip < batch, other=0.0).to(tl.float32)
            b_grad += tl.where(b_e == b_index[:, None], b_g[:, None], 0.0)
        b_mask = (clip < batch)[:, None] & (b_e < ENCODERS)
        place = clip.to(tl.int64)[:, None] * ENCODERS + b_e
        b_x = tl.load(p_logits + place, mask=b_mask, other=-float("inf")).to(tl.float32)
        tl.store(p_grad_logits + place, _through_softmax(b_x, b_grad), mask=b_mask)


def forward(
    logits: Tensor | None,
    learned_logits: Tensor | None,
    top_k: int,
    top_k_independent: int,
    lengths: Tensor,
    rank: Tensor,
    level_bounds: Tensor,
) -> tuple[Tensor, ...]:
    check_dtypes("route_topk", logits, learned_logits)
    levels, batch = lengths.shape
    slots = top_k + top_k_independent
    weights = torch.empty(batch, slots, dtype=torch.float32, device=rank.device)
    indices = torch.empty(batch, slots, dtype=torch.int64, device=rank.device)
    plan = empty_plan(batch, slots, levels, rank)
    launch(
        route_topk_fwd_kernel,
        1,
        weights,
        indices,
        *contiguous(logits, learned_logits, lengths, rank, level_bounds),
        *plan,
        batch,
        TOP_K=top_k,
        TOP_K_INDEPENDENT=top_k_independent,
        **plan_settings(slots, rank.shape[0], levels, rank.device),
    )
    return weights, indices, *plan


def backward(
    grad_weights: Tensor, logits: Tensor | None, learned_logits: Tensor | None, indices: Tensor, top_k_independent: int
) -> tuple[Tensor, Tensor]:
    batch, slots = indices.shape
    encoders = (learned_logits if logits is None else logits).shape[-1]
    block_e = next_power_of_2(encoders)
    block_b = max(1, setting("route_block", 1024) // block_e)  # cells (clip, encoder)
    logits, learned_logits = contiguous(logits, learned_logits)
    grads = [None if x is None else torch.empty_like(x) for x in (logits, learned_logits)]
    clip_programs = 0 if logits is None else cdiv(batch, block_b)
    launch(
        route_topk_bwd_kernel, clip_programs + (learned_logits is not None),
        grad_weights.contiguous(), indices, logits, learned_logits, *grads, batch, clip_programs,
        TOP_K_INDEPENDENT=top_k_independent, SLOTS=slots, ENCODERS=encoders, BLOCK_B=block_b, BLOCK_E=block_e,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return tuple(grad_weights.new_empty(0) if grad is None else grad for grad in grads)


def compilations(capability: int) -> Iterator[Compilation]:
    def route(encoders: int, levels: int, independent: int, dependent: int) -> None:
        logits = torch.empty(64, encoders, device="meta") if dependent else None
        learned_logits = torch.empty(encoders, device="meta") if independent else None
        weights, indices, *_ = forward(
            logits, learned_logits, dependent, independent, *meta_layout(64, encoders, levels)
        )
        backward(weights, logits, learned_logits, indices, independent)

    yield from recorded(
        capability,
        {
            "1+1 of 4 encoders, 11 levels": lambda: route(4, 11, 1, 1),
            "2 of 8 encoders, 3 levels": lambda: route(8, 3, 0, 2),
            "2 of 16 encoders, 3 levels": lambda: route(16, 3, 0, 2),
            "4+4 of 128 encoders, 16 levels": lambda: route(128, 16, 4, 4),
            "64+64 of 64 encoders, 3 levels": lambda: route(64, 3, 64, 64),
        },
    )
