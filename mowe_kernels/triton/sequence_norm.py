"""Triton `sequence_norm`: statistics over the frames of a sequence, tile by tile, then one pass that normalises.

A tile is a block of rows of one sequence, numbered as `find_sequence` does. Tiles are summed up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._device import gelu, gelu_grad
from mowe_kernels.triton._launch import cdiv, check_dtypes, contiguous, launch, recorded, setting
from mowe_kernels.triton._sequences import find_sequence

RUNTIME = ["sequences", "tiles"]
OFFSETS = ["p_cu_seqlens", "p_encoder"]


@triton.jit
def _columns(N: tl.constexpr, BLOCK_N: tl.constexpr):
    """What this program works on, of everything times the blocks of columns, and its columns."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    return tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _find_rows(p_cu_seqlens, tile, sequences, TILE: tl.constexpr):
    """Sequence of a tile, its length, the tile's first row and how many it has, not above zero for a tile without."""
    sequence, first = find_sequence(p_cu_seqlens, tile, sequences, TILE)
    start = tl.load(p_cu_seqlens + sequence)
    length = tl.load(p_cu_seqlens + sequence + 1) - start
    return sequence, length, start.to(tl.int64) + first, tl.minimum(length - first, TILE)


# p_x: [R, N]. p_cu_seqlens: int32 [sequences + 1]. p_mean, p_squares: float32 [tiles, N], of each tile the mean and
# the sum of the squared deviations from it. Programs: a tile times a block of columns.
@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=OFFSETS)
def sequence_norm_tile_stats_kernel(
    p_x, p_cu_seqlens, p_mean, p_squares, sequences,
    N: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, b_n = _columns(N, BLOCK_N)
    _, _, row, rows = _find_rows(p_cu_seqlens, tile, sequences, TILE)
    if rows <= 0:
        return
    b_r = tl.arange(0, BLOCK_R)
    p_x += row * N
    b_mean = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)  # every lane has its own, of every BLOCK_R-th row
    b_squares = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    count = 0.0
    for first in range(0, rows, BLOCK_R):
        there = (b_r < rows - first)[:, None] & (b_n < N)[None, :]
        b_x = tl.load(p_x + b_r[:, None] * N + b_n[None, :], mask=there, other=0.0).to(tl.float32)
        count += 1.0
        b_delta = tl.where(there, b_x - b_mean, 0.0)
        b_mean += b_delta / count
        b_squares += b_delta * (b_x - b_mean)
        p_x += BLOCK_R * N
    b_count = tl.maximum((rows - b_r + BLOCK_R - 1) // BLOCK_R, 0).to(tl.float32)[:, None]
    b_tile_mean = tl.sum(b_mean * b_count, 0) / rows
    b_apart = b_mean - b_tile_mean[None, :]
    place = tile.to(tl.int64) * N + b_n
    tl.store(p_mean + place, b_tile_mean, mask=b_n < N)
    tl.store(p_squares + place, tl.sum(b_squares + b_count * b_apart * b_apart, 0), mask=b_n < N)


# p_tile_mean, p_tile_squares: float32 [tiles, N] of the tile statistics. p_mean, p_rstd: float32 [sequences, N].
# Programs: a sequence times a block of columns.
@triton.jit(do_not_specialize_on_alignment=OFFSETS)
def sequence_norm_stats_kernel(
    p_tile_mean, p_tile_squares, p_cu_seqlens, p_mean, p_rstd, eps,
    N: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sequence, b_n = _columns(N, BLOCK_N)
    start = tl.load(p_cu_seqlens + sequence)
    length = tl.load(p_cu_seqlens + sequence + 1) - start
    if length == 0:
        return
    b_t = tl.arange(0, BLOCK_R)
    tiles = tl.cdiv(length, TILE)
    first_tile = (start // TILE + sequence).to(tl.int64)
    b_sum = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for first in range(0, tiles, BLOCK_R):
        b_rows = tl.minimum(length - (first + b_t) * TILE, TILE).to(tl.float32)[:, None]
        there = (b_t < tiles - first)[:, None] & (b_n < N)[None, :]
        place = (first_tile + first + b_t)[:, None] * N + b_n[None, :]
        b_sum += tl.load(p_tile_mean + place, mask=there, other=0.0) * b_rows
    b_mean = tl.sum(b_sum, 0) / length
    b_squares = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for first in range(0, tiles, BLOCK_R):
        b_rows = tl.minimum(length - (first + b_t) * TILE, TILE).to(tl.float32)[:, None]
        there = (b_t < tiles - first)[:, None] & (b_n < N)[None, :]
        place = (first_tile + first + b_t)[:, None] * N + b_n[None, :]
        b_apart = tl.load(p_tile_mean + place, mask=there, other=0.0) - b_mean[None, :]
        b_squares += tl.load(p_tile_squares + place, mask=there, other=0.0)
        b_squares += tl.where(there, b_apart * b_apart * b_rows, 0.0)
    place = sequence.to(tl.int64) * N + b_n
    tl.store(p_mean + place, b_mean, mask=b_n < N)
    tl.store(p_rstd + place, 1.0 / tl.sqrt(tl.sum(b_squares, 0) / length + eps), mask=b_n < N)


@triton.jit
def _load_vector(p, row, b_n, N: tl.constexpr):
    """Columns of one row, as float32 [1, BLOCK_N]."""
    return tl.load(p + row.to(tl.int64) * N + b_n, mask=b_n < N, other=0.0).to(tl.float32)[None, :]


# p_x, p_out: [R, N]. p_weight, p_bias: [E, N]. p_encoder: int32 [sequences]. p_mean, p_rstd: float32 [sequences, N].
# Programs: a tile times a block of columns.
@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=OFFSETS)
def sequence_norm_fwd_kernel(
    p_x, p_weight, p_bias, p_encoder, p_cu_seqlens, p_mean, p_rstd, p_out, sequences,
    GELU: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, b_n = _columns(N, BLOCK_N)
    sequence, _, row, rows = _find_rows(p_cu_seqlens, tile, sequences, TILE)
    if rows <= 0:
        return
    encoder = tl.load(p_encoder + sequence)
    b_mean, b_rstd = _load_vector(p_mean, sequence, b_n, N), _load_vector(p_rstd, sequence, b_n, N)
    b_weight, b_bias = _load_vector(p_weight, encoder, b_n, N), _load_vector(p_bias, encoder, b_n, N)
    b_r = tl.arange(0, BLOCK_R)
    place = row * N + b_r[:, None] * N + b_n[None, :]
    for first in range(0, rows, BLOCK_R):
        there = (b_r < rows - first)[:, None] & (b_n < N)[None, :]
        b_y = (tl.load(p_x + place, mask=there, other=0.0).to(tl.float32) - b_mean) * b_rstd * b_weight + b_bias
        if GELU:
            b_y = gelu(b_y)
        tl.store(p_out + place, b_y.to(p_out.dtype.element_ty), mask=there)
        place += BLOCK_R * N


@triton.jit
def _before_activation(p_grad, p_x, place, there, b_mean, b_rstd, b_weight, b_bias, GELU: tl.constexpr):
    """Gradient before the activation, and the normalised rows."""
    b_grad = tl.load(p_grad + place, mask=there, other=0.0).to(tl.float32)
    b_normed = (tl.load(p_x + place, mask=there, other=0.0).to(tl.float32) - b_mean) * b_rstd
    if GELU:
        b_grad *= gelu_grad(b_normed * b_weight + b_bias)
    return b_grad, b_normed


# p_grad: [R, N], p_sums: float32 [2, tiles, N], of each tile the sums of the gradient before the activation and of it
# times the normalised rows. The rest as in `sequence_norm_fwd_kernel`.
@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=OFFSETS)
def sequence_norm_tile_sums_kernel(
    p_grad, p_x, p_weight, p_bias, p_encoder, p_cu_seqlens, p_mean, p_rstd, p_sums, sequences, tiles,
    GELU: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, b_n = _columns(N, BLOCK_N)
    sequence, _, row, rows = _find_rows(p_cu_seqlens, tile, sequences, TILE)
    if rows <= 0:
        return
    encoder = tl.load(p_encoder + sequence)
    b_mean, b_rstd = _load_vector(p_mean, sequence, b_n, N), _load_vector(p_rstd, sequence, b_n, N)
    b_weight, b_bias = _load_vector(p_weight, encoder, b_n, N), _load_vector(p_bias, encoder, b_n, N)
    b_r = tl.arange(0, BLOCK_R)
    place = row * N + b_r[:, None] * N + b_n[None, :]
    b_sum = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    b_along = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for first in range(0, rows, BLOCK_R):
        there = (b_r < rows - first)[:, None] & (b_n < N)[None, :]
        b_grad, b_normed = _before_activation(p_grad, p_x, place, there, b_mean, b_rstd, b_weight, b_bias, GELU)
        b_sum += b_grad
        b_along += b_grad * b_normed
        place += BLOCK_R * N
    at = tile.to(tl.int64) * N + b_n
    tl.store(p_sums + at, tl.sum(b_sum, 0), mask=b_n < N)
    tl.store(p_sums + tiles.to(tl.int64) * N + at, tl.sum(b_along, 0), mask=b_n < N)


# p_tile_sums: float32 [2, tiles, N]. p_sums: float32 [2, sequences, N], the same of each sequence.
# Programs: 2 times a sequence times a block of columns.
@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=OFFSETS)
def sequence_norm_sums_kernel(
    p_tile_sums, p_cu_seqlens, p_sums, sequences, tiles,
    N: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    which, b_n = _columns(N, BLOCK_N)
    sequence = which % sequences
    start = tl.load(p_cu_seqlens + sequence)
    count = tl.cdiv(tl.load(p_cu_seqlens + sequence + 1) - start, TILE)
    first_tile = (start // TILE + sequence + which // sequences * tiles).to(tl.int64)
    b_t = tl.arange(0, BLOCK_R)
    b_sum = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for first in range(0, count, BLOCK_R):
        there = (b_t < count - first)[:, None] & (b_n < N)[None, :]
        b_sum += tl.load(p_tile_sums + (first_tile + first + b_t)[:, None] * N + b_n[None, :], mask=there, other=0.0)
    tl.store(p_sums + which.to(tl.int64) * N + b_n, tl.sum(b_sum, 0), mask=b_n < N)


# p_grad, p_x, p_grad_x: [R, N]. p_sums: float32 [2, sequences, N]. The rest as in `sequence_norm_fwd_kernel`.
@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=OFFSETS)
def sequence_norm_bwd_kernel(
    p_grad, p_x, p_weight, p_bias, p_encoder, p_cu_seqlens, p_mean, p_rstd, p_sums, p_grad_x, sequences,
    GELU: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, b_n = _columns(N, BLOCK_N)
    sequence, length, row, rows = _find_rows(p_cu_seqlens, tile, sequences, TILE)
    if rows <= 0:
        return
    encoder = tl.load(p_encoder + sequence)
    b_mean, b_rstd = _load_vector(p_mean, sequence, b_n, N), _load_vector(p_rstd, sequence, b_n, N)
    b_weight, b_bias = _load_vector(p_weight, encoder, b_n, N), _load_vector(p_bias, encoder, b_n, N)
    b_grad_mean = _load_vector(p_sums, sequence, b_n, N) / length
    b_along = _load_vector(p_sums, sequences + sequence, b_n, N) / length
    b_r = tl.arange(0, BLOCK_R)
    place = row * N + b_r[:, None] * N + b_n[None, :]
    for first in range(0, rows, BLOCK_R):
        there = (b_r < rows - first)[:, None] & (b_n < N)[None, :]
        b_grad, b_normed = _before_activation(p_grad, p_x, place, there, b_mean, b_rstd, b_weight, b_bias, GELU)
        b_grad_x = (b_grad - b_grad_mean - b_normed * b_along) * b_weight * b_rstd
        tl.store(p_grad_x + place, b_grad_x.to(p_grad_x.dtype.element_ty), mask=there)
        place += BLOCK_R * N


# p_sums: float32 [2, sequences, N]. p_encoder: int32 [sequences]. p_grad_weight, p_grad_bias: [E, N].
# Programs: an encoder times a block of columns.
@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=OFFSETS)
def sequence_norm_bwd_parameters_kernel(
    p_sums, p_encoder, p_grad_weight, p_grad_bias, sequences,
    N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    encoder, b_n = _columns(N, BLOCK_N)
    b_weight = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    b_bias = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for first in range(0, sequences, BLOCK_R):
        b_p = first + tl.arange(0, BLOCK_R)
        own = tl.load(p_encoder + b_p, mask=b_p < sequences, other=-1) == encoder
        there = own[:, None] & (b_n < N)[None, :]
        place = b_p.to(tl.int64)[:, None] * N + b_n[None, :]
        b_bias += tl.load(p_sums + place, mask=there, other=0.0)
        b_weight += tl.load(p_sums + sequences.to(tl.int64) * N + place, mask=there, other=0.0)
    at = encoder.to(tl.int64) * N + b_n
    tl.store(p_grad_weight + at, tl.sum(b_weight, 0).to(p_grad_weight.dtype.element_ty), mask=b_n < N)
    tl.store(p_grad_bias + at, tl.sum(b_bias, 0).to(p_grad_bias.dtype.element_ty), mask=b_n < N)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, encoder: Tensor, cu_seqlens: Tensor, eps: float, activation: str
) -> Tensor:
    check_dtypes("sequence_norm", x, weight, bias)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, weight, bias, encoder, cu_seqlens = contiguous(x, weight, bias, encoder, cu_seqlens)
    mean, rstd = _statistics(x, cu_seqlens, eps)
    _launch(
        sequence_norm_fwd_kernel, _tiles(x, encoder), x, weight, bias, encoder, cu_seqlens, mean, rstd, out,
        encoder.shape[0], GELU=activation == "gelu", N=x.shape[1], TILE=_tile_rows(),
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    encoder: Tensor,
    cu_seqlens: Tensor,
    eps: float,
    activation: str,
    need_x: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias = (
        torch.empty(t.shape if needed else 0, dtype=t.dtype, device=t.device)
        for t, needed in ((x, need_x), (weight, need_parameters), (bias, need_parameters))
    )
    inputs = contiguous(grad, x, weight, bias, encoder, cu_seqlens)
    inputs += _statistics(inputs[1], inputs[5], eps)
    tiles, sequences = _tiles(x, encoder), encoder.shape[0]
    sizes = {"N": x.shape[1], "TILE": _tile_rows()}
    gelu = activation == "gelu"
    tile_sums, sums = (torch.empty(2, k, x.shape[1], dtype=torch.float32, device=x.device) for k in (tiles, sequences))
    _launch(sequence_norm_tile_sums_kernel, tiles, *inputs, tile_sums, sequences, tiles, GELU=gelu, **sizes)
    _launch(sequence_norm_sums_kernel, 2 * sequences, tile_sums, inputs[5], sums, sequences, tiles, **sizes)
    if need_x:
        _launch(sequence_norm_bwd_kernel, tiles, *inputs, sums, grad_x, sequences, GELU=gelu, **sizes)
    if need_parameters:
        _launch(
            sequence_norm_bwd_parameters_kernel, weight.shape[0], sums, inputs[4], grad_weight, grad_bias, sequences,
            N=x.shape[1],
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def _tile_rows() -> int:
    return setting("norm_tile", 1024)


def _tiles(x: Tensor, encoder: Tensor) -> int:
    sequences = encoder.shape[0]
    return x.shape[0] // _tile_rows() + sequences if sequences else 0


def _statistics(x: Tensor, cu_seqlens: Tensor, eps: float) -> list[Tensor]:
    """Mean and 1 / std of each channel of each sequence, float32 [P, N]."""
    sequences, sizes = cu_seqlens.shape[0] - 1, {"N": x.shape[1], "TILE": _tile_rows()}
    tiles = _tiles(x, cu_seqlens[1:])
    tile_mean, tile_squares, mean, rstd = (
        torch.empty(k, x.shape[1], dtype=torch.float32, device=x.device) for k in (tiles, tiles, sequences, sequences)
    )
    _launch(sequence_norm_tile_stats_kernel, tiles, x, cu_seqlens, tile_mean, tile_squares, sequences, **sizes)
    _launch(sequence_norm_stats_kernel, sequences, tile_mean, tile_squares, cu_seqlens, mean, rstd, eps, **sizes)
    return [mean, rstd]


def _launch(kernel: Any, count: int, *args: Any, N: int, **constexprs: Any) -> None:
    block_r, block_n = setting("norm_block", (32, 64))
    programs = count * cdiv(N, block_n)
    launch(kernel, programs, *args, N=N, **constexprs, BLOCK_R=block_r, BLOCK_N=block_n, num_warps=4, num_stages=1)


def compilations(capability: int) -> Iterator[Compilation]:
    def norm(dtype: torch.dtype) -> None:
        x, weight = (torch.empty(k, 512, dtype=dtype, device="meta") for k in (96000, 2))
        encoder, cu_seqlens = (torch.empty(k, dtype=torch.int32, device="meta") for k in (8, 9))
        forward(x, weight, weight, encoder, cu_seqlens, 1e-5, "gelu")
        backward(x, x, weight, weight, encoder, cu_seqlens, 1e-5, "gelu", True, True)

    calls = {"512 columns, bf16": lambda: norm(torch.bfloat16), "512 columns, fp32": lambda: norm(torch.float32)}
    yield from recorded(capability, calls)
