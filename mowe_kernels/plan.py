"""How a routed batch lies in memory.

Every (clip, slot) of a batch is a pair. Pairs are sorted by encoder, so that the frames ("rows") of one encoder are
contiguous. P = B * k is fixed by the shapes; a pair that does not exist (its encoder belongs to another family, its
slot repeats an encoder the clip already has, its slot is unused) has length zero. Shapes never depend on the routing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mowe_kernels.ops.pack_plan import pack_plan

# Memory of rows that only the device can count comes in steps of so many (our choice): then most batches need what one
# before them did, and what was allocated, chosen and written down for that one is found again.
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class PackLayout:
    """The fixed part of a plan: families one after the other, each with its levels of frame rates.

    An encoder family turns a clip into frames in stages (samples or spectrogram frames, then the output of each
    convolution); every stage is a level, the last of a family is the one its layers run on.

    rank: int32 [E], place of each encoder of the pool in family-major order.
    level_bounds: int32 [L, 2], first and one-past-last rank of the family each level belongs to.
    num_encoders, num_levels: per family, host integers.
    """

    rank: Tensor
    level_bounds: Tensor
    num_encoders: tuple[int, ...]
    num_levels: tuple[int, ...]

    @staticmethod
    def build(
        family_of_encoder: Sequence[int], num_levels: Sequence[int], device: torch.device | None = None
    ) -> PackLayout:
        """Layout of a pool whose encoder e belongs to family `family_of_encoder[e]`, with `num_levels` per family."""
        by_family = sorted(range(len(family_of_encoder)), key=lambda e: (family_of_encoder[e], e))
        rank = [0] * len(by_family)
        for place, encoder in enumerate(by_family):
            rank[encoder] = place
        sizes = [list(family_of_encoder).count(f) for f in range(len(num_levels))]
        bounds = [(sum(sizes[:f]), sum(sizes[: f + 1])) for f, n in enumerate(num_levels) for _ in range(n)]
        device = device or torch.device("cpu")
        return PackLayout(
            device_lengths(rank, device),
            device_lengths(bounds, device),
            tuple(sizes),
            tuple(num_levels),
        )


@dataclass(frozen=True)
class Level:
    """Where every sequence lies at one frame rate of one family.

    cu_seqlens: int32 [P+1], first row of each pair. group_offsets: int32 [E+1], first row of each encoder.
    num_rows: host upper bound of cu_seqlens[-1] (exact on the CPU; `ROWS_AT_ONCE` divides it elsewhere, unless lengths
    are equal). max_seqlen: host upper bound of the lengths.
    equal_lengths: whether the host knows that every pair has max_seqlen rows or none, and that few have none; it does
    not say so of a single clip on a GPU.
    """

    cu_seqlens: Tensor
    group_offsets: Tensor
    num_rows: int
    max_seqlen: int
    equal_lengths: bool = False

    @property
    def starts(self) -> Tensor:
        return self.cu_seqlens[:-1]

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()

    def narrow(self, first: int, last: int) -> Level:
        """The level with the pairs first..last alone. Host reads: for the CPU path."""
        start, stop = int(self.cu_seqlens[first]), int(self.cu_seqlens[last])
        return Level(
            self.cu_seqlens[first : last + 1] - start,
            self.group_offsets.clamp(start, stop) - start,
            stop - start,
            self.max_seqlen,
            self.equal_lengths,
        )


@dataclass(frozen=True)
class FamilyPlan:
    """The plan as one family sees it.

    clip: int32 [P], clip of each sorted pair. encoder: int32 [P], encoder within the family; meaningless where the
    pair has no rows. levels: from the family's input to the rows its layers run on.
    """

    clip: Tensor
    encoder: Tensor
    levels: tuple[Level, ...]

    @property
    def rows(self) -> Level:
        return self.levels[-1]

    def by_encoder(self, most_rows: int = sys.maxsize) -> Iterator[FamilyPlan]:
        """Plans of one encoder each, in order, cut between sequences where one would have more than `most_rows` rows.

        Host reads: for the CPU path.
        """
        encoder, ends = self.encoder.tolist(), self.rows.cu_seqlens[1:].tolist()
        first = start = 0
        for last, end in enumerate(ends, 1):
            if last < len(ends) and encoder[last] == encoder[first] and ends[last] - start <= most_rows:
                continue
            if 0 <= encoder[first] < self.rows.group_offsets.numel() - 1:
                levels = tuple(level.narrow(first, last) for level in self.levels)
                yield FamilyPlan(self.clip[first:last], self.encoder[first:last], levels)
            first, start = last, end


@dataclass(frozen=True)
class PackPlan:
    """A routed batch: B clips, k slots each, P = B * k pairs sorted by encoder (stable), L levels.

    order: int32 [P], flat (clip * k + slot) of each sorted pair; pairs without rows come last.
    position: int32 [B, k], the sorted pair that serves each slot (slots that repeat an encoder share one).
    encoder: int32 [P], rank of each sorted pair's encoder, E where the pair does not exist.
    cu_seqlens: int32 [L, P+1]. group_offsets: int32 [L, E+1].
    lengths: host integers, per level the frames of each clip.
    """

    order: Tensor
    position: Tensor
    encoder: Tensor
    cu_seqlens: Tensor
    group_offsets: Tensor
    lengths: tuple[tuple[int, ...], ...]
    layout: PackLayout

    @staticmethod
    def build(indices: Tensor, lengths: Sequence[Sequence[int]], layout: PackLayout) -> PackPlan:
        """Plan for given choices.

        indices: integer [B, k], encoder of each slot in pool numbering, -1 for an unused slot.
        lengths: [L][B] host integers, frames of each clip at each level.
        """
        tensors = pack_plan(indices, device_lengths(lengths, indices.device), layout.rank, layout.level_bounds)
        return PackPlan(*tensors, tuple(map(tuple, lengths)), layout)

    def row_offsets(self, index: int) -> Tensor:
        """int32 [P+1]: first row of each pair in what family `index` gives."""
        return self.cu_seqlens[sum(self.layout.num_levels[: index + 1]) - 1]

    def family(self, index: int) -> FamilyPlan:
        """The part of the plan that family `index` of the layout executes."""
        layout = self.layout
        first = sum(layout.num_levels[:index])
        low = sum(layout.num_encoders[:index])
        high = low + layout.num_encoders[index]
        slots = self.position.shape[1]
        repeats = min(slots, high - low)  # one clip cannot occupy more pairs of a family than it has encoders
        alike = len(layout.num_encoders) == 1 and not only_bounds()  # of several families, most pairs are absent
        levels = []
        for level in range(first, first + layout.num_levels[index]):
            cu_seqlens, lengths = self.cu_seqlens[level], self.lengths[level]
            # A single clip is always as long as itself. With a number of rows of its own, it would find nothing that is
            # remembered of another one.
            equal = alike and len(set(lengths)) == 1 and (len(lengths) > 1 or cu_seqlens.device.type == "cpu")
            bound = repeats * sum(lengths)
            if not only_bounds():
                if cu_seqlens.device.type == "cpu":
                    bound = int(cu_seqlens[-1])
                elif not equal:
                    bound = -(-bound // ROWS_AT_ONCE) * ROWS_AT_ONCE
            offsets = self.group_offsets[level, low : high + 1]
            # Which clip is the longest must not decide on a compiled graph; on one from torch's cache on disk it would.
            longest = sum(lengths) if torch.compiler.is_compiling() else max((0, *lengths))
            levels.append(Level(cu_seqlens, offsets, bound, longest, equal))
        return FamilyPlan(self.order // slots, self.encoder - low if low else self.encoder, tuple(levels))


# What `device_lengths` gives instead of copies, in the order of the calls, while a CUDA graph is made.
_tables: Iterator[Tensor] | None = None


@contextmanager
def static_lengths(tables: Sequence[Tensor]) -> Iterator[None]:
    """Inside, `device_lengths` gives these tensors, one a call, and host lengths are upper bounds of what they hold."""
    global _tables
    before, _tables = _tables, iter(tables)
    try:
        yield
    finally:
        _tables = before


def only_bounds() -> bool:
    """Whether shapes must fit other lengths and another routing too: in a compiled graph, and in a CUDA graph."""
    return _tables is not None or torch.compiler.is_compiling()


def device_lengths(lengths: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Host integers as int32 [n] or [L, n] on a device, without waiting for it."""
    if _tables is not None:
        return next(_tables)
    if torch.compiler.is_compiling():
        rows = [row if isinstance(row, (list, tuple)) else (row,) for row in lengths]
        on_device = torch.ops.mowe.device_lengths([n for row in rows for n in row], device)
        return on_device.view(len(rows), -1) if isinstance(lengths[0], (list, tuple)) else on_device
    return _copy(lengths, device)


def _copy(lengths: Any, device: torch.device) -> Tensor:
    host = torch.tensor(lengths, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


# One node of a compiled graph: host integers that change from call to call reach the device as one copy.
_op = torch.library.custom_op(
    "mowe::device_lengths", _copy, mutates_args=(), schema="(SymInt[] lengths, Device device) -> Tensor"
)
_op.register_fake(lambda lengths, device: torch.empty(len(lengths), dtype=torch.int32, device=device))
