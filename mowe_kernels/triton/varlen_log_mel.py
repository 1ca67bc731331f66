"""Triton `varlen_log_mel`: filters and logarithms with the peak of every tile, then what needs the clip's peak.

A tile is a block of frames, or of rows, of one clip, numbered as `find_sequence` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._device import add_product
from mowe_kernels.triton._launch import (
    Tuning,
    cdiv,
    check_dtypes,
    contiguous,
    hardware,
    launch,
    next_power_of_2,
    recorded,
    setting,
)
from mowe_kernels.triton._sequences import find_sequence

OFFSETS = ["p_cu_frames", "p_cu_rows"]


class Tile(NamedTuple):
    """bm: frames of a program. bn: filters of a program, at most. bk: frequencies that are multiplied at once."""

    bm: int
    bn: int
    bk: int
    num_warps: int


TILE = Tile(64, 128, 16, 8)
CANDIDATES = Tile(32, 128, 16, 4), Tile(64, 64, 16, 4), Tile(128, 32, 16, 4), Tile(64, 32, 32, 4)
FINISH = 64, 1024  # rows of a program, and how many of their elements it works on at once


@triton.jit
def _largest(b):
    """The largest value, NaN where there is one."""
    return tl.where(tl.max((b != b).to(tl.int32)) > 0, float("nan"), tl.max(b))


# p_spectrum: float32 [R, K, 2]. p_filters: float32 [K, N]. p_cu_frames, p_cu_rows: int32 [clips + 1].
# p_rows: float32 [rows, N], of which those of frames get their logarithms. p_peaks: float32 [tiles, blocks of filters].
# Programs: a tile times a block of filters.
@triton.jit(do_not_specialize=["clips"], do_not_specialize_on_alignment=OFFSETS)
def log_mel_kernel(
    p_spectrum, p_filters, p_cu_frames, p_cu_rows, p_rows, p_peaks, clips,
    K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    clip, first = find_sequence(p_cu_frames, tl.program_id(0) // BLOCKS, clips, BM)
    frame = tl.load(p_cu_frames + clip) + first
    frames = tl.load(p_cu_frames + clip + 1) - frame
    if frames <= 0:
        return
    b_m = tl.arange(0, BM)
    b_n = tl.program_id(0) % BLOCKS * BN + tl.arange(0, BN)
    b_k = tl.arange(0, BK)
    b_part = tl.arange(0, 2 * BK)  # real, imaginary, real, ...
    p_spectrum += frame.to(tl.int64) * (2 * K)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        there = (b_m < frames)[:, None] & (b_part < 2 * (K - k))[None, :]
        b_parts = tl.load(p_spectrum + b_m[:, None] * (2 * K) + 2 * k + b_part[None, :], mask=there, other=0.0)
        b_power = tl.sum((b_parts * b_parts).reshape(BM, BK, 2), 2)
        there = (b_k < K - k)[:, None] & (b_n < N)[None, :]
        b_filters = tl.load(p_filters + (k + b_k)[:, None] * N + b_n[None, :], mask=there, other=0.0)
        acc = add_product(acc, b_power, b_filters)
    b_log = tl.log(tl.maximum(acc, 1e-10, propagate_nan=tl.PropagateNan.ALL))
    b_log = tl.fma(b_log, 0.4342944920063019, b_log * -1.0103050118726e-08)  # log10(e) in two parts, for its rounding
    there = (b_m < frames)[:, None] & (b_n < N)[None, :]
    p_rows += (tl.load(p_cu_rows + clip) + first).to(tl.int64) * N
    tl.store(p_rows + b_m[:, None] * N + b_n[None, :], b_log, mask=there)
    tl.store(p_peaks + tl.program_id(0), _largest(tl.where(there, b_log, float("-inf"))))


# p_rows: float32 [rows, N], read and written. p_peaks: float32 [tiles of BM frames, BLOCKS].
# p_cu_frames, p_cu_rows: int32 [clips + 1]. Programs: BR rows of a clip.
@triton.jit(do_not_specialize=["clips"], do_not_specialize_on_alignment=OFFSETS)
def log_mel_finish_kernel(
    p_rows, p_peaks, p_cu_frames, p_cu_rows, clips,
    N: tl.constexpr, BM: tl.constexpr, BLOCKS: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    clip, first = find_sequence(p_cu_rows, tl.program_id(0), clips, BR)
    row = tl.load(p_cu_rows + clip) + first
    rows = tl.minimum(tl.load(p_cu_rows + clip + 1) - row, BR)
    if rows <= 0:
        return
    start = tl.load(p_cu_frames + clip)
    frames = tl.load(p_cu_frames + clip + 1) - start
    p_peaks += (start // BM + clip) * BLOCKS
    peaks = tl.cdiv(frames, BM) * BLOCKS
    WIDTH: tl.constexpr = 128
    b_peak = tl.full([WIDTH], float("-inf"), tl.float32)
    for at in range(0, peaks, WIDTH):
        b_at = at + tl.arange(0, WIDTH)
        b_other = tl.load(p_peaks + b_at, mask=b_at < peaks, other=float("-inf"))
        b_peak = tl.maximum(b_peak, b_other, propagate_nan=tl.PropagateNan.ALL)
    least = _largest(b_peak) - 8.0
    p_rows += row.to(tl.int64) * N
    heard = tl.minimum(frames - first, rows) * N  # values of the tile that come from frames; the others are silence
    for at in range(0, rows * N, BLOCK):
        b_at = at + tl.arange(0, BLOCK)
        there = b_at < rows * N
        b_log = tl.load(p_rows + b_at, mask=b_at < heard, other=-10.0)
        b_log = tl.maximum(b_log, least, propagate_nan=tl.PropagateNan.ALL)
        tl.store(p_rows + b_at, 0.25 * b_log + 1.0, mask=there)


def forward(spectrum: Tensor, filters: Tensor, cu_frames: Tensor, cu_rows: Tensor, num_rows: int) -> Tensor:
    parts = torch.view_as_real(spectrum)
    check_dtypes("varlen_log_mel", parts, filters)
    (frames, k), n, clips = spectrum.shape, filters.shape[1], cu_frames.shape[0] - 1
    tile = setting("log_mel_tile", TILE, hardware(filters.device), f"{n} filters")
    block_r, block = setting("log_mel_finish", FINISH)
    bn = max(16, min(tile.bn, next_power_of_2(n)))
    tiles, blocks = frames // tile.bm + clips, cdiv(n, bn)
    rows = torch.empty(num_rows, n, dtype=torch.float32, device=filters.device)
    peaks = torch.empty(tiles, blocks, dtype=torch.float32, device=filters.device)
    parts, filters, cu_frames, cu_rows = contiguous(parts, filters, cu_frames, cu_rows)
    launch(
        log_mel_kernel, tiles * blocks, parts, filters, cu_frames, cu_rows, rows, peaks, clips,
        K=k, N=n, BM=tile.bm, BN=bn, BK=tile.bk, num_warps=tile.num_warps, num_stages=2,
    )  # fmt: skip
    launch(
        log_mel_finish_kernel, num_rows // block_r + clips, rows, peaks, cu_frames, cu_rows, clips,
        N=n, BM=tile.bm, BLOCKS=blocks, BR=block_r, BLOCK=block, num_warps=4, num_stages=1,
    )  # fmt: skip
    return rows


def tunings(device: torch.device, rows: int) -> Iterator[Tuning]:
    """Eight clips through the banks of Whisper encoders."""
    spectrum = torch.randn(rows // 8 * 8, 201, dtype=torch.complex64, device=device)
    offsets = torch.arange(9, dtype=torch.int32, device=device) * (rows // 8)
    for n in (80, 128):
        filters = torch.rand(201, n, device=device)
        call = partial(forward, spectrum, filters, offsets, offsets, len(spectrum))
        yield Tuning("log_mel_tile", f"{n} filters", CANDIDATES, call)


def compilations(capability: int) -> Iterator[Compilation]:
    def log_mel(n: int) -> None:
        spectrum = torch.empty(100_000, 201, dtype=torch.complex64, device="meta")
        offsets = torch.empty(65, dtype=torch.int32, device="meta")
        forward(spectrum, torch.empty(201, n, device="meta"), offsets, offsets, 200_000)

    yield from recorded(capability, {f"{n} filters": lambda n=n: log_mel(n) for n in (80, 128)})
