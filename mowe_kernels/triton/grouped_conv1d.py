"""Triton `grouped_conv1d`: implicit matrix products, in tiles of one sequence each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from mowe_kernels.triton import _conv1d
from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._epilogue import activation_backward
from mowe_kernels.triton._launch import (
    Tuning,
    cdiv,
    check_dtypes,
    contiguous,
    hardware,
    launch,
    recorded,
    setting,
)
from mowe_kernels.triton._tiles import at_most, fitted_tile
from mowe_kernels.triton.grouped_linear import CANDIDATES, Tile, newest

# By bits of the type and capability, as those of `grouped_linear`: for the forward pass and the gradient of the input.
# Two programs of the large block fit a Hopper multiprocessor; before, Triton keeps one stage less in shared memory.
TILES = {
    (16, 90): (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
    (16, 80): (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
    (32, 80): (Tile(128, 64, 16, 8, 3), Tile(64, 32, 16, 4, 3)),
}
# The gradient of the weights: `depth` counts rows, `rows` and `cols` the two sides of the weight.
WEIGHT_TILES = {
    (16, 90): Tile(128, 128, 64, 8, 3),
    (16, 80): Tile(128, 128, 32, 8, 5),
    (32, 80): Tile(64, 64, 32, 4, 3),
}
WEIGHT_PROGRAMS_PER_SM = 2
POSITIONS_TILE = Tile(16, 128, 1, 4, 2)


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
    check_dtypes("grouped_conv1d", x, weight, bias, positions, residual)
    n, taps, channels = weight.shape[1:]
    pairs = starts.shape[0]
    out = x.new_empty(num_rows, n)
    pre = torch.empty_like(out) if save_pre else x.new_empty(0)
    tile = fitted_tile("conv_tile", TILES, num_rows, n // groups, taps * channels, x, groups)
    launch(
        _conv1d.grouped_conv1d_fwd_kernel,
        (num_rows // tile.rows + pairs) * groups * cdiv(n // groups, tile.cols) if pairs else 0,
        *contiguous(x, weight, bias, starts, lengths, encoder, cu_seqlens, positions, residual),
        pre if save_pre else None, out, pairs, 0 if positions is None else positions.shape[1],
        N=n, TAPS=taps, CG=channels, GROUPS=groups, STRIDE=stride, PADDING=padding, GELU=activation == "gelu",
        BM=tile.rows, BN=tile.cols, BK=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, matmul=x.itemsize == 2,
    )  # fmt: skip
    return out, pre


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
    check_dtypes("grouped_conv1d", grad, x, weight, positions)
    grad, x, weight, pre, starts, lengths, encoder, cu_seqlens = contiguous(
        grad, x, weight, pre, starts, lengths, encoder, cu_seqlens
    )
    grad_x = grad_weight = grad_bias = grad_positions = x.new_empty(0)
    if need_positions:
        grad_positions = _grad_positions(grad, encoder, cu_seqlens, positions)
    if activation == "gelu" and (need_x or need_weight or need_bias):
        grad = activation_backward(grad, pre, cu_seqlens[-1:])[0]
    if need_x:
        grad_x = _grad_x(grad, x, weight, starts, lengths, encoder, cu_seqlens, stride, padding, groups)
    if need_weight or need_bias:
        of_weight, of_bias = _grad_weight(
            grad, x, weight, starts, lengths, encoder, cu_seqlens, stride, padding, groups, need_bias
        )
        grad_weight = of_weight if need_weight else grad_weight
        grad_bias = of_bias if need_bias else grad_bias
    return grad_x, grad_weight, grad_bias, grad_positions


def _grad_x(
    grad: Tensor, x: Tensor, weight: Tensor, starts: Tensor, lengths: Tensor, encoder: Tensor, cu_seqlens: Tensor,
    stride: int, padding: int, groups: int,
) -> Tensor:  # fmt: skip
    n, taps, channels = weight.shape[1:]
    frames = x.shape[0]
    grad_x = x.new_empty(x.shape)
    tile = fitted_tile("conv_tile", TILES, frames, channels, cdiv(taps, stride) * n // groups, x, groups)
    launch(
        _conv1d.grouped_conv1d_bwd_x_kernel,
        cdiv(frames, tile.rows * stride) * stride * groups * cdiv(channels, tile.cols),
        grad, weight, starts, starts + lengths, encoder, cu_seqlens, grad_x, starts.shape[0], frames,
        N=n, TAPS=taps, CG=channels, GROUPS=groups, STRIDE=stride, PADDING=padding,
        BM=tile.rows, BN=tile.cols, BK=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, matmul=x.itemsize == 2,
    )  # fmt: skip
    return grad_x


def _grad_weight(
    grad: Tensor, x: Tensor, weight: Tensor, starts: Tensor, lengths: Tensor, encoder: Tensor, cu_seqlens: Tensor,
    stride: int, padding: int, groups: int, need_bias: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    encoders, n, taps, channels = weight.shape
    device = hardware(x.device)
    tile = setting("conv_weight_tile", newest(WEIGHT_TILES, device, x.dtype), device, f"{8 * x.itemsize} bits")
    tile = tile._replace(rows=at_most(tile.rows, n // groups), cols=at_most(tile.cols, taps * channels))
    tiles = encoders * groups * cdiv(n // groups, tile.rows) * cdiv(taps * channels, tile.cols)
    splits = setting("conv_weight_splits", max(1, WEIGHT_PROGRAMS_PER_SM * device.num_sms // tiles))
    dtype = weight.dtype if splits == 1 else torch.float32
    parts = weight.new_empty(splits, *weight.shape, dtype=dtype)
    bias_parts = weight.new_empty(splits, encoders, n, dtype=dtype) if need_bias else None
    launch(
        _conv1d.grouped_conv1d_bwd_weight_kernel, tiles * splits,
        grad, x, starts, lengths, encoder, cu_seqlens, parts, bias_parts, starts.shape[0], splits,
        E=encoders, N=n, TAPS=taps, CG=channels, GROUPS=groups, STRIDE=stride, PADDING=padding,
        BN=tile.rows, BC=tile.cols, BK=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, matmul=x.itemsize == 2,
    )  # fmt: skip
    return _sum_parts(parts, weight.dtype), None if bias_parts is None else _sum_parts(bias_parts, weight.dtype)


def _grad_positions(grad: Tensor, encoder: Tensor, cu_seqlens: Tensor, positions: Tensor) -> Tensor:
    encoders, max_positions, n = positions.shape
    tile = setting("conv_positions_tile", POSITIONS_TILE)
    grad_positions = positions.new_empty(positions.shape)
    launch(
        _conv1d.grouped_conv1d_bwd_positions_kernel,
        encoders * cdiv(max_positions, tile.rows) * cdiv(n, tile.cols),
        grad, encoder, cu_seqlens, grad_positions, encoder.shape[0], max_positions,
        N=n, BM=tile.rows, BN=tile.cols, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return grad_positions


def _sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(dtype)


# channels, outputs, taps, stride, padding, groups, and what there is beside x and weight.
LAYERS = {
    "whisper-tiny conv1": (80, 384, 3, 1, 1, 1, ("bias", "gelu")),
    "whisper-tiny conv2": (384, 384, 3, 2, 1, 1, ("bias", "gelu", "positions")),
    "whisper-large-v3 conv2": (1280, 1280, 3, 2, 1, 1, ("bias", "gelu", "positions")),
    "hubert conv0": (1, 512, 10, 5, 0, 1, ()),
    "hubert conv1": (512, 512, 3, 2, 0, 1, ("gelu",)),
    "hubert positional": (768, 768, 128, 1, 64, 16, ("bias", "gelu", "residual")),
}


def tunings(device: torch.device, rows: int) -> Iterator[Tuning]:
    """The second convolution of Whisper-tiny over eight sequences, and the gradient of its weight."""
    each = rows // 8
    x, out = (torch.randn(n, 384, dtype=torch.bfloat16, device=device) for n in (16 * each, 8 * each))
    weight = torch.randn(8, 384, 3, 384, dtype=x.dtype, device=device) / 30
    encoder = torch.arange(8, dtype=torch.int32, device=device)
    cu_seqlens = torch.arange(9, dtype=torch.int32, device=device) * each
    clips = encoder * 2 * each, torch.full_like(encoder, 2 * each), encoder, cu_seqlens

    def convolve() -> Tensor:
        return forward(x, weight, None, *clips, None, None, 8 * each, 2, 1, 1, "gelu", False)[0]

    def weigh() -> Tensor:
        return backward(out, x, weight, *clips, None, out, 2, 1, 1, "", False, True, False, False)[1]

    yield Tuning("conv_tile", "16 bits, many blocks", CANDIDATES, convolve)
    yield Tuning("conv_weight_tile", "16 bits", CANDIDATES, weigh)


def compilations(capability: int) -> Iterator[Compilation]:
    """The convolutions of Whisper and HuBERT encoders, forward and backward."""

    def convolve(layer: str, rows: int, dtype: torch.dtype) -> None:
        channels, n, taps, stride, padding, groups, extras = LAYERS[layer]
        like = torch.empty(0, dtype=dtype, device="meta")
        x, out, weight = (like.new_empty(*s) for s in ((rows, channels), (rows, n), (2, n, taps, channels // groups)))
        bias = like.new_empty(2, n) if "bias" in extras else None
        positions = like.new_empty(2, 1500, n) if "positions" in extras else None
        activation = "gelu" if "gelu" in extras else ""
        table, cu_seqlens = (like.new_empty(size, dtype=torch.int32) for size in (32, 33))
        forward(
            x, weight, bias, table, table, table, cu_seqlens, positions, out if "residual" in extras else None,
            rows, stride, padding, groups, activation, activation != "",
        )  # fmt: skip
        backward(
            out, x, weight, table, table, table, cu_seqlens, positions, out,
            stride, padding, groups, activation, True, True, bias is not None, positions is not None,
        )  # fmt: skip

    calls = {layer: partial(convolve, layer, 48000, torch.bfloat16) for layer in LAYERS}
    for layer in ("whisper-tiny conv2", "hubert positional"):
        calls[f"{layer}, few rows"] = partial(convolve, layer, 400, torch.bfloat16)
    for layer in ("whisper-tiny conv1", "hubert positional"):
        calls[f"{layer}, fp32"] = partial(convolve, layer, 48000, torch.float32)
    yield from recorded(capability, calls)
