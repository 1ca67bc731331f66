"""Convolution of one sequence of frames as matrix products over its windows, for the plain torch ops.

Frames x are [T, C], weights [N, taps, C]. Output frame u sees frames u * stride + j - padding for j in 0..taps-1;
frames outside the sequence are zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mowe_kernels.reference._linear import add_linear
from mowe_kernels.reference._rows import CHUNK, add_product

# Elements of unfolded windows held at a time.
UNFOLDED = 1 << 22


def convolve_into(y: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, scale: float = 1.0) -> None:
    """y [U, N] += scale * the convolution."""
    taps = weight.shape[1]
    for part, unfolded in windows(pad_frames(x, padding, y.shape[0], taps, stride), y.shape[0], taps, stride):
        add_linear(y[part], unfolded, weight.flatten(1), scale)


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    scale: float = 1.0,
    *,
    need_x: bool,
    grad_weight: Tensor | None,
    grad_scale: Tensor | None = None,
) -> Tensor | None:
    """Gradient of x, if needed; those of weight and scale are added to grad_weight and grad_scale, where given."""
    frames, taps, matrix = grad.shape[0], weight.shape[1], weight.flatten(1)
    padded = pad_frames(x, padding, frames, taps, stride)
    grad_padded = torch.zeros_like(padded) if need_x else None
    for part, unfolded in windows(padded, frames, taps, stride):
        if grad_weight is not None:
            add_product(grad_weight.view(matrix.shape), grad[part].T, unfolded, scale)
        if not need_x and grad_scale is None:
            continue
        grad_windows = grad[part] @ matrix
        if grad_scale is not None:
            grad_scale += (grad_windows * unfolded).sum(dtype=grad_scale.dtype)
        if need_x:
            _fold(grad_padded, grad_windows, part.start, taps, stride)
    return unpad_frames(grad_padded, padding, x.shape[0]) * scale if need_x else None


def pad_frames(x: Tensor, padding: int, frames_out: int, taps: int, stride: int) -> Tensor:
    """The frames that `frames_out` windows see, contiguous: zeros before x and after it, surplus frames cut."""
    needed = (frames_out - 1) * stride + taps
    x = x[: max(needed - padding, 0)]
    after = max(needed - padding - x.shape[0], 0)
    if padding or after:
        x = torch.nn.functional.pad(x, (0, 0, padding, after))
    return x[:needed].contiguous()


def unpad_frames(padded: Tensor, padding: int, frames: int) -> Tensor:
    """Transpose of `pad_frames`: frames that no window sees get zero."""
    seen = padded[padding : padding + frames]
    return torch.nn.functional.pad(seen, (0, 0, 0, frames - seen.shape[0]))


def windows(padded: Tensor, frames_out: int, taps: int, stride: int) -> Iterator[tuple[slice, Tensor]]:
    """(output frames, their windows [frames, taps * C]).

    A window is a run of memory, so the unfolded matrix is a view until the product reads it.
    """
    channels = padded.shape[1]
    size = max(1, min(CHUNK, UNFOLDED // (taps * channels)))
    for start in range(0, frames_out, size):
        frames = min(size, frames_out - start)
        unfolded = padded[start * stride :].as_strided((frames, taps * channels), (stride * channels, 1))
        yield slice(start, start + frames), unfolded


def _fold(grad_padded: Tensor, grad_windows: Tensor, start: int, taps: int, stride: int) -> None:
    """Add window gradients [frames, taps * C] to the frames they were read from."""
    frames = grad_windows.shape[0]
    by_tap = grad_windows.view(frames, taps, -1)
    for tap in range(taps):
        first = start * stride + tap
        grad_padded[first : first + (frames - 1) * stride + 1 : stride] += by_tap[:, tap]
