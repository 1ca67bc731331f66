"""Which sequence a program works on, and which sequences concern it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_sequence(p_cu_seqlens, tile, pairs, BM: tl.constexpr, WIDTH: tl.constexpr = 128):
    """(sequence, first of its own rows) of a tile of BM rows; the row lies past the end where the tile has none.

    p_cu_seqlens: int32 [pairs + 1]. Sequence p owns the tiles from cu_seqlens[p] // BM + p on, never fewer than its
    rows need, so all tiles of R rows are R // BM + pairs. Each round of the search looks at WIDTH sequences at once.
    """
    step = 1
    while step * WIDTH < pairs:
        step *= WIDTH
    sequence = 0
    while step > 0:
        b_p = sequence + tl.arange(0, WIDTH) * step
        b_first = tl.load(p_cu_seqlens + b_p, mask=b_p < pairs, other=0) // BM + b_p
        sequence += (tl.sum(((b_p < pairs) & (b_first <= tile)).to(tl.int32), 0) - 1) * step
        step = step // WIDTH
    return sequence, (tile - tl.load(p_cu_seqlens + sequence) // BM - sequence) * BM


@triton.jit
def overlapping(
    p_begin, p_end, p_cu_seqlens, p_encoder, encoder, low, high, pairs, WIDTH: tl.constexpr = 256
):  # fmt: skip
    """First and one past the last sequence with rows whose span meets low .. high; first >= last where none does.

    p_begin, p_end: int32 [pairs], the spans. p_cu_seqlens: int32 [pairs + 1]. p_encoder: int32 [pairs], to ask for the
    sequences of one encoder; or None. Sequences in between may be others.
    """
    first = pairs
    last = 0
    for chunk in range(0, pairs, WIDTH):
        b_p = chunk + tl.arange(0, WIDTH)
        there = b_p < pairs
        b_hit = tl.load(p_begin + b_p, mask=there, other=high) < high
        b_hit &= tl.load(p_end + b_p, mask=there, other=low) > low
        b_hit &= tl.load(p_cu_seqlens + b_p, mask=there, other=0) < tl.load(p_cu_seqlens + b_p + 1, mask=there, other=0)
        if p_encoder is not None:
            b_hit &= tl.load(p_encoder + b_p, mask=there, other=-1) == encoder
        first = tl.minimum(first, tl.min(tl.where(b_hit, b_p, pairs), 0))
        last = tl.maximum(last, tl.max(tl.where(b_hit, b_p + 1, 0), 0))
    return first, last
