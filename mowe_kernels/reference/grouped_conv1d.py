"""Plain torch `grouped_conv1d`: one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mowe_kernels.reference._convolution import convolve_backward, pad_frames, unpad_frames, windows
from mowe_kernels.reference._linear import activate, linear
from mowe_kernels.reference._rows import assemble, at, clear_tail, sums

# torch prepares its convolution anew for every length it meets, so lengths are rounded up to this many frames.
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
    pre = x.new_empty((num_rows, weight.shape[1]) if save_pre else 0)
    fused = "" if save_pre else activation

    def pieces() -> Iterator[tuple[slice, Tensor]]:
        for e, source, rows in sequences(starts, lengths, encoder, cu_seqlens):
            filters, frames = (weight[e], at(bias, e)), rows.stop - rows.start
            for part, y in _convolve(x[source], *filters, frames, stride, padding, groups, fused):
                here = slice(rows.start + part.start, rows.start + part.stop)
                if save_pre:
                    pre[here] = y
                    y = activate(y, activation)
                if positions is not None:
                    y = y.add_(positions[e, part])
                yield here, y if residual is None else y.add_(residual[here])

    out = assemble((num_rows, weight.shape[1]), x, pieces())
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
    grad_x, grad_weight = sums(x, need_x), sums(weight, need_weight)
    grad_bias = sums(weight[:, :, 0, 0], need_bias)
    grad_positions = sums(positions, True) if need_positions else x.new_empty(0)
    for e, source, rows in sequences(starts, lengths, encoder, cu_seqlens):
        g = grad[rows]
        if need_positions:
            grad_positions[e, : g.shape[0]] += g
        if not (need_x or need_weight or need_bias):
            continue
        if activation == "gelu":
            g = torch.ops.aten.gelu_backward(g, pre[rows])
        if need_bias:
            grad_bias[e] += g.sum(0, dtype=grad_bias.dtype)
        if not (need_x or need_weight):
            continue
        into = {"need_x": need_x, "grad_weight": grad_weight[e] if need_weight else None}
        if groups == 1:
            grad_frames = convolve_backward(g, x[source], weight[e], stride, padding, **into)
        else:
            grad_frames = _convolve_groups_backward(g, x[source], weight[e], stride, padding, groups, **into)
        if need_x:
            grad_x[source] += grad_frames
    return (
        grad_x.to(x.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
        grad_positions if positions is None else grad_positions.to(positions.dtype),
    )


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


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    frames: int,
    stride: int,
    padding: int,
    groups: int,
    activation: str,
) -> Iterator[tuple[slice, Tensor]]:
    """activation(convolution), part by part: (frames of the output, their values)."""
    taps = weight.shape[1]
    if groups == 1:
        for part, unfolded in windows(pad_frames(x, padding, frames, taps, stride), frames, taps, stride):
            yield part, linear(unfolded, weight.flatten(1), bias, activation)
    else:  # windows are no runs of memory: left to torch
        image, filters, shift = _right_in_groups(
            _image(pad_frames(x, padding, _round_up(frames), taps, stride)), _filters(weight), bias
        )
        result = torch.nn.functional.conv2d(image, filters, shift, (1, stride), groups=groups)
        y = _frames(result)[:frames].to(x.dtype)
        yield slice(0, frames), activate(y, activation)


def _convolve_groups_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    groups: int,
    *,
    need_x: bool,
    grad_weight: Tensor | None,
) -> Tensor | None:
    """Gradient of x, if needed; that of weight is added to grad_weight, if given."""
    frames, need_weight = _round_up(grad.shape[0]), grad_weight is not None
    grad_output, image, filters = _right_in_groups(
        _image(pad_frames(grad, 0, frames, 1, 1)),
        _image(pad_frames(x, padding, frames, weight.shape[1], stride)),
        _filters(weight),
    )
    grad_image, grad_filters, _ = torch.ops.aten.convolution_backward(
        grad_output,
        image,
        # With channels last, torch's gradient is wrong; filters of one tap are as they are in both orders.
        filters.clone(memory_format=torch.contiguous_format) if need_weight else filters,
        None, (1, stride), (0, 0), (1, 1), False, (0, 0), groups, (need_x, need_weight, False),
    )  # fmt: skip
    if need_weight:
        grad_weight += grad_filters[:, :, 0].mT
    return unpad_frames(_frames(grad_image), padding, x.shape[0]) if need_x else None


def _right_in_groups(*tensors: Any) -> list[Any]:
    """The tensors in a type that torch convolves rightly in groups: in bfloat16, oneDNN does not on CPUs with AMX where
    a group is narrow.
    """
    wrong = tensors[0].device.type == "cpu" and tensors[0].dtype == torch.bfloat16
    return [tensor.float() if wrong and tensor is not None else tensor for tensor in tensors]


def _round_up(frames: int) -> int:
    return -(-frames // _FRAMES) * _FRAMES


def _image(frames: Tensor) -> Tensor:
    """Frames [T, C] as the image [1, C, 1, T] that they are with channels last."""
    return frames.T[None, :, None]


def _frames(image: Tensor) -> Tensor:
    return image[0, :, 0].T


def _filters(weight: Tensor) -> Tensor:
    """[N, taps, C / groups] -> [N, C / groups, 1, taps]."""
    return weight.mT[:, :, None]
