"""Where the features an output row of `mixture_project` meets lie, and which output rows met a base frame.

`sources` leads from an output row and a tap to the row of features, for the products over features and those over rows;
`targets` and `origins` lead back, from a place on the padded time line to the base frame it is and to the output rows
that saw it. The base features are tabled as a family of one slot, always there, on the base's own clock.
"""

from __future__ import annotations

import triton
import triton.language as tl

ABSENT = tl.constexpr(-2)  # in `sources`: none of the row's taps meets this slot; -1: this tap does not

TABLES = ["p_cu_seqlens", "p_base_starts", "p_base_lengths", "p_position", "p_first", "p_last"]
TABLES += ["p_weights", "p_sources", "p_scale", "p_targets", "p_origins", "p_base_sources", "p_parts"]
COUNTS = ["rows", "places", "frames", "batch", "half", "a", "c", "d"]


@triton.jit
def floor_div(x, y):
    """Rounded towards minus infinity, for y > 0."""
    quotient = x // y
    return quotient - (quotient * y > x).to(tl.int32)


@triton.jit
def find_clips(p_cu_seqlens, b_row, batch, half, EXTRA: tl.constexpr):
    """Clip of each row; clip b's begin at cu_seqlens[b] + b * EXTRA. half: a power of two, at least batch / 2."""
    b_clip = tl.zeros_like(b_row)
    step = half
    while step > 0:
        b_next = b_clip + step
        b_first = tl.load(p_cu_seqlens + b_next, mask=b_next < batch, other=0) + b_next * EXTRA
        b_clip = tl.where((b_next < batch) & (b_first <= b_row), b_next, b_clip)
        step = step // 2
    return b_clip


@triton.jit
def pair_of(p_position, b_clip, slot, SLOTS: tl.constexpr, there):
    """The pair that serves a slot of each clip; without p_position a clip is its own pair."""
    if p_position is None:
        return b_clip
    else:
        return tl.load(p_position + b_clip * SLOTS + slot, mask=there, other=0)


# p_cu_seqlens: int32 [batch + 1]. p_base_lengths: int32 [batch]. p_position: int32 [batch, SLOTS] or None.
# p_weights: [batch, SLOTS] or None. p_first, p_last: int32 [P], rows of each pair.
# p_sources: int32 [SLOTS, TAPS, rows]. p_scale: float32 [SLOTS, rows].
@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def mixture_project_sources_kernel(
    p_cu_seqlens,
    p_base_lengths,
    p_position,
    p_weights,
    p_first,
    p_last,
    p_sources,
    p_scale,
    rows,
    batch,
    half,
    a,
    c,
    d,
    SLOTS: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BM: tl.constexpr,
):
    """Where the features of one family lie for each output row, base frame t meeting frame (a * t + c) // d."""
    b_row = tl.program_id(0) * BM + tl.arange(0, BM)
    there = b_row < tl.load(p_cu_seqlens + batch)
    b_clip = find_clips(p_cu_seqlens, b_row, batch, half, 0)
    b_window = (b_row - tl.load(p_cu_seqlens + b_clip)) * STRIDE - PADDING
    b_frames = tl.load(p_base_lengths + b_clip, mask=there, other=0)
    for slot in range(SLOTS):
        b_pair = pair_of(p_position, b_clip, slot, SLOTS, there)
        b_first = tl.load(p_first + b_pair, mask=there, other=0)
        b_count = tl.load(p_last + b_pair, mask=there, other=0) - b_first
        for tap in range(TAPS):
            b_t = b_window + tap
            b_nearest = floor_div(b_t.to(tl.int64) * a + c, d)
            # A frame just past an end takes the last one, as the clocks differ by less; farther out is silence.
            b_met = (b_t >= 0) & (b_t < b_frames) & (b_nearest >= -1) & (b_nearest <= b_count)
            b_source = b_first + tl.minimum(tl.maximum(b_nearest, 0), b_count - 1).to(tl.int32)
            b_source = tl.where(b_count > 0, tl.where(b_met, b_source, -1), ABSENT)
            tl.store(p_sources + (slot * TAPS + tap) * rows.to(tl.int64) + b_row, b_source, mask=b_row < rows)
        if p_weights is not None:
            b_scale = tl.load(p_weights + b_clip * SLOTS + slot, mask=there, other=0.0).to(tl.float32)
            tl.store(p_scale + slot * rows + b_row, b_scale, mask=b_row < rows)


# p_cu_seqlens: int32 [batch + 1]. p_base_starts, p_base_lengths: int32 [batch]. p_position: int32 [batch, SLOTS] or
# None. p_first, p_last: int32 [P]. p_targets: int32 [SLOTS, STRIDE, places]. p_origins: int32 [REACH, places].
@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def mixture_project_targets_kernel(
    p_cu_seqlens,
    p_base_starts,
    p_base_lengths,
    p_position,
    p_first,
    p_last,
    p_targets,
    p_origins,
    places,
    batch,
    half,
    SLOTS: tl.constexpr,
    REACH: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BM: tl.constexpr,
):
    """Base frames and output rows of each place m of a clip.

    Base frame m * STRIDE + phase - PADDING is seen by tap phase + STRIDE * back of the clip's output frame m - back;
    a clip of U output frames has U + REACH - 1 places. -1 stands for none, or for a slot the clip does not use.
    """
    b_place = tl.program_id(0) * BM + tl.arange(0, BM)
    there = b_place < tl.load(p_cu_seqlens + batch) + batch * (REACH - 1)
    b_clip = find_clips(p_cu_seqlens, b_place, batch, half, REACH - 1)
    b_row = tl.load(p_cu_seqlens + b_clip)
    b_rows = tl.load(p_cu_seqlens + b_clip + 1) - b_row
    b_m = b_place - b_row - b_clip * (REACH - 1)
    b_start = tl.load(p_base_starts + b_clip)
    b_frames = tl.load(p_base_lengths + b_clip)
    for slot in range(SLOTS):
        b_pair = pair_of(p_position, b_clip, slot, SLOTS, there)
        b_used = there & (tl.load(p_last + b_pair) > tl.load(p_first + b_pair))
        for phase in range(STRIDE):
            b_t = b_m * STRIDE + phase - PADDING
            b_target = tl.where(b_used & (b_t >= 0) & (b_t < b_frames), b_start + b_t, -1)
            at = (slot * STRIDE + phase) * places.to(tl.int64) + b_place
            tl.store(p_targets + at, b_target, mask=b_place < places)
    if p_origins is not None:
        for back in range(REACH):
            b_u = b_m - back
            b_origin = tl.where(there & (b_u >= 0) & (b_u < b_rows), b_row + b_u, -1)
            tl.store(p_origins + back * places + b_place, b_origin, mask=b_place < places)
