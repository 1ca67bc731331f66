"""The kernels of `grouped_conv1d`: matrix products that read the windows of a sequence where they lie.

A window of TAPS frames with CG channels each is a row of K = TAPS * CG columns, in the order of the weights; column k
belongs to tap k // CG. G groups of channels are G products side by side: NG of the N outputs see CG of the C channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mowe_kernels.triton._device import add_product
from mowe_kernels.triton._epilogue import write
from mowe_kernels.triton._gemm import halves
from mowe_kernels.triton._sequences import find_sequence, overlapping

TABLES = ["p_starts", "p_ends", "p_lengths", "p_encoder", "p_cu_seqlens"]


@triton.jit
def load_windows(
    p, b_line, b_frame, frames, k, columns, PITCH: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Columns k .. k + BK of windows that begin at frames b_frame of a sequence, zero outside it: [rows, BK].

    p + b_line: where the windows begin. frames: how many the sequence has, PITCH elements from one to the next, WIDTH
    of them in the window. columns: how many a window has. STEP: 1 for windows forward in time, -1 for backward.
    """
    b_k = k + tl.arange(0, BK)
    if WIDTH % BK == 0:  # the columns lie in one tap
        tap = k // WIDTH
        b_there = ((b_frame + tap * STEP >= 0) & (b_frame + tap * STEP < frames))[:, None]
    else:
        tap = b_k // WIDTH
        b_seen = b_frame[:, None] + (tap * STEP)[None, :]
        b_there = (b_seen >= 0) & (b_seen < frames) & (b_k < columns)[None, :]
    b_column = b_k + tap * (STEP * PITCH - WIDTH)
    return tl.load(p + b_line[:, None] + b_column[None, :], mask=b_there, other=0.0)


