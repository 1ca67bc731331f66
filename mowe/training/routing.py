"""What the routers do while they learn: entropies, loss terms, and how often each task goes to each encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mowe.losses import router_loss_terms
from mowe.modeling_mowe import MoweForConditionalGeneration
from mowe.router import Routing

KINDS = ("independent", "dependent")


class RoutingMeter:
    """Sums over the windows of audio that pass the routers in training, on their device and without waiting for it.

    tasks: their names. `task_ids`, int64 [windows], says whose windows come next; None: they do not count.
    counts: what `read` summed up last, [tasks, kinds of slot, encoders].
    """

    def __init__(self, model: MoweForConditionalGeneration, tasks: Sequence[str]):
        config, mixture = model.config, model.model.mixture
        self.tasks = tasks
        self.task_ids: Tensor | None = None
        self.counts: list[list[list[float]]] = []
        self._independent_slots = config.num_independent_slots
        self._names = dict.fromkeys((*(f"{kind}_entropy" for kind in KINDS), *config.router_losses), 1.0)
        self._used = torch.zeros(len(tasks), len(KINDS), mixture.pool.num_encoders)
        self._terms: dict[str, Tensor] = {}
        self._windows = torch.zeros(())
        self._hook = mixture.router.register_forward_hook(self._hear)

    def remove(self) -> None:
        """Stop listening."""
        self._hook.remove()

    @torch.no_grad()
    def _hear(self, router: Any, inputs: Any, routing: Routing) -> None:
        if self.task_ids is None:
            return
        windows, slots = routing.indices.shape
        self._used, self._windows = (sums.to(routing.indices.device) for sums in (self._used, self._windows))
        kinds = (torch.arange(slots, device=self._used.device) >= self._independent_slots).long()
        places = (self.task_ids[:, None].expand(windows, slots), kinds.expand(windows, slots), routing.indices)
        self._used.index_put_(places, self._used.new_ones(()), accumulate=True)
        for name, term in router_loss_terms(routing.logits, self._names).items():
            self._terms[name] = self._terms.get(name, 0.0) + term * windows
        self._windows += windows

    def read(self, accelerator: Any) -> dict[str, float]:
        """Means since the last time, over all processes: entries for the log."""
        terms = torch.stack([self._windows, *self._terms.values()])
        terms, used = (accelerator.reduce(sums, "sum") for sums in (terms, self._used))
        windows, *sums = terms.tolist()
        self.counts = used.tolist()
        logs = {f"router/{name}": total / max(windows, 1) for name, total in zip(self._terms, sums, strict=True)}
        for kind, shares in zip(KINDS, (used.sum(0) / used.sum((0, 2))[:, None]).tolist(), strict=True):
            logs |= {f"router/{kind}_usage/{e}": share for e, share in enumerate(shares) if share == share}
        self._used.zero_()
        self._windows.zero_()
        self._terms = {name: torch.zeros_like(term) for name, term in self._terms.items()}
        return logs
