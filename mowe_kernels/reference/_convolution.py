"""Convolution of one sequence of frames [T, C], for the plain torch ops.

Weights are [N, taps, C / groups]. Output frame u sees input frames u * stride + j - padding for j in 0..taps-1; frames
outside the sequence are zero. Without groups a window is a run of memory and the convolution a matrix product over
windows; with groups it is torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mowe_kernels.reference._rows import add_product

# Elements of unfolded windows held at a time.
UNFOLDED = 1 << 22
# torch prepares its convolution anew for every length it meets, so lengths are rounded up to this many frames.
FRAMES = 64


def convolve_into(
    y: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, *, groups: int = 1, scale: float = 1.0
) -> None:
    """y [U, N] += scale * convolution of x [T, C]."""
    taps, frames = weight.shape[1], y.shape[0]
    if groups > 1:
        padded = _pad(x, padding, _needed(_round_up(frames), taps, stride))
        result = torch.nn.functional.conv2d(_image(padded), _filters(weight), stride=(1, stride), groups=groups)
        y.add_(_frames(result)[:frames], alpha=scale)
        return
    for part, unfolded in _windows(_pad(x, padding, _needed(frames, taps, stride)), frames, taps, stride):
        add_product(y[part], unfolded, weight.flatten(1).T, scale)


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    *,
    groups: int = 1,
    scale: float = 1.0,
    grad_x: Tensor | None = None,
    grad_weight: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Add the gradients of x, weight and scale to those given (None: not wanted)."""
    taps, frames = weight.shape[1], grad.shape[0]
    if groups > 1:
        frames = _round_up(frames)
        grad = torch.nn.functional.pad(grad, (0, 0, 0, frames - grad.shape[0]))
    padded = _pad(x, padding, _needed(frames, taps, stride))
    ...
