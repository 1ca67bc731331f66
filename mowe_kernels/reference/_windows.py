"""Convolution as matrix products over windows of consecutive frames, for the plain torch ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of unfolded windows held at a time.
_UNFOLDED = 1 << 22


def pad_frames(x: Tensor, padding: int, needed: int) -> Tensor:
    """x [T, C] with zero frames before it and, up to `needed` frames in all, after it; surplus frames are cut."""
    after = needed - padding - x.shape[0]
    if padding == 0 and after <= 0:
        return x[:needed]
    return torch.nn.functional.pad(x, (0, 0, padding, after))


def frames_needed(frames_out: int, taps: int, stride: int) -> int:
    return (frames_out - 1) * stride + taps


def windows(x: Tensor, frames_out: int, taps: int, stride: int, groups: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (output frames, their windows [groups, frames, taps * C / groups]) of padded frames x [T, C].

    Without groups a window is a run of memory, so the unfolded matrix is a view until the product reads it.
    """
    channels = x.shape[1]
    size = max(64, _UNFOLDED // (taps * channels))
    for start in range(0, frames_out, size):
        frames = min(size, frames_out - start)
        part = x[start * stride :]
        if groups == 1:
            part = part.contiguous()
            yield slice(start, start + frames), part.as_strided((1, frames, taps * channels), (0, stride * channels, 1))
        else:
            unfolded = part.unfold(0, taps, stride)[:frames]  # [frames, C, taps]
            unfolded = unfolded.view(frames, groups, channels // groups, taps).permute(1, 0, 3, 2)
            yield slice(start, start + frames), unfolded.reshape(groups, frames, -1)


def fold(grad_x: Tensor, grad_windows: Tensor, start: int, taps: int, stride: int) -> None:
    """Add window gradients [groups, frames, taps * C / groups] to the padded frames [T, C] they were read from."""
    groups, frames, _ = grad_windows.shape
    by_tap = grad_windows.view(groups, frames, taps, -1).permute(2, 1, 0, 3).reshape(taps, frames, -1)
    for tap in range(taps):
        first = start * stride + tap
        grad_x[first : first + (frames - 1) * stride + 1 : stride] += by_tap[tap]


def unpad(padded: Tensor, padding: int, frames: int) -> Tensor:
    """The frames of a sequence within its padded form, which may have cut some off."""
    return padded[padding : padding + frames]
