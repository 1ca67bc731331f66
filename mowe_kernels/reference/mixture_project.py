"""Plain torch `mixture_project`: per clip, one matrix product a segment, accumulated in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mowe_kernels.reference._rows import clear_tail
from mowe_kernels.reference._windows import fold, frames_needed, pad_frames, unpad, windows
from mowe_kernels.reference.grouped_linear import activate_into


@dataclass(frozen=True)
class _Segment:
    """The rows of one slot of one clip, and which of them each base frame meets."""

    family: int
    slot: int
    rows: slice
    index: Tensor | None  # [T] row of each base frame; None: row t meets base frame t
    inside: Tensor | None  # [T] whether that row is in the clip

    def read(self, rows: Tensor, frames: int) -> Tensor:
        """The slot's features at the base's frames, [T, D]."""
        own = rows[self.rows]
        if self.index is None:
            return own[:frames]
        return own[self.index] * self.inside[:, None].to(own.dtype)

    def add(self, grad_rows: Tensor, grad: Tensor) -> None:
        """Transpose of `read`."""
        own = grad_rows[self.rows]
        if self.index is None:
            own[: grad.shape[0]] += grad
        else:
            own.index_add_(0, self.index, grad * self.inside[:, None].to(grad.dtype))


def forward(
    base: Tensor,
    base_starts: Tensor,
    base_lengths: Tensor,
    rows: list[Tensor],
    row_offsets: list[Tensor],
    position: Tensor,
    weights: Tensor,
    base_weight: Tensor,
    row_weights: list[Tensor],
    bias: Tensor | None,
    alignment: list[int],
    cu_seqlens: Tensor,
    num_rows: int,
    stride: int,
    padding: int,
    activation: str,
    save_pre: bool,
) -> tuple[Tensor, Tensor]:
    n, taps, _ = base_weight.shape
    out = base.new_empty(num_rows, n)
    pre = torch.empty_like(out) if save_pre else base.new_empty(0)
    scales = weights.tolist()
    for b, source, target, segments in _clips(base_starts, base_lengths, row_offsets, position, alignment, cu_seqlens):
        y = (pre if save_pre else out)[target]
        y.zero_() if bias is None else y.copy_(bias.expand_as(y))
        _convolve_into(y, base[source], base_weight, 1.0, stride, padding)
        for segment in segments:
            features = segment.read(rows[segment.family], source.stop - source.start)
            matrix = row_weights[segment.family][segment.slot]
            _convolve_into(y, features, matrix, scales[b][segment.slot], stride, padding)
        activate_into(out[target], y, activation)
    clear_tail(out, cu_seqlens)
    return out, clear_tail(pre, cu_seqlens) if save_pre else pre


def backward(
    grad: Tensor,
    base: Tensor,
    base_starts: Tensor,
    base_lengths: Tensor,
    rows: list[Tensor],
    row_offsets: list[Tensor],
    position: Tensor,
    weights: Tensor,
    base_weight: Tensor,
    row_weights: list[Tensor],
    alignment: list[int],
    cu_seqlens: Tensor,
    pre: Tensor,
    stride: int,
    padding: int,
    activation: str,
    need_base: bool,
    need_rows: bool,
    need_weights: bool,
    need_parameters: bool,
    need_bias: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, list[Tensor], Tensor]:
    nothing = base.new_empty(0)

    def zeros(tensor: Tensor, needed: bool) -> Tensor:
        return torch.zeros_like(tensor) if needed else base.new_empty(0)

    grad_base = zeros(base, need_base)
    grad_rows = [zeros(r, need_rows) for r in rows]
    grad_weights = zeros(weights, need_weights)
    grad_base_weight = zeros(base_weight, need_parameters)
    grad_row_weights = [zeros(w, need_parameters) for w in row_weights]
    grad_bias = base_weight.new_zeros(base_weight.shape[0]) if need_bias else nothing
    scales = weights.tolist()
    for b, source, target, segments in _clips(base_starts, base_lengths, row_offsets, position, alignment, cu_seqlens):
        g = grad[target]
        if activation == "gelu":
            g = torch.ops.aten.gelu_backward(g, pre[target])
        if need_bias:
            grad_bias += g.sum(0)
        grad_features, _ = _convolve_backward(
            g, base[source], base_weight, 1.0, stride, padding, need_base, False,
            grad_base_weight if need_parameters else None,
        )  # fmt: skip
        if need_base:
            grad_base[source] += grad_features
        for segment in segments:
            family, slot = segment.family, segment.slot
            grad_features, along = _convolve_backward(
                g, segment.read(rows[family], source.stop - source.start), row_weights[family][slot], scales[b][slot],
                stride, padding, need_rows, need_weights, grad_row_weights[family][slot] if need_parameters else None,
            )  # fmt: skip
            if need_rows:
                segment.add(grad_rows[family], grad_features)
            if need_weights:
                grad_weights[b, slot] += along
    return grad_base, grad_rows, grad_weights, grad_base_weight, grad_row_weights, grad_bias


def _clips(
    base_starts: Tensor,
    base_lengths: Tensor,
    row_offsets: list[Tensor],
    position: Tensor,
    alignment: list[int],
    cu_seqlens: Tensor,
) -> Iterator[tuple[int, slice, slice, list[_Segment]]]:
    """(clip, its base frames, its output rows, its slots) for each clip that gives output."""
    offsets = [o.tolist() for o in row_offsets]
    bounds = cu_seqlens.tolist()
    starts, lengths = base_starts.tolist(), base_lengths.tolist()
    for b, pairs in enumerate(position.tolist()):
        if bounds[b] == bounds[b + 1]:
            continue
        segments = [
            _segment(family, slot, slice(offset[p], offset[p + 1]), lengths[b], alignment, position.device)
            for slot, p in enumerate(pairs)
            for family, offset in enumerate(offsets)
            if offset[p] < offset[p + 1]
        ]
        yield b, slice(starts[b], starts[b] + lengths[b]), slice(bounds[b], bounds[b + 1]), segments


def _segment(family: int, slot: int, rows: slice, frames: int, alignment: list[int], device: torch.device) -> _Segment:
    a, c, d = alignment[3 * family : 3 * family + 3]
    length = rows.stop - rows.start
    if a == d and 0 <= c < d and frames <= length:
        return _Segment(family, slot, rows, None, None)
    nearest = (torch.arange(frames, device=device) * a + c) // d
    # A frame just past an end (the clocks differ by less than a frame) takes the last one; farther out is silence.
    inside = (nearest >= -1) & (nearest <= length)
    return _Segment(family, slot, rows, nearest.clamp(0, length - 1), inside)


def _convolve_into(y: Tensor, x: Tensor, weight: Tensor, scale: float, stride: int, padding: int) -> None:
    """y += scale * conv(x); y: [U, N], x: [T, C], weight: [N, taps, C]."""
    taps = weight.shape[1]
    padded = pad_frames(x, padding, frames_needed(y.shape[0], taps, stride))
    for part, unfolded in windows(padded, y.shape[0], taps, stride, groups=1):
        y[part].addmm_(unfolded[0], weight.flatten(1).T, alpha=scale)


def _convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: float,
    stride: int,
    padding: int,
    need_x: bool,
    need_scale: bool,
    grad_weight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of scale; that of weight is added to grad_weight."""
    taps, matrix = weight.shape[1], weight.flatten(1)
    padded = pad_frames(x, padding, frames_needed(grad.shape[0], taps, stride))
    grad_padded = torch.zeros_like(padded) if need_x else None
    along = grad.new_zeros(()) if need_scale else None
    for part, unfolded in windows(padded, grad.shape[0], taps, stride, groups=1):
        if grad_weight is not None:
            grad_weight.view_as(matrix).addmm_(grad[part].T, unfolded[0], alpha=scale)
        if not (need_x or need_scale):
            continue
        grad_windows = grad[part] @ matrix
        if need_scale:
            along += (grad_windows * unfolded[0]).sum()
        if need_x:
            fold(grad_padded, grad_windows[None], part.start, taps, stride)
    if not need_x:
        return None, along
    kept = unpad(grad_padded, padding, x.shape[0]) * scale
    return torch.nn.functional.pad(kept, (0, 0, 0, x.shape[0] - kept.shape[0])), along
