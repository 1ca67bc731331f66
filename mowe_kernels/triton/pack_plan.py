"""Triton `pack_plan`: a counting sort of the pairs and their row offsets, in one launch of one program.

The routing of a batch is small and every step needs the totals of the step before, so one program does it all:
what a step hands to the next through memory is read after a barrier of that program.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._launch import contiguous, hardware, launch, next_power_of_2, recorded, setting


@triton.jit
def _key(p_indices, p_rank, pair, mask, ENCODERS: tl.constexpr):
    """Rank of the encoder of each pair, -1 in an unused slot and where there is no such encoder."""
    b_index = tl.load(p_indices + pair, mask=mask, other=-1)
    return tl.load(p_rank + b_index, mask=(b_index >= 0) & (b_index < ENCODERS), other=-1)


@triton.jit
def _chosen(
    p_indices, p_rank, clip, batch, b_e,
    SLOTS: tl.constexpr, ENCODERS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Whether each clip uses the encoder of each rank, 0 or 1: [BLOCK_B, BLOCK_E]."""
    b_chosen = tl.zeros([BLOCK_B, BLOCK_E], tl.int32)
    for slot in range(SLOTS):
        b_key = _key(p_indices, p_rank, clip * SLOTS + slot, clip < batch, ENCODERS)
        b_chosen = b_chosen | (b_key[:, None] == b_e[None, :]).to(tl.int32)
    return b_chosen