# p_x: [S, C]. p_weight: [E, N, K]. p_bias: [E, N]. p_starts, p_lengths, p_encoder: int32 [pairs].
# p_cu_seqlens: int32 [pairs + 1]. p_positions: [E, max_positions, N]. p_residual, p_pre, p_out: [R, N].
@triton.jit(do_not_specialize=["pairs", "max_positions"], do_not_specialize_on_alignment=TABLES)
def grouped_conv1d_fwd_kernel(
    p_x,
    p_weight,
    p_bias,
    p_starts,
    p_lengths,
    p_encoder,
    p_cu_seqlens,
    p_positions,
    p_residual,
    p_pre,
    p_out,
    pairs,
    max_positions,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of BM frames of one sequence and BN outputs of one group; the tiles of the same frames run together."""
    C: tl.constexpr = CG * GROUPS
    K: tl.constexpr = TAPS * CG
    NG: tl.constexpr = N // GROUPS
    group_tiles: tl.constexpr = (NG + BN - 1) // BN
    pair, first = find_sequence(p_cu_seqlens, tl.program_id(0) // (GROUPS * group_tiles), pairs, BM)
    row = tl.load(p_cu_seqlens + pair)
    frames_out = tl.load(p_cu_seqlens + pair + 1) - row
    if first >= frames_out:
        return
    encoder = tl.load(p_encoder + pair)
    frames_in = tl.load(p_lengths + pair)
    group = tl.program_id(0) // group_tiles % GROUPS
    b_m = tl.arange(0, BM)
    b_t = first + b_m
    column = tl.program_id(0) % group_tiles * BN
    b_ng = column + tl.arange(0, BN)
    b_n = group * NG + b_ng
    p_frames = p_x + (tl.load(p_starts + pair) + first * STRIDE - PADDING).to(tl.int64) * C + group * CG
    p_columns = p_weight + encoder.to(tl.int64) * N * K + b_n[None, :] * K
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        b_k = k + tl.arange(0, BK)
        b_x = load_windows(p_frames, b_m * (STRIDE * C), b_t * STRIDE - PADDING, frames_in, k, K, C, CG, 1, BK)
        b_w = tl.load(p_columns + b_k[:, None], mask=(b_k < K)[:, None] & (b_ng < NG)[None, :], other=0.0)
        acc = add_product(acc, b_x, b_w)
    here = (row + first).to(tl.int64) * N
    there = encoder.to(tl.int64) * max_positions + first
    left, right = halves(acc)
    quarters = halves(left) + halves(right)  # one after the other: their epilogues need fewer registers
    for i in tl.static_range(4):
        write(
            quarters[i],
            None if p_bias is None else p_bias + encoder * N,
            None if p_residual is None else p_residual + here,
            None if p_pre is None else p_pre + here,
            p_out + here,
            frames_out - first,
            group * NG + column + i * (BN // 4),
            group * NG + NG,
            N,
            GELU,
            p_positions=None if p_positions is None else p_positions + there * N,
            positions=max_positions - first,
        )


# p_grad: [R, N]. p_weight: [E, N, K]. p_starts, p_ends, p_encoder: int32 [pairs], p_ends one past the last frame.
# p_cu_seqlens: int32 [pairs + 1]. p_grad_x: [frames, C].
@triton.jit(do_not_specialize=["pairs", "frames"], do_not_specialize_on_alignment=TABLES)
def grouped_conv1d_bwd_x_kernel(
    p_grad,
    p_weight,
    p_starts,
    p_ends,
    p_encoder,
    p_cu_seqlens,
    p_grad_x,
    pairs,
    frames,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of BM input frames, STRIDE apart, and BN channels of one group.

    Frames STRIDE apart meet the same taps, every STRIDE-th, so a frame's gradient is one window over the output
    frames that saw it, backward in time. Sequences that share frames add up in their order.
    """
    C: tl.constexpr = CG * GROUPS
    NG: tl.constexpr = N // GROUPS
    group_tiles: tl.constexpr = (CG + BN - 1) // BN
    tile = tl.program_id(0) // (GROUPS * group_tiles)
    group = tl.program_id(0) // group_tiles % GROUPS
    low = tile // STRIDE * (BM * STRIDE) + tile % STRIDE
    b_m = tl.arange(0, BM)
    b_frame = low + b_m * STRIDE
    b_c = tl.program_id(0) % group_tiles * BN + tl.arange(0, BN)
    high = tl.minimum(low + (BM - 1) * STRIDE + 1, frames)
    first, last = overlapping(p_starts, p_ends, p_cu_seqlens, None, 0, low, high, pairs)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for pair in range(first, last):
        start = tl.load(p_starts + pair)
        end = tl.load(p_ends + pair)
        row = tl.load(p_cu_seqlens + pair)
        frames_out = tl.load(p_cu_seqlens + pair + 1) - row
        if (start < high) & (end > low) & (frames_out > 0):
            encoder = tl.load(p_encoder + pair)
            place = low - start + PADDING
            tap = (place % STRIDE + STRIDE) % STRIDE
            columns = tl.maximum(TAPS - tap + STRIDE - 1, 0) // STRIDE * NG
            b_mine = (b_frame >= start) & (b_frame < end)
            t = (place - tap) // STRIDE
            b_t = tl.where(b_mine, t + b_m, -1)  # backward from before the first frame, a window is empty
            p_rows = p_grad + (row + t).to(tl.int64) * N + group * NG
            p_matrix = p_weight + ((encoder.to(tl.int64) * N + group * NG) * TAPS + tap) * CG
            for k in range(0, columns, BK):
                b_k = k + tl.arange(0, BK)
                b_reached = (k if NG % BK == 0 else b_k) // NG
                b_line = b_k * (TAPS * CG) + b_reached * (STRIDE * CG - NG * TAPS * CG)
                b_g = load_windows(p_rows, b_m * N, b_t, frames_out, k, columns, N, NG, -1, BK)
                b_w = tl.load(
                    p_matrix + b_line[:, None] + b_c[None, :],
                    mask=(b_k < columns)[:, None] & (b_c < CG)[None, :],
                    other=0.0,
                )
                acc = add_product(acc, b_g, b_w)
    b_at = b_m[:, None] * (STRIDE * C) + (group * CG + b_c)[None, :]
    b_there = (b_frame < frames)[:, None] & (b_c < CG)[None, :]
    tl.store(p_grad_x + low.to(tl.int64) * C + b_at, acc.to(p_grad_x.dtype.element_ty), mask=b_there)


# p_grad: [R, N]. p_x: [S, C]. p_starts, p_lengths, p_encoder: int32 [pairs]. p_cu_seqlens: int32 [pairs + 1].
# p_grad_weight: [splits, E, N, K]. p_grad_bias: [splits, E, N].
@triton.jit(do_not_specialize=["pairs", "splits"], do_not_specialize_on_alignment=TABLES)
def grouped_conv1d_bwd_weight_kernel(
    p_grad,
    p_x,
    p_starts,
    p_lengths,
    p_encoder,
    p_cu_seqlens,
    p_grad_weight,
    p_grad_bias,
    pairs,
    splits,
    E: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of BN outputs and BC columns of one encoder's weights, summed over one part in `splits` of its rows."""
    C: tl.constexpr = CG * GROUPS
    K: tl.constexpr = TAPS * CG
    NG: tl.constexpr = N // GROUPS
    column_tiles: tl.constexpr = (K + BC - 1) // BC
    group_tiles: tl.constexpr = (NG + BN - 1) // BN
    column = tl.program_id(0) % column_tiles * BC
    group_tile = tl.program_id(0) // column_tiles
    group = group_tile // group_tiles % GROUPS
    encoder = group_tile // (group_tiles * GROUPS) % E
    split = group_tile // (group_tiles * GROUPS * E)
    b_ng = group_tile % group_tiles * BN + tl.arange(0, BN)
    b_n = group * NG + b_ng
    b_c = column + tl.arange(0, BC)
    b_k = tl.arange(0, BK)
    rows = tl.load(p_cu_seqlens + pairs)
    first, last = overlapping(p_cu_seqlens, p_cu_seqlens + 1, p_cu_seqlens, p_encoder, encoder, 0, rows, pairs)
    begin = tl.load(p_cu_seqlens + first)
    share = tl.cdiv(tl.cdiv(tl.load(p_cu_seqlens + tl.maximum(first, last)) - begin, splits), BK) * BK
    low = begin + split * share
    high = low + share
    first, last = overlapping(p_cu_seqlens, p_cu_seqlens + 1, p_cu_seqlens, p_encoder, encoder, low, high, pairs)
    acc = tl.zeros((BN, BC), dtype=tl.float32)
    b_sum = tl.zeros((BN,), dtype=tl.float32)
    for pair in range(first, last):
        row = tl.load(p_cu_seqlens + pair)
        stop = tl.minimum(high, tl.load(p_cu_seqlens + pair + 1)) - row
        stop = tl.where(tl.load(p_encoder + pair) == encoder, stop, 0)
        frames_in = tl.load(p_lengths + pair)
        start = tl.load(p_starts + pair) - PADDING
        for t in range(tl.maximum(low - row, 0), stop, BK):
            b_t = t + b_k
            b_there = (b_t < stop)[:, None] & (b_ng < NG)[None, :]
            p_rows = p_grad + (row + t).to(tl.int64) * N
            b_g = tl.load(p_rows + b_k[:, None] * N + b_n[None, :], mask=b_there, other=0.0)
            p_frames = p_x + (start + t * STRIDE).to(tl.int64) * C + group * CG
            b_x = load_windows(
                p_frames, b_k * (STRIDE * C), b_t * STRIDE - PADDING, frames_in, column, K, C, CG, 1, BC
            )  # fmt: skip
            acc = add_product(acc, tl.trans(b_g), b_x)
            if p_grad_bias is not None:
                b_sum += tl.sum(b_g.to(tl.float32), 0)
    at = (split * E + encoder).to(tl.int64) * N
    b_at = b_n[:, None] * K + b_c[None, :]
    b_there = (b_ng < NG)[:, None] & (b_c < K)[None, :]
    tl.store(p_grad_weight + at * K + b_at, acc.to(p_grad_weight.dtype.element_ty), mask=b_there)
    if p_grad_bias is not None:
        b_first = (b_ng < NG) & (column == 0)
        tl.store(p_grad_bias + at + b_n, b_sum.to(p_grad_bias.dtype.element_ty), mask=b_first)


# p_grad: [R, N]. p_encoder: int32 [pairs]. p_cu_seqlens: int32 [pairs + 1]. p_grad_positions: [E, max_positions, N].
@triton.jit(do_not_specialize=["pairs", "max_positions"], do_not_specialize_on_alignment=TABLES)
def grouped_conv1d_bwd_positions_kernel(
    p_grad,
    p_encoder,
    p_cu_seqlens,
    p_grad_positions,
    pairs,
    max_positions,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BM positions of one encoder and BN outputs, summed over its sequences in their order."""
    column_tiles: tl.constexpr = (N + BN - 1) // BN
    row_tiles = tl.cdiv(max_positions, BM)
    tile = tl.program_id(0) // column_tiles
    encoder = tile // row_tiles
    b_t = tile % row_tiles * BM + tl.arange(0, BM)
    b_n = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)
    rows = tl.load(p_cu_seqlens + pairs)
    first, last = overlapping(p_cu_seqlens, p_cu_seqlens + 1, p_cu_seqlens, p_encoder, encoder, 0, rows, pairs)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for pair in range(first, last):
        row = tl.load(p_cu_seqlens + pair)
        frames_out = tl.load(p_cu_seqlens + pair + 1) - row
        frames_out = tl.where(tl.load(p_encoder + pair) == encoder, frames_out, 0)
        b_at = (row + b_t).to(tl.int64)[:, None] * N + b_n[None, :]
        acc += tl.load(p_grad + b_at, mask=(b_t < frames_out)[:, None] & (b_n < N)[None, :], other=0.0).to(tl.float32)
    b_at = (encoder * max_positions + b_t).to(tl.int64)[:, None] * N + b_n[None, :]
    b_there = (b_t < max_positions)[:, None] & (b_n < N)[None, :]
    tl.store(p_grad_positions + b_at, acc.to(p_grad_positions.dtype.element_ty), mask=b_there)
