"""Plain torch `varlen_stft`."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.reference._rows import numbered


def forward(
    samples: Tensor,
    window: Tensor,
    cu_samples: Tensor,
    cu_frames: Tensor,
    num_frames: int,
    hop: int,
    padded_to: int,
) -> Tensor:
    n, last = window.shape[0], samples.shape[0] - 1
    # Every frame as if it saw its clip alone: whole windows are copied, where an index for every sample would cost
    # several times what the transform does. Those at the ends, few for each clip, are then replaced.
    frame, clip = numbered(cu_frames, num_frames)
    first = torch.sub(cu_samples, cu_frames, alpha=hop).index_select(0, clip).add_(frame, alpha=hop).sub_(n // 2)
    frames = samples.unfold(0, n, 1).index_select(0, first.clamp_(0, last + 1 - n))
    # Counted from the end where below zero; a clip of few frames has some of them twice.
    ends = torch.arange(-n // hop, -(-(n // 2) // hop), dtype=torch.int32, device=samples.device)
    ends = ends.remainder(cu_frames.diff()[:, None])
    position = (ends * hop)[:, :, None] + torch.arange(-(n // 2), n // 2, dtype=torch.int32, device=samples.device)
    starts, lengths = cu_samples[:-1, None, None], cu_samples.diff()[:, None, None]
    turn = lengths.clamp(min=padded_to) - 1
    position = turn - (position.abs_() - turn).abs_()
    values = samples.index_select(0, (position + starts).clamp_(0, last).flatten()).view(position.shape)
    values.masked_fill_(position >= lengths, 0.0)  # the padding, which may be mirrored too
    frames[cu_frames[:-1, None] + ends] = values
    return torch.fft.rfft(frames.mul_(window))