# p_indices: integer [B, SLOTS]. p_lengths: int32 [LEVELS, B]. p_rank: int32 [E]. p_level_bounds: int32 [LEVELS, 2].
# p_order, p_encoder: int32 [B * SLOTS]. p_position: int32 [B, SLOTS]. p_cu_seqlens: int32 [LEVELS, B * SLOTS + 1].
# p_group_offsets: int32 [LEVELS, E + 1].
@triton.jit
def pack_pairs(
    p_indices, p_lengths, p_rank, p_level_bounds, p_order, p_position, p_encoder, p_cu_seqlens, p_group_offsets, batch,
    SLOTS: tl.constexpr, ENCODERS: tl.constexpr, LEVELS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Everything `pack_plan` computes, by one program."""
    b_e = tl.arange(0, BLOCK_E)
    b_count = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, batch, BLOCK_B):
        clip = first + tl.arange(0, BLOCK_B)
        b_count += tl.sum(_chosen(p_indices, p_rank, clip, batch, b_e, SLOTS, ENCODERS, BLOCK_B, BLOCK_E), 0)

    # A clip has at most one pair with an encoder, so the place of a pair is the number of pairs of earlier encoders
    # and of earlier clips with the same encoder. Pairs without rows follow in the order of their slots.
    b_first_pair = tl.cumsum(b_count, 0) - b_count
    present = tl.sum(b_count, 0)
    b_next, next_absent = b_first_pair, present
    for first in range(0, batch, BLOCK_B):
        clip = first + tl.arange(0, BLOCK_B)
        b_chosen = _chosen(p_indices, p_rank, clip, batch, b_e, SLOTS, ENCODERS, BLOCK_B, BLOCK_E)
        b_place = b_next[None, :] + tl.cumsum(b_chosen, 0) - b_chosen
        b_next += tl.sum(b_chosen, 0)
        b_absent = tl.where(clip < batch, SLOTS - tl.sum(b_chosen, 1), 0)
        b_next_absent = next_absent + tl.cumsum(b_absent, 0) - b_absent
        next_absent += tl.sum(b_absent, 0)
        b_unused = tl.full([BLOCK_B], -1, tl.int32)  # the pair all unused slots of a clip share: the first of them
        for slot in range(SLOTS):
            pair = clip * SLOTS + slot
            b_key = _key(p_indices, p_rank, pair, clip < batch, ENCODERS)
            b_used = b_key >= 0
            b_present = b_used
            for earlier in range(slot):
                b_earlier = _key(p_indices, p_rank, clip * SLOTS + earlier, clip < batch, ENCODERS)
                b_present = b_present & (b_earlier != b_key)
            b_shared = tl.sum(tl.where(b_key[:, None] == b_e[None, :], b_place, 0), 1)
            b_own = tl.where(b_present, b_shared, b_next_absent)
            b_unused = tl.where(b_used | (b_unused >= 0), b_unused, b_next_absent)
            b_next_absent += tl.where(b_present, 0, 1)
            tl.store(p_order + b_own, pair, mask=clip < batch)
            tl.store(p_encoder + b_own, tl.where(b_present, b_key, ENCODERS), mask=clip < batch)
            tl.store(p_position + pair, tl.where(b_used, b_shared, b_unused), mask=clip < batch)

    tl.debug_barrier()  # order and encoder are written
    pairs = batch * SLOTS
    for first_level in tl.static_range(0, LEVELS, BLOCK_L):
        level = first_level + tl.arange(0, BLOCK_L)
        has_level = level < LEVELS
        b_low = tl.load(p_level_bounds + 2 * level, mask=has_level, other=0)
        b_high = tl.load(p_level_bounds + 2 * level + 1, mask=has_level, other=0)
        p_starts = p_cu_seqlens + level.to(tl.int64) * (pairs + 1)
        b_rows = tl.zeros([BLOCK_L], tl.int32)
        tl.store(p_starts, b_rows, mask=has_level)
        for first in range(0, pairs, BLOCK_P):
            pair = first + tl.arange(0, BLOCK_P)
            b_clip = tl.load(p_order + pair, mask=pair < pairs, other=0) // SLOTS
            b_key = tl.load(p_encoder + pair, mask=pair < pairs, other=ENCODERS)
            b_present = (b_key[None, :] >= b_low[:, None]) & (b_key[None, :] < b_high[:, None])
            p_length = p_lengths + level.to(tl.int64)[:, None] * batch + b_clip[None, :]
            b_length = tl.load(p_length, mask=b_present, other=0)
            b_end = b_rows[:, None] + tl.cumsum(b_length, 1)
            b_rows += tl.sum(b_length, 1)
            tl.store(p_starts[:, None] + pair[None, :] + 1, b_end, mask=has_level[:, None] & (pair < pairs)[None, :])
        tl.debug_barrier()  # so are the starts
        p_offset = p_group_offsets + level * (ENCODERS + 1)
        b_mask = has_level[:, None] & (b_e < ENCODERS)[None, :]
        b_offset = tl.load(p_starts[:, None] + b_first_pair[None, :], mask=b_mask)
        tl.store(p_offset[:, None] + b_e[None, :], b_offset, mask=b_mask)
        tl.store(p_offset + ENCODERS, tl.load(p_starts + present, mask=has_level), mask=has_level)


# Pointers as in `pack_pairs`.
@triton.jit(do_not_specialize=["batch"])
def pack_plan_fwd_kernel(
    p_indices, p_lengths, p_rank, p_level_bounds, p_order, p_position, p_encoder, p_cu_seqlens, p_group_offsets, batch,
    SLOTS: tl.constexpr, ENCODERS: tl.constexpr, LEVELS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    pack_pairs(
        p_indices, p_lengths, p_rank, p_level_bounds, p_order, p_position, p_encoder, p_cu_seqlens, p_group_offsets,
        batch, SLOTS, ENCODERS, LEVELS, BLOCK_B, BLOCK_E, BLOCK_L, BLOCK_P,
    )  # fmt: skip


def forward(
    indices: Tensor, lengths: Tensor, rank: Tensor, level_bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, slots = indices.shape
    plan = empty_plan(batch, slots, lengths.shape[0], rank)
    inputs = contiguous(indices, lengths, rank, level_bounds)
    settings = plan_settings(slots, rank.shape[0], lengths.shape[0], rank.device)
    launch(pack_plan_fwd_kernel, 1, *inputs, *plan, batch, **settings)
    return plan


def empty_plan(batch: int, slots: int, levels: int, rank: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for order, position, encoder, cu_seqlens and group_offsets, beside `rank`."""
    pairs, encoders = batch * slots, rank.shape[0]
    shapes = ((pairs,), (batch, slots), (pairs,), (levels, pairs + 1), (levels, encoders + 1))
    return tuple(torch.empty(shape, dtype=torch.int32, device=rank.device) for shape in shapes)


def plan_settings(slots: int, encoders: int, levels: int, device: torch.device) -> dict[str, int]:
    """The constants of a launch of `pack_pairs`: nothing in them depends on the batch."""
    block_e, block_l = next_power_of_2(encoders), min(16, next_power_of_2(levels))
    # ptxas gives these two kernels few registers: so many cells to a warp that it spills none.
    cells, warps = (4096, 8) if block_e > 32 else (2048, 8) if hardware(device).capability >= 100 else (1024, 4)
    block = setting("pack_block", cells)  # cells (clip, encoder), and (level, pair)
    return {
        "SLOTS": slots,
        "ENCODERS": encoders,
        "LEVELS": levels,
        "BLOCK_B": max(1, block // block_e),
        "BLOCK_E": block_e,
        "BLOCK_L": block_l,
        "BLOCK_P": min(256, max(1, block // block_l)),
        "num_warps": warps,
        "num_stages": 1,  # a load moved ahead of the barrier it waits for would read what is not there yet
    }


def meta_layout(batch: int, encoders: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """lengths, rank and level_bounds without contents."""
    shapes = ((levels, batch), (encoders,), (levels, 2))
    return tuple(torch.empty(shape, dtype=torch.int32, device="meta") for shape in shapes)


def compilations(capability: int) -> Iterator[Compilation]:
    def pack(slots: int, encoders: int, levels: int) -> None:
        indices = torch.empty(64, slots, dtype=torch.int32, device="meta")
        forward(indices, *meta_layout(64, encoders, levels))

    yield from recorded(
        capability,
        {
            "2 slots, 4 encoders, 11 levels": lambda: pack(2, 4, 11),
            "2 slots, 8 encoders, 3 levels": lambda: pack(2, 8, 3),
            "8 slots, 128 encoders, 16 levels": lambda: pack(8, 128, 16),
        },
    )
