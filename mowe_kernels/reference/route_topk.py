"""Plain torch `route_topk`."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.dtypes import accumulation_dtype
from mowe_kernels.reference import pack_plan


def choose(
    logits: Tensor | None, learned_logits: Tensor | None, top_k: int, top_k_independent: int, batch: int
) -> tuple[Tensor, Tensor]:
    """Weights and indices [B, k] of the chosen encoders, those of the learned logits first."""
    choices = []
    if learned_logits is not None:
        weights, indices = _largest(learned_logits, top_k_independent)
        choices.append((weights.expand(batch, -1), indices.expand(batch, -1)))
    if logits is not None:
        choices.append(_largest(logits, top_k))
    weights, indices = zip(*choices, strict=True)
    return torch.cat(weights, dim=1), torch.cat(indices, dim=1)


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Probabilities and indices of the k largest of each row, ties to the lower index."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return logits.softmax(-1, dtype=accumulation_dtype(logits.dtype)).gather(-1, order), order


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


def backward(
    grad_weights: Tensor, logits: Tensor | None, learned_logits: Tensor | None, indices: Tensor, top_k_independent: int
) -> tuple[Tensor, Tensor]:
    def through_softmax(x: Tensor | None, grad: Tensor, chosen: Tensor) -> Tensor:
        if x is None:
            return grad_weights.new_empty(0)
        probabilities = x.softmax(-1, dtype=accumulation_dtype(x.dtype))
        scattered = torch.zeros_like(probabilities.expand(chosen.shape[0], -1)).scatter_(1, chosen, grad)
        grad_logits = probabilities * (scattered - (probabilities * scattered).sum(-1, keepdim=True))
        return (grad_logits if x.dim() == 2 else grad_logits.sum(0)).to(x.dtype)

    independent, dependent = slice(0, top_k_independent), slice(top_k_independent, None)
    return (
        through_softmax(logits, grad_weights[:, dependent], indices[:, dependent]),
        through_softmax(learned_logits, grad_weights[:, independent], indices[:, independent]),
    )
