"""The two routers: one learned choice for every clip, one choice made from the clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mowe.configuration_mowe import MoweConfig
from mowe.losses import RouterLogits
from mowe_kernels import PackLayout, PackPlan, route_topk
from mowe_kernels.plan import device_lengths


@dataclass(frozen=True)
class Routing:
    """weights: float32 [B, k], what scales each slot's features. indices: int64 [B, k], encoder of each slot.
    plan: how the pairs lie in memory. logits: what the choice was made from, noise and temperature included.
    """

    weights: Tensor
    indices: Tensor
    plan: PackPlan
    logits: RouterLogits


class MoweRouter(nn.Module):
    """Chooses encoders for each clip: data-independent slots first, then data-dependent ones.

    The paper names the two routers and gives no equations. Our choices: the independent router is a learned logit per
    encoder; the dependent one a linear map of the mean base frame; both softmax over the pool, and the weight of a
    slot is its encoder's probability. See MoweConfig for temperature, noise, straight-through and scaling.
    """

    def __init__(self, config: MoweConfig, base_width: int, num_encoders: int):
        super().__init__()
        self.config = config
        self.independent_logits = None
        if config.num_independent_slots:
            self.independent_logits = nn.Parameter(torch.zeros(num_encoders))
        self.dependent = nn.Linear(base_width, num_encoders, bias=False) if config.num_dependent_slots else None

    def reset_parameters(self) -> None:
        if self.independent_logits is not None:
            nn.init.zeros_(self.independent_logits)

    def forward(self, summary: Tensor, lengths: Sequence[Sequence[int]], layout: PackLayout) -> Routing:
        """summary: [B, D], mean base frame of each clip, of any dtype: the choice is made in float32. lengths: [L][B],
        frames of each clip at each level of each family. layout: the pool's, on the device of the summary.
        """
        dependent = None
        if self.dependent is not None:
            dependent = torch.nn.functional.linear(summary.float(), self.dependent.weight.float())
            dependent = self._perturb(dependent)
        independent = None
        if self.independent_logits is not None:
            independent = self._perturb(self.independent_logits.float())
        weights, indices, tensors = route_topk(
            dependent,
            independent,
            top_k=self.config.num_dependent_slots,
            top_k_independent=self.config.num_independent_slots,
            lengths=device_lengths(lengths, summary.device),
            rank=layout.rank,
            level_bounds=layout.level_bounds,
        )
        plan = PackPlan(*tensors, tuple(map(tuple, lengths)), layout)
        return Routing(self._weigh(weights), indices, plan, RouterLogits(dependent, independent))

    def _perturb(self, logits: Tensor) -> Tensor:
        logits = logits / self.config.router_temperature
        if self.training and self.config.router_noise:
            logits = logits + torch.randn_like(logits) * self.config.router_noise
        return logits

    def _weigh(self, weights: Tensor) -> Tensor:
        if not self.config.scale_by_weight:
            return torch.ones_like(weights)
        if self.config.router_straight_through:
            return 1.0 + (weights - weights.detach())  # in this order it is exactly 1
        return weights
