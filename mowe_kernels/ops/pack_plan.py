"""`mowe::pack_plan`: sort the (clip, slot) pairs of a batch by encoder and lay out their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.ops._op import Op, check, check_shape

Plan = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def plan_shapes(like: Tensor, batch: int, slots: int, levels: int, encoders: int) -> Plan:
    """Empty results of a plan, for the fakes of this op and of route_topk."""
    pairs = batch * slots
    shapes = ((pairs,), (batch, slots), (pairs,), (levels, pairs + 1), (levels, encoders + 1))
    return tuple(like.new_empty(shape, dtype=torch.int32) for shape in shapes)


def check_layout(op: str, lengths: Tensor, rank: Tensor, level_bounds: Tensor, batch: int) -> None:
    check_shape(op, "lengths", lengths, (None, batch), "frames of each clip per level [L, B]")
    check_shape(op, "rank", rank, (None,), "place of each encoder [E]")
    check_shape(op, "level_bounds", level_bounds, (lengths.shape[0], 2), "ranks of each level's family [L, 2]")
    for name, tensor in (("lengths", lengths), ("rank", rank), ("level_bounds", level_bounds)):
        check(tensor.dtype == torch.int32, op, f"{name} must be int32, got {tensor.dtype}")


def _fake(indices: Tensor, lengths: Tensor, rank: Tensor, level_bounds: Tensor) -> Plan:
    return plan_shapes(lengths, *indices.shape, lengths.shape[0], rank.shape[0])


_op = Op(
    "pack_plan",
    "(Tensor indices, Tensor lengths, Tensor rank, Tensor level_bounds) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    module="pack_plan",
    function="forward",
)


def pack_plan(indices: Tensor, lengths: Tensor, rank: Tensor, level_bounds: Tensor) -> Plan:
    """Counting sort of the pairs by encoder, with the row offsets of every pair and every encoder at every level.

    indices: integer [B, k], encoder of each slot, -1 for an unused slot. lengths: int32 [L, B], frames of each clip.
    rank: int32 [E], sorting key of each encoder, a permutation of 0..E-1. level_bounds: int32 [L, 2], ranks that have
    rows at a level (a pair of another family has none there).
    Returns order [P], position [B, k], encoder [P], cu_seqlens [L, P+1], group_offsets [L, E+1], all int32, as
    described by `PackPlan`. Raises ValueError for shapes that do not fit.
    """
    check_shape("pack_plan", "indices", indices, (None, None), "encoder of each slot [B, k]")
    check(not indices.dtype.is_floating_point, "pack_plan", f"indices must be integers, got {indices.dtype}")
    check_layout("pack_plan", lengths, rank, level_bounds, indices.shape[0])
    return _op(indices, lengths, rank, level_bounds)
