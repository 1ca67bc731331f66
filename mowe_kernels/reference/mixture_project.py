"""Plain torch `mixture_project`: per clip, one matrix product a segment, accumulated in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mowe_kernels.reference._convolution import convolve_backward, convolve_into
from mowe_kernels.reference._linear import activate
from mowe_kernels.reference._rows import clear_tail, sums


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
        return self._silenced(own[self.index])

    def add(self, grad_rows: Tensor, grad: Tensor) -> None:
        """Transpose of `read`."""
        own = grad_rows[self.rows]
        if self.index is None:
            own[: grad.shape[0]] += grad
        else:
            own.index_add_(0, self.index, self._silenced(grad.to(own.dtype)))

    def _silenced(self, frames: Tensor) -> Tensor:
        """Zero where no row is met, even where the row at hand is NaN."""
        return frames.masked_fill(~self.inside[:, None], 0.0)


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
    pre = base.new_empty(num_rows, base_weight.shape[0])
    scales = weights.tolist()
    for b, source, target, segments in _clips(base_starts, base_lengths, row_offsets, position, alignment, cu_seqlens):
        y = pre[target]
        y.zero_() if bias is None else y.copy_(bias.expand_as(y))
        convolve_into(y, base[source], base_weight, stride, padding)
        for segment in segments:
            features = segment.read(rows[segment.family], source.stop - source.start)
            matrix = row_weights[segment.family][segment.slot]
            convolve_into(y, features, matrix, stride, padding, scales[b][segment.slot])
    clear_tail(pre, cu_seqlens)
    return activate(pre, activation), pre if save_pre else pre.new_empty(0)


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
    grad_base, grad_rows = sums(base, need_base), [sums(r, need_rows) for r in rows]
    grad_weights = sums(weights, need_weights)
    grad_base_weight = sums(base_weight, need_parameters)
    grad_row_weights = [sums(w, need_parameters) for w in row_weights]
    grad_bias = sums(base_weight[:, 0, 0], need_bias)
    scales = weights.tolist()
    for b, source, target, segments in _clips(base_starts, base_lengths, row_offsets, position, alignment, cu_seqlens):
        g = grad[target]
        if activation == "gelu":
            g = torch.ops.aten.gelu_backward(g, pre[target])
        if need_bias:
            grad_bias += g.sum(0, dtype=grad_bias.dtype)
        grad_features = convolve_backward(
            g, base[source], base_weight, stride, padding,
            need_x=need_base, grad_weight=grad_base_weight if need_parameters else None,
        )  # fmt: skip
        if need_base:
            grad_base[source] += grad_features
        for segment in segments:
            family, slot = segment.family, segment.slot
            grad_features = convolve_backward(
                g, segment.read(rows[family], source.stop - source.start), row_weights[family][slot], stride, padding,
                scales[b][slot],
                need_x=need_rows, grad_weight=grad_row_weights[family][slot] if need_parameters else None,
                grad_scale=grad_weights[b, slot] if need_weights else None,
            )  # fmt: skip
            if need_rows:
                segment.add(grad_rows[family], grad_features)
    return (
        grad_base.to(base.dtype),
        [g.to(r.dtype) for g, r in zip(grad_rows, rows, strict=True)],
        grad_weights.to(weights.dtype),
        grad_base_weight.to(base_weight.dtype),
        [g.to(w.dtype) for g, w in zip(grad_row_weights, row_weights, strict=True)],
        grad_bias.to(base_weight.dtype),
    )


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
