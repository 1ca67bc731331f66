"""The products of `mixture_project`, over features found through the tables of `_mixture_tables`."""

from __future__ import annotations

import triton
import triton.language as tl

from mowe_kernels.triton._device import add_product
from mowe_kernels.triton._epilogue import write
from mowe_kernels.triton._gemm import halves
from mowe_kernels.triton._mixture_tables import ABSENT, COUNTS, TABLES, floor_div

WIDTH = tl.constexpr(1024)  # of a table searched at once


@triton.jit
def gather(p, b_row, col, COLS: tl.constexpr, BC: tl.constexpr):
    """Columns col .. col + BC of rows of a matrix of COLS columns, zero where the row is negative."""
    b_c = col + tl.arange(0, BC)
    b_there = (b_row >= 0)[:, None]
    if COLS % BC != 0:
        b_there = b_there & (b_c < COLS)[None, :]
    return tl.load(p + b_row.to(tl.int64)[:, None] * COLS + b_c[None, :], mask=b_there, other=0.0)


@triton.jit
def project(
    acc, p_x, p_sources, p_weight, rows, row, col,
    N: tl.constexpr, TAPS: tl.constexpr, D: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc + the windows gathered from features p_x [., D] times weights [N, TAPS, D], their block at (row, col)."""
    STEPS: tl.constexpr = (D + BK - 1) // BK
    b_row, b_n = row + tl.arange(0, acc.shape[0]), col + tl.arange(0, acc.shape[1])
    p_columns = p_weight + b_n[None, :] * (TAPS * D)
    for step in range(TAPS * STEPS):
        tap = step // STEPS
        c = (step - tap * STEPS) * BK
        b_c = c + tl.arange(0, BK)
        b_source = tl.load(p_sources + tap * rows.to(tl.int64) + b_row, mask=b_row < rows, other=ABSENT)
        b_x = gather(p_x, b_source, c, D, BK)
        b_there = (b_n < N)[None, :] & (b_c < D)[:, None]
        b_w = tl.load(p_columns + (tap * D + b_c)[:, None], mask=b_there, other=0.0)
        acc = add_product(acc, b_x, b_w)
    return acc


# p_base: [Rb, DB]. p_base_sources: int32 [TAPS, rows]. p_base_weight: [N, TAPS, DB]. p_rows: [R, D].
# p_sources: int32 [SLOTS, TAPS, rows]. p_row_weight: [SLOTS, N, TAPS, D]. p_scale: float32 [SLOTS, rows]. p_bias: [N].
# p_sum: float32 [rows, N]. p_pre, p_out: [rows, N].
@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def mixture_project_fwd_kernel(
    p_out,
    p_base,
    p_base_sources,
    p_base_weight,
    p_rows,
    p_sources,
    p_row_weight,
    p_scale,
    p_bias,
    p_sum,
    p_pre,
    rows,
    SLOTS: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    DB: tl.constexpr,
    D: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """act(sum + the base's part + a family's slots', scaled, + bias); the slots no row of the tile uses are skipped."""
    column_tiles: tl.constexpr = (N + BN - 1) // BN
    row = tl.program_id(0) // column_tiles * BM
    col = tl.program_id(0) % column_tiles * BN
    b_row, b_n = row + tl.arange(0, BM), col + tl.arange(0, BN)
    b_there = b_row < rows
    if p_sum is None:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
    else:
        b_at = b_row.to(tl.int64)[:, None] * N + b_n[None, :]
        acc = tl.load(p_sum + b_at, mask=b_there[:, None] & (b_n < N)[None, :], other=0.0)
    if p_base is not None:
        acc = project(acc, p_base, p_base_sources, p_base_weight, rows, row, col, N, TAPS, DB, BK)
    if p_rows is not None:
        for slot in range(SLOTS):
            p_slot = p_sources + slot * TAPS * rows.to(tl.int64)
            if tl.max(tl.load(p_slot + b_row, mask=b_there, other=ABSENT), 0) > ABSENT:
                p_weight = p_row_weight + tl.cast(slot, tl.int64) * (N * TAPS * D)
                part = tl.zeros((BM, BN), dtype=tl.float32)
                part = project(part, p_rows, p_slot, p_weight, rows, row, col, N, TAPS, D, BK)
                acc += part * tl.load(p_scale + slot * rows + b_row, mask=b_there, other=0.0)[:, None]
    left, right = halves(acc)
    quarters = halves(left) + halves(right)
    here = row.to(tl.int64) * N
    for i in tl.static_range(4):
        write(
            quarters[i],
            p_bias,
            None,
            None if p_pre is None else p_pre + here,
            p_out + here,
            rows - row,
            col + i * (BN // 4),
            N,
            N,
            GELU,
        )


# p_grad: [rows, N]. p_targets: int32 [SLOTS, STRIDE, places]. p_origins: int32 [REACH, places].
# p_weight: [SLOTS, N, TAPS, D]. p_out: [SLOTS, frames, D].
@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def mixture_project_bwd_features_kernel(
    p_grad,
    p_targets,
    p_origins,
    p_weight,
    p_out,
    places,
    frames,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradient of the features of one slot at base frames of one phase, not yet scaled."""
    STEPS: tl.constexpr = (N + BK - 1) // BK
    column_tiles: tl.constexpr = (D + BN - 1) // BN
    place_tiles = tl.cdiv(places, BM)
    col = tl.program_id(0) % column_tiles * BN
    tile = tl.program_id(0) // column_tiles
    slot = tile // (place_tiles * STRIDE)
    phase = tile // place_tiles % STRIDE
    b_place = tile % place_tiles * BM + tl.arange(0, BM)
    b_there = b_place < places
    b_target = tl.load(p_targets + (slot * STRIDE + phase) * places.to(tl.int64) + b_place, mask=b_there, other=-1)
    if tl.max(b_target, 0) < 0:
        return
    b_c = col + tl.arange(0, BN)
    p_columns = p_weight + slot.to(tl.int64) * (N * TAPS * D) + b_c[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(tl.maximum(TAPS - phase + STRIDE - 1, 0) // STRIDE * STEPS):
        back = step // STEPS
        n = (step - back * STEPS) * BK
        b_n = n + tl.arange(0, BK)
        b_origin = tl.load(p_origins + back * places + b_place, mask=b_there, other=-1)
        b_g = gather(p_grad, b_origin, n, N, BK)
        b_at = b_n[:, None] * (TAPS * D) + (phase + back * STRIDE) * D
        b_w = tl.load(p_columns + b_at, mask=(b_n < N)[:, None] & (b_c < D)[None, :], other=0.0)
        acc = add_product(acc, b_g, b_w)
    b_at = (slot * frames.to(tl.int64) + b_target)[:, None] * D + b_c[None, :]
    tl.store(p_out + b_at, acc.to(p_out.dtype.element_ty), mask=(b_target >= 0)[:, None] & (b_c < D)[None, :])


# p_grad: [SLOTS, rows, N], scaled. p_x: [R, D]. p_sources: int32 [SLOTS, TAPS, rows].
# p_grad_weight: [SLOTS, N, TAPS, D].
@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def mixture_project_bwd_weight_kernel(
    p_grad,
    p_x,
    p_sources,
    p_grad_weight,
    rows,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """BN outputs and BC features of one tap of one slot, summed over the rows from the first that meets it on."""
    column_tiles: tl.constexpr = (D + BC - 1) // BC
    row_tiles: tl.constexpr = (N + BN - 1) // BN
    col = tl.program_id(0) % column_tiles * BC
    tap = tl.program_id(0) // column_tiles % TAPS
    n = tl.program_id(0) // (column_tiles * TAPS) % row_tiles * BN
    slot = tl.program_id(0) // (column_tiles * TAPS * row_tiles)
    p_table = p_sources + (slot * TAPS + tap) * rows.to(tl.int64)
    first = rows
    last = 0
    for chunk in range(0, rows, WIDTH):
        b_row = chunk + tl.arange(0, WIDTH)
        b_met = tl.load(p_table + b_row, mask=b_row < rows, other=-1) >= 0
        first = tl.minimum(first, tl.min(tl.where(b_met, b_row, rows), 0))
        last = tl.maximum(last, tl.max(tl.where(b_met, b_row + 1, 0), 0))
    b_n, b_c = n + tl.arange(0, BN), col + tl.arange(0, BC)
    p_rows = p_grad + slot * rows.to(tl.int64) * N
    acc = tl.zeros((BN, BC), dtype=tl.float32)
    for row in range(first, last, BK):
        b_row = row + tl.arange(0, BK)
        b_source = tl.load(p_table + b_row, mask=b_row < rows, other=-1)
        b_x = gather(p_x, b_source, col, D, BC)
        b_at = b_row.to(tl.int64)[:, None] * N + b_n[None, :]
        b_g = tl.load(p_rows + b_at, mask=(b_row < rows)[:, None] & (b_n < N)[None, :], other=0.0)
        acc = add_product(acc, tl.trans(b_g), b_x)
    b_at = ((slot * N + b_n) * TAPS + tap).to(tl.int64)[:, None] * D + b_c[None, :]
    b_there = (b_n < N)[:, None] & (b_c < D)[None, :]
    tl.store(p_grad_weight + b_at, acc.to(p_grad_weight.dtype.element_ty), mask=b_there)


# p_grad: [SLOTS, frames, D], gradient of the features at base frames. p_base_starts, p_base_lengths: int32 [batch].
# p_position: int32 [batch, SLOTS]. p_weights: [batch, SLOTS]. p_first, p_last: int32 [P]. p_grad_rows: [R, D].
@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def mixture_project_bwd_rows_kernel(
    p_grad,
    p_base_starts,
    p_base_lengths,
    p_position,
    p_weights,
    p_first,
    p_last,
    p_grad_rows,
    frames,
    a,
    c,
    d,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Every PARTS-th tile of one pair's rows: the base frames that met a row, over the slots the pair serves."""
    column_tiles: tl.constexpr = (D + BC - 1) // BC
    b_c = tl.program_id(0) % column_tiles * BC + tl.arange(0, BC)
    part = tl.program_id(0) // column_tiles % PARTS
    clip = tl.program_id(0) // (column_tiles * PARTS * SLOTS)
    slot = tl.program_id(0) // (column_tiles * PARTS) % SLOTS
    pair = tl.load(p_position + clip * SLOTS + slot)
    first = tl.load(p_first + pair)
    count = tl.load(p_last + pair) - first
    for earlier in range(slot):
        served = tl.load(p_position + clip * SLOTS + earlier) == pair
        count = tl.where(served, 0, count)  # the earlier slot sees to the pair
    start = tl.load(p_base_starts + clip)
    base_frames = tl.load(p_base_lengths + clip)
    for tile in range(part * BM, count, PARTS * BM):
        b_w = tile + tl.arange(0, BM)
        b_from = tl.where(b_w == 0, -1, b_w).to(tl.int64)
        b_to = tl.where(b_w == count - 1, count, b_w).to(tl.int64) + 1
        b_t = tl.maximum(-floor_div(c - b_from * d, a), 0)
        b_stop = tl.minimum(-floor_div(c - b_to * d, a), base_frames)
        b_stop = tl.where(b_w < count, b_stop, 0)
        acc = tl.zeros((BM, BC), dtype=tl.float32)
        for other in range(slot, SLOTS):
            if tl.load(p_position + clip * SLOTS + other) == pair:
                scale = tl.load(p_weights + clip * SLOTS + other).to(tl.float32)
                for i in range(tl.max(b_stop - b_t, 0).to(tl.int32)):
                    b_there = (b_t + i < b_stop)[:, None] & (b_c < D)[None, :]
                    b_at = (other * frames.to(tl.int64) + start + b_t + i)[:, None] * D + b_c[None, :]
                    acc += scale * tl.load(p_grad + b_at, mask=b_there, other=0.0).to(tl.float32)
        b_at = (first + b_w).to(tl.int64)[:, None] * D + b_c[None, :]
        b_there = (b_w < count)[:, None] & (b_c < D)[None, :]
        tl.store(p_grad_rows + b_at, acc.to(p_grad_rows.dtype.element_ty), mask=b_there)


# p_grad: [SLOTS, frames, D], gradient of the features at base frames. p_rows: [R, D]. p_base_starts, p_base_lengths:
# int32 [batch]. p_position: int32 [batch, SLOTS]. p_first, p_last: int32 [P]. p_parts: float32 [batch, SLOTS, PARTS].
@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def mixture_project_bwd_scale_kernel(
    p_grad,
    p_rows,
    p_base_starts,
    p_base_lengths,
    p_position,
    p_first,
    p_last,
    p_parts,
    frames,
    a,
    c,
    d,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Sum of gradient times features over every PARTS-th tile of base frames of one clip and slot."""
    part = tl.program_id(0) % PARTS
    served = tl.program_id(0) // PARTS
    clip = served // SLOTS
    pair = tl.load(p_position + served)
    first = tl.load(p_first + pair)
    count = tl.load(p_last + pair) - first
    base_frames = tl.where(count > 0, tl.load(p_base_lengths + clip), 0)
    start = served % SLOTS * frames.to(tl.int64) + tl.load(p_base_starts + clip)
    acc = tl.zeros((BM, BC), dtype=tl.float32)
    for tile in range(part * BM, base_frames, PARTS * BM):
        b_t = tile + tl.arange(0, BM)
        b_nearest = floor_div(b_t.to(tl.int64) * a + c, d)
        b_met = (b_t < base_frames) & (b_nearest >= -1) & (b_nearest <= count)
        b_row = tl.where(b_met, first + tl.minimum(tl.maximum(b_nearest, 0), count - 1), -1)
        b_frame = tl.where(b_met, start + b_t, -1)
        for col in range(0, D, BC):
            acc += gather(p_grad, b_frame, col, D, BC).to(tl.float32) * gather(p_rows, b_row, col, D, BC).to(tl.float32)
    tl.store(p_parts + tl.program_id(0), tl.sum(tl.sum(acc, 1), 0))
