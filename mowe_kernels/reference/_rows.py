"""Walking over packed rows on the host, for the plain torch ops."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from mowe_kernels.dtypes import accumulation_dtype

# Rows handled at a time: large enough for full GEMM speed, small enough that what follows a GEMM finds it in cache.
CHUNK = 1024


def groups(group_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(encoder, its rows), empty ones left out."""
    bounds = group_offsets.tolist()
    for group, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            yield group, slice(start, stop)


def blocks(rows: slice) -> Iterator[slice]:
    """At most `CHUNK` of the rows, in order."""
    for start in range(rows.start, rows.stop, CHUNK):
        yield slice(start, min(start + CHUNK, rows.stop))


def chunks(group_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(encoder, at most `CHUNK` of its rows), in order."""
    for group, rows in groups(group_offsets):
        for block in blocks(rows):
            yield group, block


def clear_tail(rows: Tensor, offsets: Tensor) -> Tensor:
    """Zero the rows past the last offset, which belong to nobody."""
    rows[int(offsets[-1]) :].zero_()
    return rows


def sums(like: Tensor, needed: bool) -> Tensor:
    """Zeros to add up the gradient of `like` in, in the accumulation type; empty where nobody asked for it."""
    return like.new_zeros(like.shape if needed else 0, dtype=accumulation_dtype(like.dtype))


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """total += scale * a @ b, where total may be of a wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, alpha=scale)
    else:
        total.add_(a @ b, alpha=scale)
