"""The terms of L_MoWE.

The paper adds 0.1 * L_MoWE to the next-token loss, which "encourages selective encoder usage"; its terms are not
given. Each term here is our choice; the preset `paper` (configuration_mowe.PAPER_ROUTER_LOSSES) is
0.1 * (H(DI) + mean H(DD) - H(mean DD)): every router sharp, the batch as a whole spread over the pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterLogits:
    """What the routers said for a batch: `dependent` [B, E] and `independent` [E], None for a router without slots."""

    dependent: Tensor | None
    independent: Tensor | None


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the softmax over the last dimension, float32."""
    return _entropy(logits.log_softmax(-1, dtype=torch.float32))


def _entropy(log_p: Tensor) -> Tensor:
    # From logarithms: the gradient stays finite where a probability underflows to zero.
    return -(log_p.exp() * log_p).sum(-1)


def _diversity(logits: Tensor) -> Tensor:
    """Minus the entropy of the batch's mean choice; smallest when the clips spread over all encoders."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    return -_entropy(log_p.logsumexp(0) - math.log(len(logits)))


def _load_balance(logits: Tensor) -> Tensor:
    """Switch Transformer (2101.03961, eq. 4): E * sum over e of (share of clips that rank e first) * (mean p_e)."""
    probabilities = logits.softmax(-1, dtype=torch.float32)
    first = torch.nn.functional.one_hot(probabilities.argmax(-1), logits.shape[-1]).float().mean(0)
    return logits.shape[-1] * (first * probabilities.mean(0)).sum()


def _z_loss(logits: Tensor) -> Tensor:
    """ST-MoE (2202.08906, eq. 5): mean squared log-partition, which keeps the logits small."""
    return logits.float().logsumexp(-1).square().mean()


_DEPENDENT: dict[str, Callable[[Tensor], Tensor]] = {
    "dependent_entropy": lambda logits: entropy(logits).mean(),
    "diversity": _diversity,
    "load_balance": _load_balance,
    "z_loss": _z_loss,
}


def router_loss_terms(logits: RouterLogits, names: Mapping[str, float]) -> dict[str, Tensor]:
    """The named terms, before their coefficients. Terms of a router that has no slots are left out."""
    terms = {}
    for name in names:
        if name == "independent_entropy":
            if logits.independent is not None:
                terms[name] = entropy(logits.independent)
        elif logits.dependent is not None:
            terms[name] = _DEPENDENT[name](logits.dependent)
    return terms


def router_loss(logits: RouterLogits, coefficients: Mapping[str, float]) -> Tensor | None:
    """Sum of coefficient * term, a float32 scalar; None where no term applies."""
    terms = router_loss_terms(logits, coefficients)
    return torch.stack([coefficients[name] * term for name, term in terms.items()]).sum() if terms else None


def loss_share(labels: Tensor, num_items: Tensor | int | None) -> Tensor | float:
    """Weight of this batch's auxiliary loss under gradient accumulation: its share of the predicted tokens.

    The next-token loss is a sum over tokens divided by num_items_in_batch, the tokens of all accumulated batches;
    weighting by the share makes the auxiliary loss their token-weighted mean instead of their sum. (Diversity and load
    balance look at a batch as a whole: accumulated, they stay those of the parts.)
    """
    return 1.0 if num_items is None else (labels[:, 1:] != -100).sum() / num_items
