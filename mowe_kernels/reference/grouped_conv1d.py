"""Plain torch `grouped_conv1d`: one sequence at a time.

Without groups, a matrix product over its windows; with groups, where windows are not runs of memory, torch's own
convolution.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mowe_kernels.reference._rows import add_product, clear_tail, sums
from mowe_kernels.reference._windows import fold, frames_needed, pad_frames, unpad, windows
from mowe_kernels.reference.grouped_linear import activate_into, linear_into

# torch prepares a convolution for every length it meets: lengths are rounded up to this many frames.
_FRAMES = 64


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    encoder: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor | None,
    residual: Tensor | None,
    num_rows: int,
    stride: int,
    padding: int,
    groups: int,
    activation: str,
    save_pre: bool,
) -> tuple[Tensor, Tensor]:
    n, taps = weight.shape[1:3]
    out = x.new_empty(num_rows, n)
    pre = torch.empty_like(out) if save_pre else x.new_empty(0)
    for e, source, rows in sequences(starts, lengths, encoder, cu_seqlens):
        own_bias = None if bias is None else bias[e]
        frames_out = rows.stop - rows.start
        if groups > 1:
            image = _image(pad_frames(x[source], padding, frames_needed(_round_up(frames_out), taps, stride)))
            y = torch.nn.functional.conv2d(image, _filters(weight[e]), own_bias, (1, stride), groups=groups)
            parts = [(slice(0, frames_out), _frames(y)[:frames_out])]
        else:
            padded = pad_frames(x[source], padding, frames_needed(frames_out, taps, stride))
            parts = windows(padded, frames_out, taps, stride)
        for part, values in parts:
            at = slice(rows.start + part.start, rows.start + part.stop)
            y = (pre if save_pre else out)[at]
            if groups > 1:
                y.copy_(values)
            else:
                linear_into(y, values, weight[e].flatten(1), own_bias)
            activate_into(out[at], y, activation)
            if positions is not None:
                out[at].add_(positions[e, part])
            if residual is not None:
                out[at].add_(residual[at])
    clear_tail(out, cu_seqlens)
    return out, clear_tail(pre, cu_seqlens) if save_pre else pre
