"""Walking over packed rows, for the plain torch ops: on the host, but for what says otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mowe_kernels.dtypes import accumulation_dtype

# Rows handled at a time, a window of 30 s at 50 Hz: large enough for full GEMM speed, small enough that what follows a
# GEMM finds it in cache.
CHUNK = 1536


def groups(group_offsets: Tensor, total: int = sys.maxsize) -> Iterator[tuple[int, slice]]:
    """(encoder, its rows, of so many in total), empty ones left out. Raises ValueError for offsets of other rows."""
    bounds = group_offsets.tolist()
    if bounds[:1] != [0] or bounds[-1] > total or bounds != sorted(bounds):
        raise ValueError(f"row offsets must rise from 0 to no more than there are rows, got {bounds}")
    for group, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            yield group, slice(start, stop)


def blocks(rows: slice) -> Iterator[slice]:
    """At most `CHUNK` of the rows, in order."""
    for start in range(rows.start, rows.stop, CHUNK):
        yield slice(start, min(start + CHUNK, rows.stop))


def chunks(group_offsets: Tensor, total: int) -> Iterator[tuple[int, slice]]:
    """(encoder, at most `CHUNK` of its rows), in order."""
    for group, rows in groups(group_offsets, total):
        for block in blocks(rows):
            yield group, block


def numbered(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """int32 [total] each, on the device: the rows 0, 1, ... and the sequence each of them belongs to."""
    row = torch.arange(total, dtype=torch.int32, device=offsets.device)
    return row, torch.bucketize(row, offsets[1:], out_int32=True, right=True)


def at(tensor: Tensor | None, index: int | slice) -> Tensor | None:
    """tensor[index], where there is one."""
    return None if tensor is None else tensor[index]


def assemble(shape: Sequence[int], like: Tensor, pieces: Iterable[tuple[slice, Tensor]]) -> Tensor:
    """A tensor of the given shape from (rows, their values), in order; a piece that is all of it is not copied.

    Rows past the last piece are zero: they belong to nobody.
    """
    out, stop = None, 0
    for rows, piece in pieces:
        if piece.shape[0] == shape[0]:
            return piece.contiguous()
        if out is None:
            out = like.new_empty(shape)
        out[rows] = piece
        stop = rows.stop
    if out is None:
        return like.new_zeros(shape)
    out[stop:].zero_()
    return out


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
