"""Triton `mixture_project`: products over features gathered through tables; the concatenation is never built.

Clips do not share base frames, and every pair that has rows serves a slot, as `PackPlan` has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mowe_kernels.triton import _mixture, _mixture_tables
from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._epilogue import activation_backward
from mowe_kernels.triton._launch import (
    cdiv,
    check_dtypes,
    contiguous,
    hardware,
    launch,
    next_power_of_2,
    recorded,
    setting,
)
from mowe_kernels.triton._tiles import at_most, fitted_tile
from mowe_kernels.triton.grouped_linear import Tile, newest

# By bits of the type and capability, as those of `grouped_linear`. A step's rows are looked up one stage before its
# features are fetched, so it takes two stages to have one more step under way. Forward, with room for two sums:
TILES = {
    (16, 90): (Tile(128, 128, 64, 8, 7), Tile(64, 64, 64, 4, 7)),
    (16, 80): (Tile(128, 64, 64, 8, 7), Tile(64, 64, 64, 4, 7)),
    (32, 80): (Tile(64, 64, 16, 8, 5), Tile(64, 32, 32, 4, 5)),
}
# The gradient of the features.
FEATURE_TILES = {
    (16, 80): (Tile(128, 128, 64, 8, 5), Tile(64, 64, 64, 4, 7)),
    (32, 80): (Tile(64, 64, 32, 4, 5), Tile(64, 32, 32, 4, 5)),
}
# The gradient of the weights: `depth` counts rows, `rows` and `cols` the two sides of the weight.
WEIGHT_TILES = {
    (16, 80): Tile(128, 128, 64, 8, 5),
    (32, 80): Tile(64, 64, 32, 4, 5),
}
ROWS_TILE = Tile(8, 128, 1, 4, 2)
TABLE_BLOCK = 128
PARTS = 16  # programs that share a clip's frames


@dataclass(frozen=True)
class _Features:
    """A family's features, or the base's as those of a family with one slot.

    x: [R, D]. weight: [k, N, taps, D]. first, last: int32 [P], the rows of each pair. position: int32 [B, k], pair of
    each slot; None: clip b is pair b. clock: base frame t meets the pair's frame (a * t + c) // d.
    """

    x: Tensor
    weight: Tensor
    first: Tensor
    last: Tensor
    position: Tensor | None
    clock: tuple[int, int, int]

    @property
    def slots(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.x.shape[1]


@dataclass(frozen=True)
class _Clips:
    """starts, lengths: int32 [B], base frames. cu_seqlens: int32 [B+1], output rows; rows: their bound."""

    starts: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    rows: int
    taps: int
    stride: int
    padding: int

    @property
    def search(self) -> tuple[int, int]:
        """Of a search among the clips: how many there are, and its first step."""
        batch = self.starts.shape[0]
        return batch, next_power_of_2(batch) // 2

    @property
    def reach(self) -> int:
        """Output frames that see a base frame, at most."""
        return cdiv(self.taps, self.stride)

    def sources(self, features: _Features, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows of the features that each output row meets [k, taps, rows], and its slots' weights [k, rows]."""
        sources = self.starts.new_empty(features.slots, self.taps, self.rows)
        scale = None if weights is None else weights.new_empty(features.slots, self.rows, dtype=torch.float32)
        launch(
            _mixture_tables.mixture_project_sources_kernel, cdiv(self.rows, TABLE_BLOCK),
            self.cu_seqlens, self.lengths, features.position, weights, features.first, features.last, sources, scale,
            self.rows, *self.search, *features.clock,
            SLOTS=features.slots, TAPS=self.taps, STRIDE=self.stride, PADDING=self.padding, BM=TABLE_BLOCK,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        return sources, scale

    def targets(self, features: _Features) -> tuple[Tensor, Tensor]:
        """Base frames of the places of the padded time line [k, stride, M], and the rows that saw them [reach, M]."""
        clips = self.starts.shape[0]
        places = self.rows + clips * (self.reach - 1) if clips else 0
        targets = self.starts.new_empty(features.slots, self.stride, places)
        origins = self.starts.new_empty(self.reach, places)
        launch(
            _mixture_tables.mixture_project_targets_kernel, cdiv(places, TABLE_BLOCK),
            self.cu_seqlens, self.starts, self.lengths, features.position, features.first, features.last,
            targets, origins, places, *self.search,
            SLOTS=features.slots, REACH=self.reach, STRIDE=self.stride, PADDING=self.padding, BM=TABLE_BLOCK,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        return targets, origins


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
    check_dtypes("mixture_project", base, *rows, base_weight, *row_weights, bias)
    clips, of_base, families = _lay_out(
        base, base_starts, base_lengths, rows, row_offsets, position, base_weight, row_weights, alignment, cu_seqlens,
        num_rows, stride, padding,
    )  # fmt: skip
    n = base_weight.shape[0]
    out = base.new_empty(num_rows, n)
    pre = torch.empty_like(out) if save_pre else base.new_empty(0)
    bias, weights = contiguous(bias, weights)
    base_sources, _ = clips.sources(of_base, None)
    total = None
    for index in range(max(1, len(families))):
        family = families[index] if families else None
        last = index + 1 >= len(families)
        result = out if last else base.new_empty(num_rows, n, dtype=torch.float32)
        sources, scale = clips.sources(family, weights) if family else (None, None)
        of_family = (family.x, sources, family.weight, scale) if family else (None,) * 4
        tile = fitted_tile("mixture_tile", TILES, num_rows, n, clips.taps * of_base.width, base)
        launch(
            _mixture.mixture_project_fwd_kernel, cdiv(num_rows, tile.rows) * cdiv(n, tile.cols),
            result, *((of_base.x, base_sources, of_base.weight) if index == 0 else (None,) * 3), *of_family,
            bias if last else None, total, pre if last and save_pre else None, num_rows,
            SLOTS=family.slots if family else 0, N=n, TAPS=clips.taps, DB=of_base.width,
            D=family.width if family else 0, GELU=last and activation == "gelu",
            BM=tile.rows, BN=tile.cols, BK=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, matmul=base.itemsize == 2,
        )  # fmt: skip
        total = result
    return out, pre


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
    check_dtypes("mixture_project", grad, base, *rows, base_weight, *row_weights)
    clips, of_base, families = _lay_out(
        base, base_starts, base_lengths, rows, row_offsets, position, base_weight, row_weights, alignment, cu_seqlens,
        grad.shape[0], stride, padding,
    )  # fmt: skip
    grad, pre, weights = contiguous(grad, pre if activation else None, weights)
    nothing = base.new_empty(0)
    tables = []
    if need_parameters:
        tables = [clips.sources(of_base, None), *(clips.sources(family, weights) for family in families)]
    scale = tables[1][1] if len(tables) > 1 else None
    grads = activation_backward(grad, pre, clips.cu_seqlens[-1:], scale)
    grad_base_weight, grad_row_weights = nothing, [nothing] * len(families)
    if need_parameters:
        (grad_base_weight,) = _grad_weight(grads[:1], of_base, tables[0][0])
        grad_row_weights = [
            _grad_weight(grads[1:], family, sources) for family, (sources, _) in zip(families, tables[1:], strict=True)
        ]
    grad_base = _grad_features(grads[0], of_base, clips, base)[0] if need_base else nothing
    grad_rows, parts = [], []
    for family in families:
        of_features = _grad_features(grads[0], family, clips, base) if need_rows or need_weights else nothing
        grad_rows.append(_grad_rows(of_features, family, clips, weights) if need_rows else nothing)
        if need_weights:
            parts.append(_grad_scale(of_features, family, clips))
    grad_weights = nothing
    if need_weights:
        grad_weights = torch.stack(parts).sum((0, 3)).to(weights.dtype) if parts else torch.zeros_like(weights)
    grad_bias = grads[0].sum(0, dtype=torch.float32).to(base_weight.dtype) if need_bias else nothing
    return grad_base, grad_rows, grad_weights, grad_base_weight, grad_row_weights, grad_bias


def _lay_out(
    base: Tensor, base_starts: Tensor, base_lengths: Tensor, rows: list[Tensor], row_offsets: list[Tensor],
    position: Tensor, base_weight: Tensor, row_weights: list[Tensor], alignment: list[int], cu_seqlens: Tensor,
    num_rows: int, stride: int, padding: int,
) -> tuple[_Clips, _Features, list[_Features]]:  # fmt: skip
    """The clips, the base's features and each family's."""
    base, base_weight, starts, lengths, cu_seqlens, position = contiguous(
        base, base_weight, base_starts, base_lengths, cu_seqlens, position
    )
    clips = _Clips(starts, lengths, cu_seqlens, num_rows, base_weight.shape[1], stride, padding)
    of_base = _Features(base, base_weight[None], starts, starts + lengths, None, (1, 0, 1))
    families = []
    for index, tensors in enumerate(zip(rows, row_weights, row_offsets, strict=True)):
        x, weight, offsets = contiguous(*tensors)
        clock = tuple(alignment[3 * index : 3 * index + 3])
        families.append(_Features(x, weight, offsets[:-1], offsets[1:], position, clock))
    return clips, of_base, families


def _grad_weight(grads: Tensor, features: _Features, sources: Tensor) -> Tensor:
    """[k, N, taps, D] from grads [k, rows, N]."""
    slots, n, taps, width = features.weight.shape
    tile = setting("mixture_weight_tile", newest(WEIGHT_TILES, hardware(grads.device), grads.dtype))
    tile = tile._replace(rows=at_most(tile.rows, n), cols=at_most(tile.cols, width))
    grad_weight = features.weight.new_empty(features.weight.shape)
    launch(
        _mixture.mixture_project_bwd_weight_kernel,
        slots * taps * cdiv(n, tile.rows) * cdiv(width, tile.cols),
        grads, features.x, sources, grad_weight, grads.shape[1],
        N=n, TAPS=taps, D=width, BN=tile.rows, BC=tile.cols, BK=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, matmul=grads.itemsize == 2,
    )  # fmt: skip
    return grad_weight


def _grad_features(grad: Tensor, features: _Features, clips: _Clips, base: Tensor) -> Tensor:
    """Of each slot's features at the base frames, before they are scaled, [k, Rb, D], from grad [rows, N]."""
    slots, n, taps, width = features.weight.shape
    targets, origins = clips.targets(features)
    places = origins.shape[1]
    tile = fitted_tile("mixture_features_tile", FEATURE_TILES, places, width, n, grad, slots * clips.stride)
    out = base.new_zeros(slots, base.shape[0], width)
    launch(
        _mixture.mixture_project_bwd_features_kernel,
        slots * clips.stride * cdiv(places, tile.rows) * cdiv(width, tile.cols),
        grad, targets, origins, features.weight, out, places, base.shape[0],
        N=n, TAPS=taps, STRIDE=clips.stride, D=width, BM=tile.rows, BN=tile.cols, BK=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, matmul=grad.itemsize == 2,
    )  # fmt: skip
    return out


def _grad_rows(grads: Tensor, features: _Features, clips: _Clips, weights: Tensor) -> Tensor:
    """[R, D] from the gradient of the features at the base frames [k, Rb, D]."""
    tile, shares = setting("mixture_rows_tile", ROWS_TILE), setting("mixture_parts", PARTS)
    grad_rows = torch.zeros_like(features.x)
    launch(
        _mixture.mixture_project_bwd_rows_kernel,
        weights.numel() * shares * cdiv(features.width, tile.cols),
        grads, clips.starts, clips.lengths, features.position, weights, features.first, features.last, grad_rows,
        grads.shape[1], *features.clock,
        SLOTS=features.slots, D=features.width, PARTS=shares, BM=tile.rows, BC=tile.cols,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return grad_rows


def _grad_scale(grads: Tensor, features: _Features, clips: _Clips) -> Tensor:
    """[B, k, parts], to be added up, from the gradient of the features at the base frames [k, Rb, D]."""
    tile, shares = setting("mixture_rows_tile", ROWS_TILE), setting("mixture_parts", PARTS)
    parts = grads.new_empty(*features.position.shape, shares, dtype=torch.float32)
    launch(
        _mixture.mixture_project_bwd_scale_kernel, parts.numel(),
        grads, features.x, clips.starts, clips.lengths, features.position, features.first, features.last, parts,
        grads.shape[1], *features.clock,
        SLOTS=features.slots, D=features.width, PARTS=shares, BM=tile.rows, BC=tile.cols,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return parts


# outputs, taps, stride, padding, width of the weak features; the base is Whisper-large-v3.
PROJECTORS = {
    "tiny, stack 15": (1280, 15, 15, 0, 384),
    "base, conv": (1280, 3, 2, 1, 512),
}


def compilations(capability: int) -> Iterator[Compilation]:
    """First layers of projectors, with two slots and two families alike, forward and backward."""

    def project(projector: str, frames: int, dtype: torch.dtype) -> None:
        n, taps, stride, padding, width = PROJECTORS[projector]
        like = torch.empty(0, dtype=dtype, device="meta")
        base, weak = like.new_empty(frames, 1280), like.new_empty(frames, width)
        out = like.new_empty(frames // stride, n)
        base_weight, row_weight = like.new_empty(n, taps, 1280), like.new_empty(2, n, taps, width)
        weights, bias = like.new_empty(32, 2, dtype=torch.float32), like.new_empty(n)
        starts, cu_seqlens, offsets = (like.new_empty(size, dtype=torch.int32) for size in (32, 33, 65))
        position = like.new_empty(32, 2, dtype=torch.int32)
        clips = (base, starts, starts, [weak] * 2, [offsets] * 2, position, weights, base_weight, [row_weight] * 2)
        clocks = [640, 320, 640] * 2
        forward(*clips, bias, clocks, cu_seqlens, out.shape[0], stride, padding, "gelu", True)
        backward(out, *clips, clocks, cu_seqlens, out, stride, padding, "gelu", *(True,) * 5)

    calls = {projector: partial(project, projector, 96000, torch.bfloat16) for projector in PROJECTORS}
    calls["tiny, stack 15, few rows"] = partial(project, "tiny, stack 15", 1500, torch.bfloat16)
    calls["tiny, stack 15, fp32"] = partial(project, "tiny, stack 15", 96000, torch.float32)
    yield from recorded(capability, calls)
