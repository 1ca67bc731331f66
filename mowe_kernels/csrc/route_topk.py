"""`route_topk` with the plan compiled; softmax and choice are torch's."""

from __future__ import annotations

from torch import Tensor

from mowe_kernels.csrc import pack_plan
from mowe_kernels.reference.route_topk import backward, choose

__all__ = ["backward", "forward"]


def forward(
    logits: Tensor | None,
    learned_logits: Tensor | None,
    top_k: int,
    top_k_independent: int,
    lengths: Tensor,
    rank: Tensor,
    level_bounds: Tensor,
) -> tuple[Tensor, ...]:
    weights, indices = choose(logits, learned_logits, top_k, top_k_independent, lengths.shape[1])
    return weights, indices, *pack_plan.forward(indices, lengths, rank, level_bounds)
