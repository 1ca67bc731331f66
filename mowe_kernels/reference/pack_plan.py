"""Plain torch `pack_plan`."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    indices: Tensor, lengths: Tensor, rank: Tensor, level_bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, slots = indices.shape
    encoders = rank.numel()
    key = torch.where(indices >= 0, rank[indices.clamp(min=0).long()], encoders)  # [B, k]
    first = (key[:, :, None] == key[:, None, :]).int().argmax(-1)  # first slot of the clip with the same encoder
    repeated = first != torch.arange(slots, device=key.device)
    key = key.masked_fill(repeated, encoders).flatten()  # [P]

    encoder, order = key.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    position = place.view(batch, slots).gather(1, first)

    present = (encoder >= level_bounds[:, :1]) & (encoder < level_bounds[:, 1:])  # [L, P]
    seqlens = lengths[:, order // slots] * present
    cu_seqlens = torch.nn.functional.pad(seqlens.cumsum(1), (1, 0)).int()
    first_pair = torch.searchsorted(encoder, torch.arange(encoders + 1, device=encoder.device, dtype=encoder.dtype))
    return order.int(), position.int(), encoder.int(), cu_seqlens, cu_seqlens[:, first_pair].contiguous()
