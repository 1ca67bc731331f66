"""Plain torch `grouped_conv1d`: one sequence at a time, a matrix product over its windows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mowe_kernels.reference._rows import clear_tail, sums
from mowe_kernels.reference._windows import fold, frames_needed, pad_frames, unpad, windows
from mowe_kernels.reference.grouped_linear import activate_into


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
    encoders, n, taps, _ = weight.shape
    matrices = _matrices(weight, groups)  # [E, groups, N / groups, taps * C / groups]
    out = x.new_empty(num_rows, n)
    pre = torch.empty_like(out) if save_pre else x.new_empty(0)
    for e, source, rows in sequences(starts, lengths, encoder, cu_seqlens):
        frames_out = rows.stop - rows.start
        padded = pad_frames(x[source], padding, frames_needed(frames_out, taps, stride))
        for part, unfolded in windows(padded, frames_out, taps, stride, groups):
            at = slice(rows.start + part.start, rows.start + part.stop)
            y = (pre if save_pre else out)[at]
            if groups == 1:
                torch.mm(unfolded[0], matrices[e, 0].T, out=y)
            else:
                y.view(-1, groups, n // groups).copy_(torch.bmm(unfolded, matrices[e].mT).transpose(0, 1))
            if bias is not None:
                y.add_(bias[e])
            activate_into(out[at], y, activation)
            if positions is not None:
                out[at].add_(positions[e, part])
            if residual is not None:
                out[at].add_(residual[at])
    clear_tail(out, cu_seqlens)
    return out, clear_tail(pre, cu_seqlens) if save_pre else pre


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    starts: Tensor,
    lengths: Tensor,
    encoder: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor | None,
    pre: Tensor,
    stride: int,
    padding: int,
    groups: int,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_positions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, taps = weight.shape[1:3]
    matrices = _matrices(weight, groups)
    grad_x = sums(x, need_x)
    grad_matrices = sums(matrices, need_weight)
    grad_bias = sums(weight[:, :, 0, 0], need_bias)
    grad_positions = sums(positions, True) if need_positions else x.new_empty(0)
    for e, source, rows in sequences(starts, lengths, encoder, cu_seqlens):
        frames_out = rows.stop - rows.start
        g = grad[rows]
        if need_positions:
            grad_positions[e, :frames_out] += g
        if activation == "gelu":
            g = torch.ops.aten.gelu_backward(g, pre[rows])
        if need_bias:
            grad_bias[e] += g.sum(0)
        if not (need_x or need_weight):
            continue
        padded = pad_frames(x[source], padding, frames_needed(frames_out, taps, stride))
        grad_padded = torch.zeros_like(padded) if need_x else nothing
        for part, unfolded in windows(padded, frames_out, taps, stride, groups):
            by_group = g[part].reshape(-1, groups, n // groups).transpose(0, 1)  # [groups, frames, N / groups]
            if need_weight:
                grad_matrices[e] += by_group.mT @ unfolded
            if need_x:
                fold(grad_padded, by_group @ matrices[e], part.start, taps, stride)
        if need_x:
            kept = unpad(grad_padded, padding, source.stop - source.start)
            grad_x[source.start : source.start + kept.shape[0]] += kept
    return grad_x, grad_matrices.view(weight.shape) if need_weight else nothing, grad_bias, grad_positions


def sequences(
    starts: Tensor, lengths: Tensor, encoder: Tensor, cu_seqlens: Tensor
) -> Iterator[tuple[int, slice, slice]]:
    """(encoder, input frames, output rows) of each sequence that has any."""
    bounds = cu_seqlens.tolist()
    for e, start, length, first, last in zip(
        encoder.tolist(), starts.tolist(), lengths.tolist(), bounds, bounds[1:], strict=False
    ):
        if first < last:
            yield e, slice(start, start + length), slice(first, last)


def _matrices(weight: Tensor, groups: int) -> Tensor:
    encoders, n, taps, channels = weight.shape
    return weight.reshape(encoders, groups, n // groups, taps * channels)
